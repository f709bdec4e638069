"""Repeated requests and what they cost: medians with the spread beside them.

The decision a reader would question: engine utilisation is the generator's work over the whole request, from
the call to the finished file. Start-up, the first features and the encoder's end count against it, because a
user waits for them too.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from musetalk.config import Defaults
from musetalk.device import cpu_name, peak_memory_mb, usable_cores
from musetalk.errors import InputError
from musetalk.file_rendering import InferenceResult

STAGE_ORDER = ("load", "features", "generate", "composite", "encode")


class Spread(NamedTuple):
    """Median, least and greatest of a few measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))

    def rounded(self) -> dict[str, float]:
        """As JSON holds it: four significant digits."""
        return {name: significant(value) for name, value in self._asdict().items()}


def significant(value: float, digits: int = 4) -> float:
    """`value` to a number of significant digits."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


class BenchmarkAnswer(TypedDict):
    """Answer of `--benchmark`; every timing is {median, min, max}."""

    success: bool
    template_id: str
    audio_path: str
    output_path: str
    runs: int
    fps: float
    frames: int
    duration: float
    processing_time: dict[str, float]
    frames_per_second: dict[str, float]
    realtime_factor: dict[str, float]
    time_to_first_frame: dict[str, float]
    engine_utilisation: dict[str, float]
    cpu_time: dict[str, float]
    stages: dict[str, dict[str, float]]
    warm_up_time: float
    measured_time: float
    peak_memory_mb: float
    hardware: dict[str, Any]
    engine: str
    device: str
    requested_device: str
    dtype: str
    message: str


@dataclass(frozen=True)
class Measurement:
    """Results of equal requests.

    Attributes:
        results: one per run, the warm-up left out.
        cpu_times: seconds of processor time per run, ffmpeg's included where the system tells.
        warm_up_time: seconds of the first, uncounted run.
        measured_time: seconds of all counted runs, by a stopwatch around them.
        load_average: of the machine before the runs; None where the system doesn't tell.
    """

    results: list[InferenceResult]
    cpu_times: list[float]
    warm_up_time: float
    measured_time: float
    load_average: float | None

    def spread(self, value: Callable[[InferenceResult], float]) -> Spread:
        """A value of each run, in short."""
        return Spread.of(value(result) for result in self.results)

    @property
    def typical(self) -> InferenceResult:
        """The run of median length, of two the quicker."""
        ordered = sorted(self.results, key=lambda result: result.processing_time)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def stages(self) -> dict[str, Spread]:
        """Seconds that each stage worked, waiting left out."""
        names = {name for result in self.results for name in result.stages}
        ordered = sorted(names, key=STAGE_ORDER.index)
        return {name: self.spread(lambda result, n=name: result.stages.get(n, 0.0)) for name in ordered}  # type: ignore[misc]

    def answer(self) -> BenchmarkAnswer:
        """The documented dict."""
        result, rate = self.results[-1], self.spread(frames_per_second)
        utilisation = self.spread(engine_utilisation)
        return {
            "success": True,
            "template_id": result.template_id,
            "audio_path": result.audio_path,
            "output_path": result.output_path,
            "runs": len(self.results),
            "fps": round(float(result.fps), 6),
            "frames": result.frames,
            "duration": round(result.duration, 3),
            "processing_time": self.spread(lambda r: r.processing_time).rounded(),
            "frames_per_second": rate.rounded(),
            "realtime_factor": self.spread(lambda r: r.processing_time / r.duration).rounded(),
            "time_to_first_frame": self.spread(lambda r: r.time_to_first_frame).rounded(),
            "engine_utilisation": utilisation.rounded(),
            "cpu_time": Spread.of(self.cpu_times).rounded(),
            "stages": {name: spread.rounded() for name, spread in self.stages.items()},
            "warm_up_time": round(self.warm_up_time, 3),
            "measured_time": round(self.measured_time, 3),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "hardware": hardware(self.load_average),
            "engine": result.engine,
            "device": result.device.name,
            "requested_device": result.device.requested,
            "dtype": result.dtype,
            "message": f"✅ {rate.median:.1f} frames/s, engine {utilisation.median:.0%} busy, "
            f"median of {len(self.results)} 测试完成",
        }

    def table(self) -> list[str]:
        """The figures for a person, one line each."""
        spreads = (
            ("frames/s", self.spread(frames_per_second)),
            ("wall s", self.spread(lambda r: r.processing_time)),
            ("first frame s", self.spread(lambda r: r.time_to_first_frame)),
            ("engine utilisation", self.spread(engine_utilisation)),
            ("processor s", Spread.of(self.cpu_times)),
            *((f"{name} s", spread) for name, spread in self.stages.items()),
        )
        heading = f"{'':<20}" + "".join(f"{name:>10}" for name in Spread._fields)
        return [
            heading,
            *(f"{name:<20}" + "".join(f"{v:>10.3f}" for v in spread) for name, spread in spreads),
        ]


def frames_per_second(result: InferenceResult) -> float:
    """Frames of the finished file over the whole request's seconds."""
    return result.frames / result.processing_time


def engine_utilisation(result: InferenceResult) -> float:
    """The share of the whole request's time in which the generator worked."""
    return result.stages.get("generate", 0.0) / result.processing_time


def measure(
    render: Callable[[], InferenceResult],
    runs: int = Defaults.benchmark_runs,
    between: Callable[[], object] | None = None,
) -> Measurement:
    """`render()` once to warm up, then `runs` times.

    Args:
        between: called before each counted run and not measured, so that two ways take turns.

    Raises:
        InputError: `runs` is below 1.
    """
    if runs < 1:
        raise InputError(f"benchmark_runs is {runs}", "measure at least 1 run")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    start = time.perf_counter()
    render()
    warm_up = time.perf_counter() - start
    results, cpu_times, measured = [], [], 0.0
    for _ in range(runs):
        if between is not None:
            between()
        before, start = processor_seconds(), time.perf_counter()
        results.append(render())
        measured += time.perf_counter() - start
        cpu_times.append(processor_seconds() - before)
    return Measurement(results, cpu_times, warm_up, measured, load)


def processor_seconds() -> float:
    """Processor time of this process and of its finished children so far; Windows tells only its own."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def hardware(load_average: float | None = None) -> dict[str, Any]:
    """What a figure was measured on; a load average near or above the cores means that others worked too."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    return facts if load_average is None else {**facts, "load_average": round(load_average, 2)}
