"""Speech onto cached templates: engines and open templates stay between requests and are shared."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from musetalk.config import SOURCE_FPS, Defaults, EncodingConfig, EngineConfig, output_fps, parse_articulation
from musetalk.device import Device, resolve_device
from musetalk.engines.choice import choose_engine
from musetalk.engines.registry import EngineRegistry
from musetalk.file_rendering import Files, InferenceResult, render_file
from musetalk.open_templates import OpenTemplates
from musetalk.pipeline import Pipeline, StageClock
from musetalk.rendering import Conduct, OpenedTemplate, Request
from musetalk.templates.store import TemplateMetadata, TemplateStore

if TYPE_CHECKING:
    from musetalk.engines.base import Engine
    from musetalk.measurement import BenchmarkAnswer, Measurement

log = logging.getLogger(__name__)


class UltraFastRealtimeInference:
    """Renders speech onto cached templates; keeps engines loaded and templates open between calls.

    Args:
        cache_dir: the folder of template caches.
        device: "auto", "cpu", "cuda:0"; a missing GPU falls back to the CPU. None: as in `config`.
        config: engine and model settings.
        encoding: shape of the output file.
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
        engines: EngineRegistry | None = None,
        templates: OpenTemplates | None = None,
    ) -> None:
        self.store = TemplateStore(cache_dir)
        self.config = config or EngineConfig()
        self.encoding = encoding or EncodingConfig()
        self.device = resolve_device(device or self.config.device, strict=self.config.strict_device)
        self.engines = engines or EngineRegistry()
        self.templates = templates or OpenTemplates()

    def ultra_fast_inference(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str | Fraction = Defaults.fps,
        *,
        frames_dir: str | Path | None = None,
        articulation: float = Defaults.articulation,
        record: bool = False,
        conduct: Conduct | None = None,
    ) -> InferenceResult:
        """Renders `audio_path` onto a template into `output_path`.

        Args:
            fps: frames per second; any real number, NTSC rates exact; "source" is the template's own.
            frames_dir: also write each blended frame there, losslessly, as 00000000.png and so on.
            articulation: how far the mouth moves, 0.5 to 1.5; the lite engine's alone.
            record: keep each stage's intervals in the result.
            conduct: who watches and steers; by default a progress bar on a terminal.

        Raises:
            InputError: audio, fps or articulation can't be used.
            CacheError: the template's cache is missing, damaged or made by another engine.
            WeightsError, EngineError: the engine can't run.
            OutputError: the output can't be written.
        """
        from musetalk.media.audio import probe_audio
        from musetalk.media.video import check_output_path

        clock = StageClock(record=record)
        rate, articulation = self._rate(template_id, fps), parse_articulation(articulation)
        # bad audio is refused before the networks are loaded; a warm renderer meets it soon enough
        conduct = conduct or Conduct()
        watched = conduct.progress is not None or (conduct.bar and sys.stderr.isatty())
        asked = watched or not self.templates.templates()
        audio_duration = probe_audio(Path(audio_path)).duration if asked else None
        source = self.store.read_metadata(template_id).get("template_image_path", "")
        output = check_output_path(Path(output_path), inputs=[Path(audio_path), Path(str(source))])
        with clock.stage("load"), Pipeline() as pipeline:
            opened = pipeline.call(lambda: self.open(template_id), "load")
        engine = opened.engine
        log.info(
            "engine %s on %s, %s, batch %d", engine.name, engine.device, engine.dtype, self.config.batch_size
        )
        expected = None if audio_duration is None else int(audio_duration * rate)
        files = Files(Path(audio_path), output, Path(frames_dir) if frames_dir else None)
        generate = conduct.generate(opened) if conduct.generate is not None else None
        request = Request(
            rate,
            self.config.batch_size,
            articulation=articulation,
            generate=generate,
            cancel=conduct.cancel,
        )
        info, first_frame = render_file(opened, files, request, self.encoding, clock, expected, conduct)
        frames = info.position.frames
        log.info("%d frames at %s per second into %s: %s", frames, rate, output, clock.summary())
        return InferenceResult(
            template_id=template_id,
            audio_path=str(audio_path),
            output_path=str(output_path),
            fps=rate,
            frames=frames,
            duration=float(frames / rate),
            processing_time=time.perf_counter() - clock.started,
            time_to_first_frame=first_frame,
            stages=dict(clock.seconds),
            intervals=clock.intervals,
            engine=engine.name,
            device=Device(engine.device, self.device.requested),
            dtype=engine.dtype,
            vae_decoder=self.config.vae_decoder if engine.name == "musetalk" else None,
        )

    def _rate(self, template_id: str, fps: float | str | Fraction) -> Fraction:
        own = self.store.read_metadata(template_id).get("source_fps") if fps == SOURCE_FPS else None
        return output_fps(fps, own)

    def measure(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str | Fraction = Defaults.fps,
        runs: int = Defaults.benchmark_runs,
    ) -> Measurement:
        """`ultra_fast_inference` once to warm up, then `runs` times; raises what it raises.

        Raises:
            InputError: `runs` is below 1.
        """
        from musetalk.measurement import measure

        return measure(
            lambda: self.ultra_fast_inference(template_id, audio_path, output_path, fps, record=True), runs
        )

    def benchmark_performance(
        self, template_id: str, audio_path: str | Path, runs: int = Defaults.benchmark_runs
    ) -> BenchmarkAnswer:
        """What rendering `audio_path` costs, the video thrown away; see `measure`."""
        with tempfile.TemporaryDirectory() as folder:
            return self.measure(template_id, audio_path, Path(folder) / "benchmark.mp4", runs=runs).answer()

    def open(self, template_id: str) -> OpenedTemplate:
        """The template, ready to render; loaded again only when its cache has changed.

        Raises:
            CacheError: its cache is missing, damaged or made by another engine.
            WeightsError, EngineError: its engine can't run.
        """
        return self.templates.open(self.store, template_id, self.engine_for)

    def engine_for(self, metadata: TemplateMetadata) -> Engine:
        """The engine that a template's metadata and the configuration ask for."""
        name = choose_engine(self.config, template_engine=metadata.get("engine", "musetalk"))
        return self.engines.engine(name, self.config, self.device.name)
