"""From a portrait, clip or folder of images to a cached template.

The decision a reader would question: the template's lock is held from the look at the cache until the
new one is published, so that ten requests for one new template preprocess it once and nine wait.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from musetalk.config import Defaults, EngineConfig, EngineName, ParsingMode, PreprocessingConfig
from musetalk.device import Device, resolve_device, usable_by_torch
from musetalk.engines.choice import choose_engine, engine_fingerprint
from musetalk.engines.registry import EngineRegistry
from musetalk.pipeline import Pipeline, StageClock
from musetalk.templates.store import CacheInfo, TemplateMetadata, TemplateStore, check_template_id

if TYPE_CHECKING:
    from musetalk.engines.base import Engine
    from musetalk.preprocessing.following import TemplateSource
    from musetalk.templates.template import Template
    from musetalk.templates.timeline import Timeline

log = logging.getLogger(__name__)

CACHE_VERSION = "2.0"


@dataclass(frozen=True)
class PreprocessingResult:
    """A template's metadata and how it came about."""

    metadata: TemplateMetadata
    cached: bool
    processing_time: float  # seconds
    engine: str
    device: Device


class EnhancedMuseTalkPreprocessor:
    """Makes, loads, lists and removes template caches.

    Args:
        cache_dir: the folder of template caches.
        device: "auto", "cpu", "cuda:0"; a missing GPU falls back to the CPU. None: as in `config`.
        config: engine and model settings.
        settings: how templates are made; `preprocess_template` may override the two common fields.
        engines: loaded engines to share; by default its own.
    """

    def __init__(
        self,
        cache_dir: str | Path = Defaults.cache_dir,
        device: str | None = None,
        *,
        config: EngineConfig | None = None,
        settings: PreprocessingConfig | None = None,
        engines: EngineRegistry | None = None,
    ) -> None:
        self.store = TemplateStore(cache_dir)
        self.config = config or EngineConfig()
        self.settings = settings or PreprocessingConfig()
        self.engines = engines or EngineRegistry()
        self.device = resolve_device(device or self.config.device, strict=self.config.strict_device)

    def preprocess_template(
        self,
        template_id: str,
        template_image_path: str | Path,
        bbox_shift: int = PreprocessingConfig.bbox_shift,
        parsing_mode: ParsingMode = PreprocessingConfig.parsing_mode,
        force_refresh: bool = False,
    ) -> TemplateMetadata:
        """The metadata of a template made from an image, video or folder of images.

        A cache of the same source, settings and engine is used as it is.

        Raises:
            InputError: the source or a value can't be used.
            NoFaceError: no frame shows a usable face.
            WeightsError, EngineError: the engine can't run.
            OutputError: the cache can't be written.
        """
        settings = dataclasses.replace(self.settings, bbox_shift=bbox_shift, parsing_mode=parsing_mode)
        return self.preprocess(template_id, Path(template_image_path), settings, force_refresh).metadata

    def preprocess(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig,
        force_refresh: bool = False,
        cancel: threading.Event | None = None,
    ) -> PreprocessingResult:
        """As `preprocess_template`, with all settings and with how the template came about.

        Raises:
            CancelledRun: `cancel` was set before the template was made; nothing is left.
        """
        from musetalk.media.image import check_background
        from musetalk.preprocessing.source import source_sha256

        start = time.perf_counter()
        check_template_id(template_id)
        engine_name = choose_engine(self.config)
        wanted: dict[str, Any] = {
            "source_sha256": source_sha256(source),
            "parameters": dataclasses.asdict(settings),
            "engine": engine_name,
            "engine_fingerprint": engine_fingerprint(engine_name, self.config),
        }
        behind = check_background(settings.background)
        if behind is not None:
            wanted["background_sha256"] = source_sha256(behind)
        with self.store.lock(template_id):
            metadata = None if force_refresh else self._cached(template_id, wanted)
            if metadata is None:
                metadata = self._make(template_id, source, settings, engine_name, wanted, cancel)
                cached = False
            else:
                cached = True
        elapsed = time.perf_counter() - start
        device = Device(self._ran_on(engine_name, cached), self.device.requested)
        return PreprocessingResult(metadata, cached, elapsed, engine_name, device)

    def _ran_on(self, engine_name: EngineName, cached: bool) -> str:
        """Where the engine ran, or, for a cache that is up to date, would run as far as the driver says."""
        if engine_name == "lite":
            return "cpu"
        return self.device.name if cached else usable_by_torch(self.device.name)

    def _cached(self, template_id: str, wanted: dict[str, Any]) -> TemplateMetadata | None:
        check = self.store.check_held(template_id)
        if not check.valid or check.metadata is None:
            log.info("no usable cache: %s", check.message)
            return None
        changed = [key for key, value in wanted.items() if check.metadata.get(key) != value]
        if changed:
            log.info("cache is out of date: %s changed", ", ".join(changed))
        return None if changed else check.metadata

    def _make(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig,
        engine_name: EngineName,
        wanted: dict[str, Any],
        cancel: threading.Event | None,
    ) -> TemplateMetadata:
        """Makes and publishes the template; the caller holds its lock."""
        from musetalk.preprocessing.blend_mask import blend_masks
        from musetalk.preprocessing.following import find_faces
        from musetalk.preprocessing.preview import draw_preview
        from musetalk.preprocessing.source import progress

        start = time.perf_counter()
        clock = StageClock()
        with Pipeline() as pipeline:
            with clock.stage("engine"):
                engine = pipeline.call(
                    lambda: self.engines.engine(engine_name, self.config, self.device.name), "engine"
                )
            log.info("engine %s on %s, %s", engine.name, engine.device, engine.dtype)
            with clock.stage("faces"):
                sources = find_faces(source, settings, engine_name, self.config, self.device.name, cancel)
                covered = _covered_mouth(sources, source)
            with clock.stage("encode"):
                faced = sources.faced
                faces = (sources.face_frame(i) for i in faced)
                encoded = pipeline.overlap(engine.encode(faces), "encode", 2)
                latents = dict(zip(faced, progress(encoded, len(faced), "encode 编码", cancel), strict=True))
            with clock.stage("masks"):
                masks = blend_masks(sources, settings, engine_name, self.config, self.device.name, cancel)
            template = sources.template(latents, masks)
            found = _judged(engine, template, pipeline, clock)
        log.info(
            "box %s, %d frames, %d without a face: %s",
            template.original_bbox,
            len(sources.frames),
            len(sources.frames) - len(faced),
            clock.summary(),
        )
        metadata = {
            **wanted,
            **found,
            "template_id": template_id,
            "template_image_path": str(source),
            "bbox_shift": settings.bbox_shift,
            "bbox_shift_range": list(sources.shifts),
            "parsing_mode": settings.parsing_mode,
            "bbox": list(template.original_bbox),
            "processing_time": round(time.perf_counter() - start, 3),
            "processed_at": template.processed_at,
            "frame_count": len(template),
            "input_latent_shape": list(latents[faced[0]].shape),
            "version": CACHE_VERSION,
            "frame_size": list(template.frame_size),
            "unique_frames": len(sources.frames),
            "faceless_frames": len(sources.frames) - len(faced),
            "turned": 90 * sources.turn,
            "covered_mouth": covered,
            **_own_time(sources.timeline),
            "stages": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        }
        preview = draw_preview(sources, masks)
        return self.store.publish(template_id, template, cast(TemplateMetadata, metadata), preview)

    def load_preprocessed_template(self, template_id: str) -> tuple[dict[str, Any], TemplateMetadata]:
        """The cache's documented dict and its metadata, checked; see `TemplateStore.load`."""
        template, metadata = self.store.load(template_id)
        return template.to_dict(), metadata

    def list_cached_templates(self) -> list[str]:
        """Ids of all templates in the cache folder."""
        return self.store.template_ids()

    def clean_cache(self, template_id: str | None = None) -> int:
        """Removes one template, or all; returns how many were removed."""
        ids = [template_id] if template_id is not None else self.store.template_ids()
        return sum(self.store.clean(name) > 0 for name in ids)

    def get_cache_info(self) -> CacheInfo:
        """The cache folder, its templates and their total size in MB."""
        return self.store.info()


