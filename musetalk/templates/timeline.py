"""A clip's own time: when each of its frames is shown, and which one is shown when.

The decision a reader would question: stamps that are an even rate but for their container's rounding (a
millisecond in Matroska) become that rate exactly. Walked as they are, a frame would now and then be shown
twice and its neighbour not at all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

EVEN = 0.0011  # seconds by which stamps of an even rate may be off: a millisecond, rounded at both ends
ROUNDING = 1e-6  # seconds; a frame due this soon is due now
MIN_SPAN = 1e-4  # seconds that a frame is shown at least


@dataclass(frozen=True)
class Timeline:
    """How long each of a clip's frames is shown.

    Attributes:
        fps: frames per second, the average where the rate varies.
        spans: seconds that each frame is shown, all above 0.
        is_even: every frame is shown for 1 / `fps`.
    """

    fps: Fraction
    spans: tuple[float, ...]
    is_even: bool = field(init=False, compare=False)
    _ends: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.fps <= 0 or not self.spans or not all(0 < span < math.inf for span in self.spans):
            raise ValueError("a frame that is shown for no time")
        span = float(1 / self.fps)
        object.__setattr__(self, "is_even", all(math.isclose(span, own, rel_tol=1e-6) for own in self.spans))
        # of the cycle's positions: forward, then backward
        object.__setattr__(self, "_ends", list(accumulate([*self.spans, *reversed(self.spans)])))

    @classmethod
    def of(cls, times: Sequence[float], fps: Fraction) -> Timeline:
        """The timeline of frames shown from `times` on (seconds, rising); even where it is even.

        Args:
            fps: what the container says; obeyed where it fits the times.
        """
        if all(abs(time - i / fps) <= EVEN for i, time in enumerate(times)):
            return cls.even(len(times), fps)
        steps = [max(later - earlier, MIN_SPAN) for earlier, later in pairwise(times)]
        # how long the last one is shown is nowhere said: as long as a frame usually is
        spans = (*steps, sorted(steps)[len(steps) // 2])
        return cls(Fraction(len(spans) / sum(spans)).limit_denominator(1001), spans)

    @classmethod
    def even(cls, count: int, fps: Fraction) -> Timeline:
        """`count` frames at a steady rate."""
        return cls(fps, (float(1 / fps),) * count)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        return self._ends[len(self.spans) - 1]

    def position(self, seconds: Fraction) -> int:
        """The position of the cycle, forward and back, that is shown `seconds` after its start."""
        if self.is_even:
            return math.floor(seconds * self.fps) % len(self._ends)
        within = float(seconds % Fraction(self._ends[-1]))
        return bisect.bisect_right(self._ends, within + ROUNDING) % len(self._ends)

    def to_dict(self) -> dict[str, Any]:
        """What a cache keeps: the rate as numerator and denominator, each frame's start and the end."""
        return {
            "rate": [self.fps.numerator, self.fps.denominator],
            "seconds": [0.0, *self._ends[: len(self.spans)]],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timeline:
        """The inverse of `to_dict`.

        Raises:
            ArithmeticError, LookupError, TypeError, ValueError: it is something else.
        """
        numerator, denominator = (int(value) for value in data["rate"])
        seconds = [float(second) for second in data["seconds"]]
        spans = tuple(later - earlier for earlier, later in pairwise(seconds))
        return cls(Fraction(numerator, denominator), spans)
