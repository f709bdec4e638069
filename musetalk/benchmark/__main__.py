"""`python -m musetalk.benchmark`: the pipeline around any engine, against the plain way, and how it scales.

The decision a reader would question: stand-in engines skip the face detector, real ones don't. A stand-in
measures what surrounds an engine; a real engine is measured as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from musetalk import cli
from musetalk.benchmark.plain import PlainResult, render_plainly
from musetalk.benchmark.scene import (
    SIZES,
    Scene,
    StandInEngine,
    TemplateKind,
    make_scene,
    make_template,
    parse_stand_in,
    write_source,
    write_speech,
)
from musetalk.config import (
    REPOSITORY,
    Defaults,
    EncodingConfig,
    EngineConfig,
    EngineName,
    ModelPaths,
    Switch,
    parse_fps,
)
from musetalk.device import peak_memory_mb
from musetalk.engines.base import Engine
from musetalk.errors import InputError
from musetalk.file_rendering import InferenceResult
from musetalk.files import atomic_file
from musetalk.inference import UltraFastRealtimeInference
from musetalk.measurement import (
    Measurement,
    Spread,
    frames_per_second,
    hardware,
    measure,
    processor_seconds,
    significant,
)
from musetalk.preprocessing.preprocessor import CACHE_VERSION, EnhancedMuseTalkPreprocessor
from musetalk.templates.store import TemplateMetadata, TemplateStore
from musetalk.templates.template import Template
from musetalk.weights.files import UNET_FILES

TEMPLATE_ID = "benchmark"
LENGTHS = (1, 10, 60, 600, 1800)  # seconds of audio
TEMPLATE_LENGTHS = (1, 10, 50, 200)  # frames
PROOF_SECONDS = 480.0  # of a whole proof run; what is left of the list by then is said and not measured
CACHED_SIZE = (512, 512)  # pixels, of templates whose loading is measured


class StandInInference(UltraFastRealtimeInference):
    """Renders any cached template with a given engine."""

    def __init__(self, cache_dir: Path, engine: Engine, config: EngineConfig, encoding: EncodingConfig):
        super().__init__(cache_dir, config=config, encoding=encoding)
        self.engine = engine

    def engine_for(self, metadata: TemplateMetadata) -> Engine:
        """The given engine, whatever made the template."""
        return self.engine


def open_renderer(
    engine: str, scene: Scene, folder: Path, config: EngineConfig, encoding: EncodingConfig
) -> UltraFastRealtimeInference:
    """A renderer of `scene` with "null", "sleep:MS" or an engine's name; its cache is kept in `folder`."""
    milliseconds = parse_stand_in(engine)
    if milliseconds is not None:
        stand_in = StandInEngine(milliseconds)
        publish(make_template(scene), folder, stand_in.fingerprint)
        return StandInInference(folder, stand_in, config, encoding)
    if engine not in get_args(EngineName):
        raise InputError(f"engine is {engine!r}", "choose null, sleep:8, lite or musetalk")
    preprocessor = EnhancedMuseTalkPreprocessor(folder, config=config)
    preprocessor.preprocess_template(TEMPLATE_ID, write_source(scene, folder))
    return UltraFastRealtimeInference(folder, config=config, encoding=encoding)


def publish(template: Template, folder: Path, fingerprint: str) -> TemplateStore:
    """A store in `folder` with the template in it."""
    store = TemplateStore(folder)
    metadata = {"template_id": TEMPLATE_ID, "engine_fingerprint": fingerprint, "version": CACHE_VERSION}
    with store.lock(TEMPLATE_ID):
        store.publish(TEMPLATE_ID, template, cast(TemplateMetadata, metadata))
    return store


def _size(name: str) -> tuple[int, int]:
    if name not in SIZES:
        raise InputError(f"size is {name!r}", f"choose one of {', '.join(SIZES)}")
    return SIZES[name]


def _config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine's settings; `--networks` names a models folder made by `musetalk.tools.random_weights`."""
    models, folder = ModelPaths(), arguments.networks
    if folder is not None:
        config_path, weights_path = (folder / Path(name).relative_to("models") for name in UNET_FILES["v15"])
        models = ModelPaths("v15", config_path, weights_path, str(folder / "sd-vae"), folder / "whisper")
    name = arguments.engine if arguments.engine in get_args(EngineName) else EngineConfig.engine
    return EngineConfig(
        engine=cast(EngineName, name),
        batch_size=arguments.batch_size,
        vae_region=arguments.vae_region,
        models=models,
    )


