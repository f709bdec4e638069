"""What a person and a program are told of a batch: a bar while it runs, a table and an answer at its end."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from musetalk.batch.crew import Done, Event, Lost, Ready
from musetalk.batch.manifest import FAILED
from musetalk.files import atomic_file

TOLD_FAILURES = 20  # in the table and in the answer on stdout; the report has them all


class Tally:
    """Counts a batch while it runs.

    Args:
        rows: of the whole table.
        skipped: of them, that were done before.
        bar: whether a person watches; None for where stderr is a terminal.
    """

    def __init__(self, rows: int, skipped: int, *, bar: bool | None = None) -> None:
        from tqdm import tqdm

        self.rows = rows
        self.skipped = skipped
        self.done = self.retried = 0
        self.failures: list[Mapping[str, Any]] = []
        self.measured = Measured()
        self.starts: list[float] = []
        self.prepared: list[float] = []
        self.lost = 0
        self.started = time.perf_counter()
        self._frames = 0
        self._bar = tqdm(
            total=rows,
            initial=skipped,
            desc="clips 视频",
            unit="clip",
            disable=None if bar is None else not bar,
            file=sys.stderr,
        )

    def notice(self, event: Event) -> None:
        """Counts what happens to workers."""
        if isinstance(event, Ready):
            self.starts.append(event.seconds)
        elif isinstance(event, Lost):
            self.lost += 1
            self._bar.write(f"⚠️ a worker was lost 工作进程退出: {event.words}", file=sys.stderr)
        elif isinstance(event, Done) and not event.outcome.failed and not event.outcome.frames:
            self.prepared.append(event.outcome.seconds)

    def count(self, entry: Mapping[str, Any]) -> None:
        """Counts a row that is through."""
        self.retried += entry["attempts"] > 1
        if entry["state"] == FAILED:
            self.failures.append(entry)
            self.failures.sort(key=lambda failed: failed["row"])
        else:
            self.done += 1
            self._frames += entry["frames"]
            self.measured.count(entry)
        seconds = time.perf_counter() - self.started
        self._bar.set_postfix_str(f"{self._frames / seconds:.0f} frames/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def answer(self, workers: int) -> dict[str, Any]:
        """The batch in figures."""
        seconds = time.perf_counter() - self.started
        return {
            "rows": self.rows,
            "done": self.done,
            "skipped": self.skipped,
            "failed": len(self.failures),
            "workers": workers,
            "workers_lost": self.lost,
            "retried": self.retried,
            "frames": self._frames,
            "seconds": round(seconds, 3),
            "clips_per_second": round(self.done / seconds, 3),
            "frames_per_second": round(self._frames / seconds, 1),
            "times": self.measured.times(self.starts, self.prepared),
            "failures": [_failure(entry) for entry in self.failures[:TOLD_FAILURES]],
        }

    def table(self, answer: Mapping[str, Any]) -> Iterator[str]:
        """The end of a batch for a person."""
        rate = f"{answer['clips_per_second']:.2f} clips/s, {answer['frames_per_second']:.0f} frames/s"
        yield f"{answer['done']} done, {answer['skipped']} skipped, {answer['failed']} failed; {rate}"
        for code, count in Counter(entry["error_code"] for entry in self.failures).most_common():
            yield f"  {count:>6} × {code}"
        for entry in self.failures[:TOLD_FAILURES]:
            yield f"❌ row {entry['row']} ({entry['output']}): {entry['message']}"
            if entry["hint"]:
                yield f"   {entry['hint']}"
        if len(self.failures) > TOLD_FAILURES:
            yield f"… and {len(self.failures) - TOLD_FAILURES} more, in the manifest"


def _failure(entry: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("row", "template_id", "audio", "output", "attempts", "error_code", "message", "hint")
    return {name: entry.get(name) for name in shown}


class Measured:
    """What things took, a few numbers a clip."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str], float] = {}
        self._points: list[tuple[int, float]] = []

    def count(self, entry: Mapping[str, Any]) -> None:
        """Counts a clip that was made."""
        load = float(entry["stages"].get("load", 0.0))
        self._opened.setdefault((entry["worker"], entry["template_id"]), load)
        self._points.append((entry["frames"], entry["seconds"] - load))

    def times(self, starts: Sequence[float], prepared: Sequence[float]) -> dict[str, float]:
        """In seconds, for `--simulate`.

        Returns:
            start: of a worker; prepare: of a template; open: of a template and its engine, first on a
            worker; clip: of a clip beside its frames; frame: of each frame.
        """
        clip, frame = _line(self._points)
        means = {"start": starts, "prepare": prepared, "open": list(self._opened.values())}
        told = {name: statistics.fmean(values) if values else 0.0 for name, values in means.items()}
        return {name: round(value, 5) for name, value in {**told, "clip": clip, "frame": frame}.items()}


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a clip and of each of its frames; all of it in frames where clips are alike."""
    frames = [n for n, _ in points]
    if not points or not sum(frames):
        return 0.0, 0.0
    if len(set(frames)) > 1:
        slope, intercept = statistics.linear_regression(frames, [seconds for _, seconds in points])
        if slope > 0 and intercept >= 0:
            return intercept, slope
    return 0.0, sum(seconds for _, seconds in points) / sum(frames)


def write_report(path: Path, answer: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """The answer with every row's line, as one JSON file.

    Raises:
        OutputError: it can't be written.
    """
    rows = sorted(entries, key=lambda entry: entry["row"])
    with atomic_file(path) as stream:
        text = json.dumps({**answer, "entries": rows}, ensure_ascii=False, indent=1)
        stream.write(text.encode("utf-8", "backslashreplace") + b"\n")
