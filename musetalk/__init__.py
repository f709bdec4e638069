"""Enhanced MuseTalk: one portrait and a speech file become a talking-head mp4."""

__version__ = "1.0.0"
