"""What a media file says of itself, read from ffmpeg's own report of it: tracks, size, rate, colour, fields.

The decision a reader would question: the report is ffmpeg's log. The wheel carries no ffprobe, and what the
decoder says of a frame (`showinfo`) is truer than what the container claims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

_TRACK = re.compile(r"Stream #0:(\d+)(?:\[0x[0-9a-f]+\])?(?:\([^)]*\))?: (Audio|Video): (.*)")
_CONTAINER = re.compile(r"Input #0, ([\w,]+), from ")
_DURATION = re.compile(r"Duration: (\d+):(\d\d):(\d\d(?:\.\d+)?)")
_FIELDS = re.compile(r"\b(?:top|bottom)(?: coded)? first\b")
_SHOWN = re.compile(r"\bfmt:(\w+) .*\bsar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)")
_RATE = re.compile(r"config in time_base: \S+ frame_rate: (\d+)/(\d+)")
_TAGS = re.compile(r"color_range:(\w+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)")
_ALPHA_FORMAT = re.compile(r"yuva|gbrap|rgba|bgra|argb|abgr|ayuv|vuya|^ya\d|pal8")


@dataclass(frozen=True)
class Track:
    """One track as the log's ``Stream`` line describes it.

    Attributes:
        index: among all tracks of the file.
        kind: "Audio" or "Video".
        text: codec, format, size, rate and dispositions in ffmpeg's words.
        has_alpha: the container says that a second picture holds its alpha (VP8 and VP9 in WebM).
    """

    index: int
    kind: str
    text: str
    has_alpha: bool = False

    @property
    def is_default(self) -> bool:
        """Whether players take it unless told otherwise."""
        return "(default)" in self.text

    @property
    def is_cover(self) -> bool:
        """Whether it is a sound file's cover, no clip."""
        return "(attached pic)" in self.text

    @property
    def fps(self) -> Fraction | None:
        """The average rate as ffmpeg logs it, to two places."""
        found = re.search(r", (\d+(?:\.\d+)?) fps", self.text)
        return Fraction(found[1]) if found else None


@dataclass(frozen=True)
class ColourTags:
    """What a stream's colour tags say, in ffmpeg's names; "unknown" where it says nothing."""

    matrix: str = "unknown"
    primaries: str = "unknown"
    transfer: str = "unknown"
    levels: str = "unknown"


@dataclass(frozen=True)
class FirstFrame:
    """What the decoder says of the first picture, after the rotation that its metadata asks for.

    Attributes:
        width, height: stored pixels.
        sample_aspect: a pixel's width over its height; 1 where nothing is said.
        interlaced: whether it holds two fields of different times.
        pixel_format: ffmpeg's name of it.
    """

    width: int
    height: int
    sample_aspect: Fraction
    interlaced: bool
    pixel_format: str
    colour: ColourTags

    @property
    def has_alpha(self) -> bool:
        """Whether the pixels carry transparency."""
        return bool(_ALPHA_FORMAT.search(self.pixel_format))


@dataclass
class Report:
    """The lines of ffmpeg's log that describe an input, gathered while it talks.

    Handed to a child as its listener: `Report.hear`.
    """

    tracks: list[Track] = field(default_factory=list)
    container: str = ""
    duration: float | None = None
    frame_rate: Fraction | None = None
    _shown: re.Match[str] | None = None
    _tags: re.Match[str] | None = None
    _is_input: bool = True

    def hear(self, line: str) -> None:
        """Takes one line of the log, without its level."""
        if line.startswith("Output #"):
            self._is_input = False
        elif container := _CONTAINER.match(line):
            self.container = container[1]
        elif track := self._is_input and _TRACK.match(line):
            self.tracks.append(Track(int(track[1]), track[2], track[3]))
        elif self._is_input and self.tracks and re.match(r"alpha_mode\s*: 1$", line, re.IGNORECASE):
            last = self.tracks[-1]
            self.tracks[-1] = Track(last.index, last.kind, last.text, has_alpha=True)
        elif self._is_input and self.duration is None and (duration := _DURATION.match(line)):
            self.duration = int(duration[1]) * 3600 + int(duration[2]) * 60 + float(duration[3])
        elif rate := _RATE.match(line):
            self.frame_rate = Fraction(int(rate[1]), int(rate[2])) if int(rate[1]) and int(rate[2]) else None
        else:
            self._shown = self._shown or _SHOWN.search(line)
            self._tags = self._tags or _TAGS.search(line)

    def first_frame(self) -> FirstFrame | None:
        """What `showinfo` said of the first picture; None where none came."""
        if self._shown is None:
            return None
        pixel_format, over, under, width, height, field_order = self._shown.groups()
        aspect = Fraction(int(over) or 1, int(under) or 1) if int(over) and int(under) else Fraction(1)
        tags = self._tags
        colour = ColourTags(tags[2], tags[3], tags[4], tags[1]) if tags else ColourTags()
        return FirstFrame(int(width), int(height), aspect, field_order in "TB", pixel_format, colour)


def says_interlaced(track: Track) -> bool:
    """Whether the container or the codec's header names an order of fields."""
    return bool(_FIELDS.search(track.text))


def chosen_track(tracks: Iterable[Track], kind: str) -> Track | None:
    """The track that a player takes: the default one, else the first; covers are none."""
    fitting: Sequence[Track] = [track for track in tracks if track.kind == kind and not track.is_cover]
    return next((track for track in fitting if track.is_default), fitting[0] if fitting else None)
