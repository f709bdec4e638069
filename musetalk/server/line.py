"""The line in which files and templates wait for their turn.

The decision a reader would question: what is stuck loses its turn although its thread goes on. Nothing ends a
thread that waits in native code; those who are behind it needn't wait as well.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from musetalk.errors import CancelledRun

POLL = 0.05  # seconds between two looks at what nobody tells


@dataclasses.dataclass(eq=False)
class Turn:
    """A piece of work that waits for its turn or has it.

    Attributes:
        cancel: ends it, also where it takes too long.
        deadline: on the monotonic clock.
        runs: it has its turn.
        seated: it runs on a session's place, and takes none from files.
    """

    cancel: threading.Event
    deadline: float
    runs: bool = False
    seated: bool = False


class Line:
    """Work that waits and work that runs, in the order of its coming.

    Args:
        slots: how many may run at once, now.
        changed: held while the line changes, and told of it; whoever changes `slots` does the same.
    """

    def __init__(self, slots: Callable[[], int], changed: threading.Condition) -> None:
        self._slots = slots
        self._changed = changed
        self._turns: list[Turn] = []

    def __len__(self) -> int:
        """Pieces of work under way or waiting."""
        return len(self._turns)

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return sum(not turn.runs for turn in self._turns)

    def join(self, turn: Turn) -> Turn:
        """Puts a piece of work at the end; it counts until it leaves."""
        with self._changed:
            self._turns.append(turn)
        return turn

    @contextmanager
    def in_turn(self, turn: Turn) -> Iterator[None]:
        """The turn of what has a place in the line, which it leaves in the end.

        Raises:
            CancelledRun: it was cancelled, or left the line, while it waited.
        """
        try:
            with self._changed:
                while not self._is_next(turn):
                    self._changed.wait(POLL)
                turn.runs = True
            yield
        finally:
            self.leave(turn)

    def _is_next(self, turn: Turn) -> bool:
        if turn.cancel.is_set() or turn not in self._turns:
            raise CancelledRun("the request was cancelled 已取消", "")
        first = next(one for one in self._turns if not one.runs)
        under_way = sum(one.runs and not one.seated for one in self._turns)
        return turn is first and under_way < self._slots()

    def leave(self, turn: Turn) -> None:
        """Frees the turn of what has ended, or of what is stuck and no longer counts."""
        with self._changed:
            if turn in self._turns:
                self._turns.remove(turn)
                self._changed.notify_all()

    def end_overdue(self) -> None:
        """Cancels what has taken longer than it may, and frees its turn even where it is stuck."""
        now = time.monotonic()
        with self._changed:
            overdue = [turn for turn in self._turns if turn.deadline < now]
        for turn in overdue:
            turn.cancel.set()
            self.leave(turn)