def _encoding(arguments: argparse.Namespace) -> EncodingConfig:
    return EncodingConfig(arguments.encoder, arguments.preset, arguments.crf)


def pipeline_command(arguments: argparse.Namespace) -> tuple[cli.Answer, int]:
    """Measures the whole pipeline around one engine."""
    fps = parse_fps(arguments.fps)
    output = _output_folder(arguments) / f"{_title(arguments)}.mp4"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = make_scene(arguments.template, _size(arguments.size))
        audio = write_speech(folder / "speech.wav", arguments.frames, fps)
        renderer = open_renderer(arguments.engine, scene, folder, _config(arguments), _encoding(arguments))
        measurement = renderer.measure(TEMPLATE_ID, audio, output, fps, arguments.runs)
    return {**cli.report(measurement, output), "template": arguments.template, "size": arguments.size}, 0


def _output_folder(arguments: argparse.Namespace) -> Path:
    arguments.output.mkdir(parents=True, exist_ok=True)
    return cast(Path, arguments.output)


def _title(arguments: argparse.Namespace) -> str:
    return f"{arguments.engine.replace(':', '')}_{arguments.template}_{arguments.size}"


def compare_command(arguments: argparse.Namespace) -> tuple[cli.Answer, int]:
    """Runs the same clip through the pipeline and the plain way, turn by turn."""
    fps = parse_fps(arguments.fps)
    arguments.engine = "null" if arguments.networks is None else "musetalk"
    output = _output_folder(arguments) / f"compare_{_title(arguments)}.mp4"
    config, encoding = _config(arguments), _encoding(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = make_scene(arguments.template, _size(arguments.size))
        audio = write_speech(folder / "speech.wav", arguments.frames, fps)
        renderer = open_renderer(arguments.engine, scene, folder, config, encoding)
        template, engine = _plain_engine(renderer, config)
        plain: list[PlainResult] = []

        def render_plain() -> None:
            target, preset = folder / "plain.mp4", arguments.plain_preset
            plain.append(render_plainly(template, engine, audio, target, fps, config.batch_size, preset))

        def render() -> InferenceResult:
            return renderer.ultra_fast_inference(TEMPLATE_ID, audio, output, fps, record=True)

        measurement = measure(render, arguments.runs, render_plain)
    answer = {**cli.report(measurement, output), "template": arguments.template, "size": arguments.size}
    return {**answer, **comparison(measurement, plain), "plain_preset": arguments.plain_preset}, 0


def _plain_engine(renderer: UltraFastRealtimeInference, config: EngineConfig) -> tuple[Template, Engine]:
    """What the plain way renders with: the same stand-in, or the same networks in torch's fp32."""
    import dataclasses

    from musetalk.engines.choice import create_engine

    template = renderer.open(TEMPLATE_ID).template
    if isinstance(renderer, StandInInference):
        return template, renderer.engine
    plain = dataclasses.replace(config, runtime="torch", fp16=False, vae_region="off")
    return template, create_engine("musetalk", plain, renderer.device.name)


def comparison(measurement: Measurement, plain: Sequence[PlainResult]) -> dict[str, Any]:
    """The plain way's figures and how many times faster the pipeline is, by medians."""
    ours = measurement.spread(frames_per_second)
    theirs = Spread.of(result.frames / result.processing_time for result in plain)
    processor = Spread.of(result.cpu_time for result in plain)
    stages = {name: Spread.of(result.stages[name] for result in plain).rounded() for name in plain[0].stages}
    ratios = {
        "frames_per_second": significant(ours.median / theirs.median),
        "cpu_time": significant(processor.median / Spread.of(measurement.cpu_times).median),
        "generate": significant(stages["generate"]["median"] / measurement.stages["generate"].median),
    }
    cli.say(
        f"plain way {theirs.median:.1f} frames/s, pipeline {ours.median:.1f}: "
        f"{ratios['frames_per_second']} times as fast, for 1/{ratios['cpu_time']} of the processor time"
    )
    figures = {"runs": len(plain), "frames_per_second": theirs.rounded(), "cpu_time": processor.rounded()}
    return {"plain": {**figures, "stages": stages}, "ratios": ratios}


def scaling_command(arguments: argparse.Namespace) -> tuple[cli.Answer, int]:
    """Cost per frame against length and resolution, loading against template length: JSON and PNGs."""
    folder = _output_folder(arguments)
    lengths = [seconds for seconds in LENGTHS if seconds <= arguments.longest]
    rows = {
        "length": [_length_row(seconds) for seconds in lengths],
        "resolution": [_resolution_row(kind, name) for kind in get_args(TemplateKind) for name in SIZES],
        "load": [_load_row(frames) for frames in TEMPLATE_LENGTHS],
    }
    answer: cli.Answer = {
        "success": True,
        **rows,
        "charts": [str(chart) for chart in _draw_scaling(rows, folder) if chart is not None],
        "hardware": hardware(),
        "message": f"✅ {folder / 'scaling.json'}",
    }
    with atomic_file(folder / "scaling.json") as stream:
        stream.write(json.dumps(answer, ensure_ascii=False, indent=2).encode())
    return answer, 0


def gpu_command(arguments: argparse.Namespace) -> tuple[cli.Answer, int]:
    """The proof run: full-size random networks on this machine's GPU, in minutes and without a download."""
    from musetalk.benchmark.gpu import ProofRun, table

    answer = ProofRun(arguments.output, arguments.device, arguments.small, arguments.budget).run()
    cli.say(*table(answer))
    return answer, 0


def _draw_scaling(rows: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path | None]:
    from musetalk.measurement_chart import draw_curves

    return [
        draw_curves(
            {
                "wall": [(row["seconds"], row["ms_per_frame"]) for row in rows["length"]],
                "processor": [(row["seconds"], row["processor_ms_per_frame"]) for row in rows["length"]],
            },
            ("Cost per frame against the audio's length, null engine, 512²", "", "ms per frame"),
            folder / "length.png",
            {float(row["seconds"]): f"{row['seconds']} s" for row in rows["length"]},
        ),
        draw_curves(
            {
                f"{kind}, {clock}": [
                    (row["megapixels"], row[key]) for row in rows["resolution"] if row["template"] == kind
                ]
                for kind in get_args(TemplateKind)
                for clock, key in (("wall", "ms_per_frame"), ("processor", "processor_ms_per_frame"))
            },
            ("Cost per frame against resolution, null engine", "", "ms per frame"),
            folder / "resolution.png",
            {width * height / 1e6: name for name, (width, height) in SIZES.items()},
            "log",
        ),
        draw_curves(
            {"512²": [(row["frames"], row["load_ms"]["median"]) for row in rows["load"]]},
            ("Opening a template's cache", "template frames", "ms"),
            folder / "load.png",
            {float(frames): str(frames) for frames in TEMPLATE_LENGTHS},
            "log",
        ),
    ]


def _costs(scene: Scene, frames: int, warm: bool) -> dict[str, float]:
    """What one video of `frames` frames costs with the null engine; wall and processor time."""
    fps = parse_fps(Defaults.fps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio = write_speech(folder / "speech.wav", frames, fps)
        renderer = open_renderer("null", scene, folder, EngineConfig(), EncodingConfig())
        for _ in range(1 + warm):
            before = processor_seconds()
            result = renderer.ultra_fast_inference(TEMPLATE_ID, audio, folder / "out.mp4", fps)
            spent = processor_seconds() - before
    return {
        "frames": result.frames,
        "ms_per_frame": significant(1000 * result.processing_time / result.frames),
        "processor_ms_per_frame": significant(1000 * spent / result.frames),
    }


def _length_row(seconds: int) -> dict[str, float]:
    """Peak memory is the process's so far: lengths are measured from the shortest on."""
    costs = _costs(make_scene("image", SIZES["512"]), int(seconds * Defaults.fps), warm=seconds < 60)
    row = {"seconds": seconds, **costs, "peak_memory_mb": round(peak_memory_mb(), 1)}
    cli.say(f"{seconds:>5} s of audio: {row['ms_per_frame']} ms per frame, {row['peak_memory_mb']} MB")
    return row


def _resolution_row(kind: TemplateKind, size: str) -> dict[str, Any]:
    width, height = SIZES[size]
    frames = max(50, min(500, 400_000_000 // (width * height)))  # start-up must not count at 1080p
    row = {
        "template": kind,
        "size": size,
        "megapixels": width * height / 1e6,
        **_costs(make_scene(kind, (width, height)), frames, warm=True),
    }
    cli.say(f"{kind} {size}: {row['ms_per_frame']} ms per frame")
    return row


def _load_row(frames: int) -> dict[str, Any]:
    """Milliseconds to load a video template of `frames` frames, of five tries."""
    scene = make_scene("video", CACHED_SIZE)
    repeated = [scene.frames[i % len(scene.frames)].copy() for i in range(frames)]
    template = make_template(Scene(repeated, [scene.bboxes[i % len(scene.bboxes)] for i in range(frames)]))
    times = []
    with tempfile.TemporaryDirectory() as name:
        store = publish(template, Path(name), StandInEngine.fingerprint)
        for _ in range(5):
            start = time.perf_counter()
            store.load(TEMPLATE_ID)
            times.append(1000 * (time.perf_counter() - start))
        size = store.size(TEMPLATE_ID)
    load_ms, cache_mb = Spread.of(times).rounded(), round(size / (1 << 20), 1)
    cli.say(f"{frames} template frames: {cache_mb} MB loaded in {load_ms['median']} ms")
    return {"frames": frames, "cache_mb": cache_mb, "load_ms": load_ms}


def _add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", choices=get_args(TemplateKind), default="image")
    parser.add_argument("--size", default="512", help=f"{', '.join(SIZES)} (default %(default)s)")
    parser.add_argument("--frames", type=int, default=500, help="(default %(default)s)")
    parser.add_argument("--fps", default=str(Defaults.fps))
    parser.add_argument("--runs", type=int, default=5, help="after a warm-up (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=EngineConfig.batch_size)
    parser.add_argument("--networks", type=Path, help="a models folder, see musetalk.tools.random_weights")
    parser.add_argument("--vae_region", default=EngineConfig.vae_region, choices=get_args(Switch))
    parser.add_argument("--encoder", default=EncodingConfig.encoder)
    parser.add_argument("--preset", default=EncodingConfig.preset)
    parser.add_argument("--crf", type=int, default=EncodingConfig.crf)


def benchmark_main(argv: Sequence[str]) -> tuple[cli.Command, argparse.Namespace]:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(prog="python -m musetalk.benchmark", description="Measure 性能测试")
    commands = parser.add_subparsers(required=True)
    pipeline = commands.add_parser("pipeline", help=pipeline_command.__doc__)
    pipeline.add_argument("--engine", default="null", help="null, sleep:MS, lite or musetalk")
    compare = commands.add_parser("compare", help=compare_command.__doc__)
    compare.add_argument("--plain_preset", default="medium", help="x264's, of the plain way")
    scaling = commands.add_parser("scaling", help=scaling_command.__doc__)
    scaling.add_argument("--longest", type=int, default=LENGTHS[-1], help="seconds of audio")
    gpu = commands.add_parser("gpu", help=gpu_command.__doc__)
    gpu.add_argument("--device", default=EngineConfig.device, help="auto, cpu, cuda:0 (default %(default)s)")
    gpu.add_argument("--small", action="store_true", help="tiny networks, to see that everything works")
    gpu.add_argument("--budget", type=float, default=PROOF_SECONDS, help="seconds (default %(default)s)")
    for command, function in (
        (pipeline, pipeline_command),
        (compare, compare_command),
        (scaling, scaling_command),
        (gpu, gpu_command),
    ):
        command.add_argument("--output", "--out", type=Path, default=REPOSITORY / "output" / "benchmark")
        command.set_defaults(command=function, template_id=TEMPLATE_ID, verbose=False)
    _add_clip(pipeline)
    _add_clip(compare)
    arguments = parser.parse_args(argv)
    return arguments.command, arguments


if __name__ == "__main__":
    cli.run(benchmark_main)
