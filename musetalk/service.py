"""All that the service offers in one class, each call answering the documented dict.

The answers are what the commands print; a resident service would send the same ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from musetalk import __version__
from musetalk.config import (
    Defaults,
    EncodingConfig,
    EngineConfig,
    ParsingMode,
    PreprocessingConfig,
)
from musetalk.device import resolve_device
from musetalk.engines import available_engines
from musetalk.inference import InferenceResult, UltraFastRealtimeInference
from musetalk.preprocessing import EnhancedMuseTalkPreprocessor
from musetalk.store import MEGABYTE, CacheCheck, TemplateStore

if TYPE_CHECKING:
    from musetalk.measurement import Measurement

SERVICE_NAME = "IntegratedMuseTalkService"


class PreprocessAnswer(TypedDict):
    """Answer of `--preprocess`."""

    success: bool
    template_id: str
    metadata: dict[str, Any]
    cached: bool
    processing_time: float
    message: str
    engine: str
    device: str
    requested_device: str


class InferenceAnswer(TypedDict):
    """Answer of `--inference`."""

    success: bool
    template_id: str
    audio_path: str
    output_path: str
    fps: float
    frames: int
    duration: float
    processing_time: float
    rtf: float
    frames_per_second: float
    time_to_first_frame: float
    stages: dict[str, float]
    engine: str
    device: str
    requested_device: str
    dtype: str
    message: str


class CheckAnswer(TypedDict, total=False):
    """Answer of `--check_cache` for one template."""

    success: bool
    exists: bool
    valid: bool
    template_id: str
    metadata: dict[str, Any] | None
    cache_size_mb: float
    message: str
    hint: str


def megabytes(size: int) -> float:
    """Bytes as MB, to two places."""
    return round(size / MEGABYTE, 2)


def inference_answer(result: InferenceResult) -> InferenceAnswer:
    """The documented dict of a rendering."""
    elapsed = result.processing_time
    return {
        "success": True,
        "template_id": result.template_id,
        "audio_path": result.audio_path,
        "output_path": result.output_path,
        "fps": round(float(result.fps), 6),
        "frames": result.frames,
        "duration": round(result.duration, 3),
        "processing_time": round(elapsed, 3),
        "rtf": round(elapsed / result.duration, 4),
        "frames_per_second": round(result.frames / elapsed, 1),
        "time_to_first_frame": round(result.time_to_first_frame, 3),
        "stages": {name: round(seconds, 3) for name, seconds in result.stages.items()},
        "engine": result.engine,
        "device": result.device.name,
        "requested_device": result.device.requested,
        "dtype": result.dtype,
        "message": f"✅ 推理完成 {result.frames} frames in {elapsed:.2f} s",
    }


def check_answer(template_id: str, check: CacheCheck) -> CheckAnswer:
    """The documented dict of one template's check."""
    answer: CheckAnswer = {
        "success": check.valid,
        "exists": check.exists,
        "valid": check.valid,
        "template_id": template_id,
        "metadata": dict(check.metadata) if check.metadata else None,
        "cache_size_mb": megabytes(check.size),
        "message": check.message,
    }
    if check.hint:
        answer["hint"] = check.hint
    return answer


class IntegratedMuseTalkService:
    """Preprocessing, inference and cache checks over one cache folder.

    Args:
        cache_dir: the folder of template caches.
        device: "auto", "cpu", "cuda:0"; a missing GPU falls back to the CPU. None: as in `config`.
        config: engine and model settings.
        encoding: shape of output files.
        settings: how templates are made.
    """

    def __init__(
        self,
        cache_dir: str | Path = Defaults.cache_dir,
        device: str | None = None,
        *,
        config: EngineConfig | None = None,
        encoding: EncodingConfig | None = None,
        settings: PreprocessingConfig | None = None,
    ) -> None:
        base = config or EngineConfig()
        self.config = dataclasses.replace(base, device=device or base.device)
        self.store = TemplateStore(cache_dir)
        self.encoding = encoding or EncodingConfig()
        self.settings = settings or PreprocessingConfig()
        self._inference: UltraFastRealtimeInference | None = None

    def preprocess_template(
        self,
        template_id: str,
        template_image_path: str | Path,
        bbox_shift: int | None = None,
        parsing_mode: ParsingMode | None = None,
        force_refresh: bool = False,
    ) -> PreprocessAnswer:
        """Makes the template's cache, or finds it up to date; None keeps this service's settings."""
        changes: dict[str, Any] = {"bbox_shift": bbox_shift, "parsing_mode": parsing_mode}
        changes = {key: value for key, value in changes.items() if value is not None}
        settings = dataclasses.replace(self.settings, **changes)
        preprocessor = EnhancedMuseTalkPreprocessor(self.store.cache_dir, config=self.config)
        result = preprocessor.preprocess(template_id, Path(template_image_path), settings, force_refresh)
        found = (
            "✅ 模板缓存已存在 cache is up to date" if result.cached else "✅ 预处理完成 template is ready"
        )
        return {
            "success": True,
            "template_id": template_id,
            "metadata": dict(result.metadata),
            "cached": result.cached,
            "processing_time": round(result.processing_time, 3),
            "message": f"{found}: {template_id}",
            "engine": result.engine,
            "device": result.device.name,
            "requested_device": result.device.requested,
        }

    def realtime_inference(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str = Defaults.fps,
        frames_dir: str | Path | None = None,
    ) -> InferenceAnswer:
        """Renders speech onto a cached template."""
        result = self._renderer().ultra_fast_inference(
            template_id, audio_path, output_path, fps, frames_dir=frames_dir
        )
        return inference_answer(result)

    def measure(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str = Defaults.fps,
        runs: int = Defaults.benchmark_runs,
    ) -> Measurement:
        """`realtime_inference` once to warm up and `runs` times to be measured."""
        return self._renderer().measure(template_id, audio_path, output_path, fps, runs)

    def _renderer(self) -> UltraFastRealtimeInference:
        """The renderer, kept between calls so that its template stays open."""
        if self._inference is None:
            self._inference = UltraFastRealtimeInference(
                self.store.cache_dir, config=self.config, encoding=self.encoding
            )
        return self._inference

    def check_template_cache(self, template_id: str) -> CheckAnswer:
        """Whether a template can be used."""
        return check_answer(template_id, self.store.check(template_id))

    def list_template_caches(self) -> list[CheckAnswer]:
        """A quick check, without checksums, of every template."""
        return [check_answer(name, self.store.check(name, full=False)) for name in self.store.template_ids()]

    def get_service_info(self) -> dict[str, Any]:
        """What this service is, holds and can do."""
        return {
            "success": True,
            "service_name": SERVICE_NAME,
            "version": __version__,
            "device": resolve_device(self.config.device, strict=self.config.strict_device).name,
            "requested_device": self.config.device,
            "cache_dir": str(self.store.cache_dir),
            "batch_size": self.config.batch_size,
            "cache_info": self.store.info(),
            "capabilities": ["preprocess", "inference", "check_cache", "service_info", "benchmark"],
            "engines": [dataclasses.asdict(status) for status in available_engines(self.config.models)],
        }
