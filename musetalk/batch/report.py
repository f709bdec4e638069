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
from musetalk.batch.manifest import DONE, FAILED
from musetalk.files import atomic_file

TOLD_FAILURES = 20  # in the table and in the answer on stdout; the report has them all


class Tally:
    """Counts a batch while it runs.

    Args:
        rows: of the whole table.
        skipped: the lines of those that were done before.
        bar: whether a person watches; None for where stderr is a terminal.
    """

    def __init__(self, rows: int, skipped: Sequence[Mapping[str, Any]], *, bar: bool | None = None) -> None:
        from tqdm import tqdm

        self.rows = rows
        self.skipped = list(skipped)
        self.entries: list[Mapping[str, Any]] = []
        self.starts: list[float] = []
        self.prepared: list[float] = []
        self.lost = 0
        self.started = time.perf_counter()
        self._frames = 0
        self._bar = tqdm(
            total=rows,
            initial=len(skipped),
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
        self.entries.append(entry)
        self._frames += entry.get("frames", 0)
        seconds = time.perf_counter() - self.started
        self._bar.set_postfix_str(f"{self._frames / seconds:.0f} frames/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        """The rows that have no clip, in the table's order."""
        return sorted((e for e in self.entries if e["state"] == FAILED), key=lambda e: e["row"])

    def answer(self, workers: int) -> dict[str, Any]:
        """The batch in figures."""
        seconds = time.perf_counter() - self.started
        made = [entry for entry in self.entries if entry["state"] == DONE]
        frames = sum(entry["frames"] for entry in made)
        return {
            "rows": self.rows,
            "done": len(made),
            "skipped": len(self.skipped),
            "failed": len(self.failures),
            "workers": workers,
            "workers_lost": self.lost,
            "retried": sum(entry.get("attempts", 1) > 1 for entry in self.entries),
            "frames": frames,
            "seconds": round(seconds, 3),
            "clips_per_second": round(len(made) / seconds, 3),
            "frames_per_second": round(frames / seconds, 1),
            "times": measured_times(made, self.starts, self.prepared),
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


def measured_times(
    made: Sequence[Mapping[str, Any]], starts: Sequence[float], prepared: Sequence[float]
) -> dict[str, float]:
    """What things took, in seconds, for `--simulate`.

    Returns:
        start: of a worker; prepare: of a template; open: of a template and its engine, the first time on a
        worker; clip: of a clip beside its frames; frame: of each frame.
    """
    first: dict[tuple[str, str], float] = {}
    points: list[tuple[int, float]] = []
    for entry in made:
        load = float(entry["stages"].get("load", 0.0))
        first.setdefault((entry["worker"], entry["template_id"]), load)
        points.append((entry["frames"], entry["seconds"] - load))
    clip, frame = _line(points)
    means = {"start": starts, "prepare": prepared, "open": list(first.values())}
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
