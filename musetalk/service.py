"""All that the service offers in one class, each call answering the documented dict.

The answers are what the commands print; a resident service would send the same ones.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
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
from musetalk.engines.choice import available_engines
from musetalk.engines.registry import EngineRegistry
from musetalk.file_rendering import InferenceResult
from musetalk.inference import UltraFastRealtimeInference
from musetalk.open_templates import OpenTemplates
from musetalk.preprocessing.preprocessor import EnhancedMuseTalkPreprocessor
from musetalk.rendering import Conduct
from musetalk.templates.store import MEGABYTE, CacheCheck, TemplateStore

if TYPE_CHECKING:
    from musetalk.measurement import Measurement

log = logging.getLogger(__name__)

SERVICE_NAME = "IntegratedMuseTalkService"
TEMPLATE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".mp4")


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
    vae_decoder: str | None
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
        "vae_decoder": result.vae_decoder,
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


def template_source(folder: Path, template_id: str) -> Path | None:
    """`folder`/`template_id`.jpg|jpeg|png|webp|mp4, the first that is there."""
    sources = (folder / f"{template_id}{suffix}" for suffix in TEMPLATE_SUFFIXES)
    return next((path for path in sources if path.is_file()), None)


def is_outdated(metadata: Mapping[str, Any], source: Path | None) -> bool:
    """Whether a cache was made from this very path, which holds another picture by now."""
    from musetalk.preprocessing.source import source_sha256

    made_from = metadata.get("template_image_path")
    if source is None or not isinstance(made_from, str) or Path(made_from).absolute() != source.absolute():
        return False
    return metadata.get("source_sha256") != source_sha256(source)


class IntegratedMuseTalkService:
    """Preprocessing, inference and cache checks over one cache folder.

    Args:
        cache_dir: the folder of template caches.
        device: "auto", "cpu", "cuda:0"; a missing GPU falls back to the CPU. None: as in `config`.
        config: engine and model settings.
        encoding: shape of output files.
        settings: how templates are made.
        engines: loaded engines to share; by default its own.
        templates: open templates to share; by default its own.
    """

    def __init__(
        self,
        cache_dir: str | Path = Defaults.cache_dir,
        device: str | None = None,
        *,
        config: EngineConfig | None = None,
        encoding: EncodingConfig | None = None,
        settings: PreprocessingConfig | None = None,
        engines: EngineRegistry | None = None,
        templates: OpenTemplates | None = None,
    ) -> None:
        base = config or EngineConfig()
        self.config = dataclasses.replace(base, device=device or base.device)
        self.store = TemplateStore(cache_dir)
        self.encoding = encoding or EncodingConfig()
        self.settings = settings or PreprocessingConfig()
        self.engines = engines or EngineRegistry()
        self.templates = templates or OpenTemplates()

    def sharing(
        self,
        config: EngineConfig | None = None,
        encoding: EncodingConfig | None = None,
        settings: PreprocessingConfig | None = None,
        cache_dir: Path | None = None,
    ) -> IntegratedMuseTalkService:
        """A service with other settings, or over another cache folder, that shares engines and templates."""
        return IntegratedMuseTalkService(
            cache_dir or self.store.cache_dir,
            config=config or self.config,
            encoding=encoding or self.encoding,
            settings=settings or self.settings,
            engines=self.engines,
            templates=self.templates,
        )

    def preprocess_template(
        self,
        template_id: str,
        template_image_path: str | Path,
        bbox_shift: int | None = None,
        parsing_mode: ParsingMode | None = None,
        force_refresh: bool = False,
        cancel: threading.Event | None = None,
    ) -> PreprocessAnswer:
        """Makes the template's cache, or finds it up to date; None keeps this service's settings.

        Raises:
            CancelledRun: `cancel` was set before it was made.
        """
        changes: dict[str, Any] = {"bbox_shift": bbox_shift, "parsing_mode": parsing_mode}
        changes = {key: value for key, value in changes.items() if value is not None}
        settings = dataclasses.replace(self.settings, **changes)
        preprocessor = EnhancedMuseTalkPreprocessor(
            self.store.cache_dir, config=self.config, engines=self.engines
        )
        result = preprocessor.preprocess(
            template_id, Path(template_image_path), settings, force_refresh, cancel
        )
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

    def preprocess_if_missing(
        self, template_id: str, folder: Path, cancel: threading.Event | None = None
    ) -> None:
        """Preprocesses `folder`/`template_id`.jpg|jpeg|png|webp|mp4 where the cache is missing or outdated.

        A cache is outdated when it was made from that very file and the file has changed since. Where the
        folder has no such file, a warning says so, and the caller meets what is wrong with the cache.
        """
        source = template_source(folder, template_id)
        check = self.store.check(template_id, full=False)
        if check.valid and not is_outdated(check.metadata or {}, source):
            return
        if source is None:
            names = ", ".join(f"{template_id}{suffix}" for suffix in TEMPLATE_SUFFIXES)
            log.warning(
                "⚠️ no usable cache for %s, and in %s none of %s 未找到模板图片", template_id, folder, names
            )
            return
        log.warning("no usable cache for %s, preprocessing %s 首次使用，先预处理", template_id, source)
        self.preprocess_template(template_id, source, cancel=cancel)

    def realtime_inference(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str = Defaults.fps,
        frames_dir: str | Path | None = None,
        articulation: float = Defaults.articulation,
        conduct: Conduct | None = None,
    ) -> InferenceAnswer:
        """Renders speech onto a cached template; `conduct` says who watches and steers."""
        result = self.renderer().ultra_fast_inference(
            template_id,
            audio_path,
            output_path,
            fps,
            frames_dir=frames_dir,
            articulation=articulation,
            conduct=conduct,
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
        return self.renderer().measure(template_id, audio_path, output_path, fps, runs)

    def renderer(self) -> UltraFastRealtimeInference:
        """A renderer over this service's engines and open templates."""
        return UltraFastRealtimeInference(
            self.store.cache_dir,
            config=self.config,
            encoding=self.encoding,
            engines=self.engines,
            templates=self.templates,
        )

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
            "vae_decoder": self.config.vae_decoder,
            "cache_info": self.store.info(),
            "capabilities": ["preprocess", "inference", "check_cache", "service_info", "benchmark"],
            "engines": [dataclasses.asdict(status) for status in available_engines(self.config.models)],
        }