def _covered_mouth(sources: TemplateSource, source: Path) -> float | None:
    """The share of the faces looked at whose mouth is hidden, said where it matters."""
    from musetalk.preprocessing.following import COVERED_SHARE

    share = sources.covered_mouth()
    if share is None:
        return None
    if share >= COVERED_SHARE:
        log.warning(
            "the mouth in %s looks covered (mask, hand, microphone), speech is drawn over it 嘴部似被遮挡",
            source,
        )
    return round(share, 3)


def _own_time(timeline: Timeline | None) -> dict[str, Any]:
    """What the metadata say of a clip's time; each frame's start only where the rate doesn't tell it."""
    if timeline is None:
        return {}
    told: dict[str, Any] = {
        "source_fps": round(float(timeline.fps), 6),
        "source_duration": round(timeline.duration, 6),
        "variable_frame_rate": not timeline.is_even,
    }
    if not timeline.is_even:
        told["frame_times"] = [round(time, 6) for time in timeline.to_dict()["seconds"][:-1]]
    return told


def _judged(engine: Engine, template: Template, pipeline: Pipeline, clock: StageClock) -> dict[str, Any]:
    """What an engine that judges templates has to say of this one."""
    from musetalk.engines.base import TemplateJudge

    if not isinstance(engine, TemplateJudge):
        return {}
    with clock.stage("judge"):
        return pipeline.call(lambda: engine.judge(template), "judge")
