"""Faces in a frame: detectors, parsers, and the head's landmarks."""
