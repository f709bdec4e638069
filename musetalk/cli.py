"""The three commands: flags in, one JSON object on stdout, everything else on stderr.

The decision a reader would question: while a command runs, the process's stdout descriptor points at
stderr, so that no library, not even a native one, can print into the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn, get_args

from musetalk.config import (
    MAX_ARTICULATION,
    MEDIAPIPE_PACKAGE,
    MIN_ARTICULATION,
    REPOSITORY,
    Defaults,
    EncodingConfig,
    EngineConfig,
    EngineRequest,
    FaceDetectorRequest,
    FaceParserRequest,
    ModelPaths,
    PreprocessingConfig,
    RuntimeRequest,
    ServerConfig,
    SoundCodec,
    Switch,
    VaeDecoder,
)
from musetalk.errors import EngineError, InterruptedRun, MuseTalkError, UsageError
from musetalk.native_messages import NativeMessages
from musetalk.service import IntegratedMuseTalkService
from musetalk.templates.store import check_template_id

if TYPE_CHECKING:
    from musetalk.measurement import Measurement

Answer = dict[str, Any]
Command = Callable[[argparse.Namespace], tuple[Answer, int]]

log = logging.getLogger("musetalk")
SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
REACTION = 0.5  # seconds that the main thread has to notice a signal
CLEANUP = 10.0  # seconds that it has from there to its answer


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints become the documented failure."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", f"see python {self.prog} --help")


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request 请求")
    group.add_argument("--template_id", help="the template's name 模板ID")
    group.add_argument("--template_image_path", "--template_image", help="image, video or folder of images")
    group.add_argument("--force_refresh", action="store_true", help="make the cache again")
    group.add_argument("--audio_path", help="any file with sound 音频文件")
    group.add_argument("--output_path", help=f"the video (default {Defaults.output_path})")
    group.add_argument("--frames_dir", help="also write each frame there as PNG")
    group.add_argument(
        "--worker",
        default="auto",
        metavar="auto|off|HOST:PORT",
        help="let a resident worker (--serve) do it: one that would do the same (default), none, or this one",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("common")
    group.add_argument(
        "--cache_dir",
        default=os.environ.get("MUSE_TEMPLATE_CACHE_DIR") or Defaults.cache_dir,
        help="template caches, or MUSE_TEMPLATE_CACHE_DIR (default %(default)s)",
    )
    group.add_argument(
        "--device", default=EngineConfig.device, help="auto, cpu, cuda:0 (default %(default)s)"
    )
    group.add_argument("--strict_device", action="store_true", help="a missing device is an error")
    group.add_argument(
        "--batch_size", type=int, default=EngineConfig.batch_size, help="(default %(default)s)"
    )
    group.add_argument(
        "--fp16", action="store_true", default=EngineConfig.fp16, help="half precision (default)"
    )
    group.add_argument("--no_fp16", dest="fp16", action="store_false", help="single precision")
    group.add_argument("--engine", default=EngineConfig.engine, choices=get_args(EngineRequest))
    group.add_argument("--verbose", action="store_true", help="stage timings and every decision taken")


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    defaults = PreprocessingConfig
    group = parser.add_argument_group("preprocess 预处理")
    group.add_argument(
        "--bbox_shift", type=int, default=defaults.bbox_shift, help="moves the face box, pixels"
    )
    group.add_argument("--parsing_mode", default=defaults.parsing_mode, help="jaw, neck or raw")
    group.add_argument(
        "--extra_margin", type=int, default=defaults.extra_margin, help="pixels below the chin"
    )
    group.add_argument("--left_cheek_width", type=int, default=defaults.left_cheek_width)
    group.add_argument("--right_cheek_width", type=int, default=defaults.right_cheek_width)
    group.add_argument(
        "--face_detector", default=defaults.face_detector, choices=get_args(FaceDetectorRequest)
    )
    group.add_argument("--face_parser", default=defaults.face_parser, choices=get_args(FaceParserRequest))
    group.add_argument(
        "--max_side",
        type=int,
        default=defaults.max_side,
        help="larger frames are shrunk (default %(default)s)",
    )
    group.add_argument(
        "--start", type=float, default=defaults.start, help="seconds of a clip to leave out first"
    )
    group.add_argument("--seconds", type=float, default=defaults.seconds, help="of a clip to take")
    group.add_argument(
        "--background", default=defaults.background, help="behind transparency: #rrggbb or a picture"
    )
    group.add_argument("--idle_motion", action="store_true", help="blinks and sway for a single image")


def _add_inference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inference 推理")
    group.add_argument(
        "--fps", default=str(Defaults.fps), help="frames per second, or source (default %(default)s)"
    )
    group.add_argument(
        "--articulation",
        type=float,
        default=Defaults.articulation,
        help=f"how far the mouth moves, {MIN_ARTICULATION} to {MAX_ARTICULATION}, lite alone "
        "(default %(default)s)",
    )
    group.add_argument(
        "--encoder", default=EncodingConfig.encoder, help="video encoder (default %(default)s)"
    )
    group.add_argument("--preset", default=EncodingConfig.preset, help="encoder preset (default %(default)s)")
    group.add_argument(
        "--crf", type=int, default=EncodingConfig.crf, help="quality, 0 best (default %(default)s)"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models 模型")
    group.add_argument("--version", default=ModelPaths.version, help="v1 or v15 (default %(default)s)")
    group.add_argument("--unet_config", type=Path)
    group.add_argument("--unet_model_path", type=Path)
    group.add_argument("--vae_type", default=ModelPaths.vae_type, help="a name under models/ or a folder")
    group.add_argument("--whisper_dir", type=Path)
    group.add_argument("--taesd_dir", type=Path, help="TAESD's folder, for --vae_decoder tiny")
    group.add_argument("--runtime", default=EngineConfig.runtime, choices=get_args(RuntimeRequest))
    group.add_argument("--vae_region", default=EngineConfig.vae_region, choices=get_args(Switch))
    group.add_argument(
        "--vae_decoder",
        default=EngineConfig.vae_decoder,
        choices=get_args(VaeDecoder),
        help="tiny: TAESD's, far less work, softer faces (default %(default)s)",
    )
    group.add_argument("--compile", action="store_true", help="compile the networks (CUDA)")


def settings_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A command line with the settings that all programs share; `service_of` reads them."""
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    for add in (_add_common, _add_preprocessing, _add_inference, _add_models):
        add(parser)
    return parser


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = settings_parser(program, description)
    _add_request(parser)
    return parser


def service_of(arguments: argparse.Namespace) -> IntegratedMuseTalkService:
    """The service that a command line of `settings_parser` asks for."""
    models = ModelPaths(
        arguments.version,
        arguments.unet_config,
        arguments.unet_model_path,
        arguments.vae_type,
        arguments.whisper_dir,
        arguments.taesd_dir,
    )
    config = EngineConfig(
        engine=arguments.engine,
        device=arguments.device,
        strict_device=arguments.strict_device,
        fp16=arguments.fp16,
        batch_size=arguments.batch_size,
        runtime=arguments.runtime,
        vae_region=arguments.vae_region,
        vae_decoder=arguments.vae_decoder,
        compile=arguments.compile,
        models=models,
    )
    settings = PreprocessingConfig(
        bbox_shift=arguments.bbox_shift,
        parsing_mode=arguments.parsing_mode,
        extra_margin=arguments.extra_margin,
        left_cheek_width=arguments.left_cheek_width,
        right_cheek_width=arguments.right_cheek_width,
        face_detector=arguments.face_detector,
        face_parser=arguments.face_parser,
        idle_motion=arguments.idle_motion,
        max_side=arguments.max_side,
        start=arguments.start,
        seconds=arguments.seconds,
        background=arguments.background,
    )
    encoding = EncodingConfig(arguments.encoder, arguments.preset, arguments.crf)
    return IntegratedMuseTalkService(arguments.cache_dir, config=config, encoding=encoding, settings=settings)


def _require(arguments: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name}" for name in names if not getattr(arguments, name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} missing 缺少参数", "see --help")


def preprocess_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Makes a template cache of a picture, a clip or a folder of pictures."""
    _require(arguments, "template_id", "template_image_path")
    service = service_of(arguments)
    done = _by_worker(service, arguments, "preprocess")
    if done is not None:
        return done, 0
    answer = service.preprocess_template(
        arguments.template_id, arguments.template_image_path, force_refresh=arguments.force_refresh
    )
    if getattr(arguments, "output_state", None):
        service.store.export(arguments.template_id, Path(arguments.output_state))
    return dict(answer), 0


def inference_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Renders speech onto a template."""
    _require(arguments, "template_id", "audio_path")
    service = service_of(arguments)
    check_template_id(arguments.template_id)
    done = _by_worker(service, arguments, "inference")
    if done is not None:
        return done, 0
    if getattr(arguments, "template_dir", None):
        service.preprocess_if_missing(arguments.template_id, Path(arguments.template_dir))
    output = arguments.output_path or Defaults.output_path.format(template_id=arguments.template_id)
    if getattr(arguments, "benchmark", False):
        return _measure(service, arguments, Path(output)), 0
    answer = service.realtime_inference(
        arguments.template_id,
        arguments.audio_path,
        output,
        arguments.fps,
        arguments.frames_dir,
        arguments.articulation,
    )
    return dict(answer), 0


def _by_worker(
    service: IntegratedMuseTalkService, arguments: argparse.Namespace, command: str
) -> Answer | None:
    """The answer of a resident worker that does the command's work; None when it is to be done here."""
    if arguments.verbose or getattr(arguments, "benchmark", False):  # of what happens in this process
        return None
    from musetalk.worker_client import WorkerLostError, find_worker, run_on_worker

    address = find_worker(arguments.worker, service.store.cache_dir, service.config)
    if address is None:
        return None
    request, paths = _worker_request(service, arguments)
    try:
        answer = run_on_worker(address, command, request, paths)
    except WorkerLostError as e:
        say(f"the resident worker can't do it, it is done here 常驻服务不可用，改为本地执行: {e}")
        return None
    return {**answer, "requested_device": service.config.device}


def _worker_request(
    service: IntegratedMuseTalkService, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the worker is asked, its paths absolute, and each of those as the person wrote it."""
    written = {
        "template_image_path": arguments.template_image_path,
        "audio_path": arguments.audio_path,
        "output_path": arguments.output_path
        or Defaults.output_path.format(template_id=arguments.template_id),
        "frames_dir": arguments.frames_dir,
        "template_dir": getattr(arguments, "template_dir", None),
        "output_state": getattr(arguments, "output_state", None),
    }
    absolute = {name: str(Path(path).absolute()) for name, path in written.items() if path}
    paths = {absolute[name]: str(written[name]) for name in absolute}
    paths[str(service.store.cache_dir.absolute())] = str(service.store.cache_dir)
    request = {
        "template_id": arguments.template_id,
        "settings": dataclasses.asdict(service.settings),
        "encoding": dataclasses.asdict(service.encoding),
        "force_refresh": arguments.force_refresh,
        "fps": arguments.fps,
        "articulation": arguments.articulation,
        "batch_size": arguments.batch_size,
        **absolute,
    }
    return request, dict(sorted(paths.items(), key=lambda item: -len(item[0])))


def _measure(service: IntegratedMuseTalkService, arguments: argparse.Namespace, output: Path) -> Answer:
    if arguments.frames_dir:
        raise UsageError("--frames_dir doesn't go with --benchmark", "leave one of them away")
    measurement = service.measure(
        arguments.template_id, arguments.audio_path, output, arguments.fps, arguments.benchmark_runs
    )
    return report(measurement, output)


def report(measurement: Measurement, output: Path) -> Answer:
    """The table on stderr, the chart of stages beside `output`, the rest as the answer."""
    from musetalk.measurement_chart import draw_stages

    say(*measurement.table())
    result = measurement.typical
    title = f"{result.frames} frames in {result.processing_time:.2f} s, engine {result.engine}"
    chart = draw_stages(result.intervals, title, output.with_name(f"{output.stem}.stages.png"))
    return {**measurement.answer(), "chart_path": None if chart is None else str(chart)}


def check_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Checks one template, or lists all of them when no `--template_id` is given."""
    service = service_of(arguments)
    if arguments.template_id:
        answer: Answer = dict(service.check_template_cache(arguments.template_id))
        if not answer["valid"]:
            answer.update(
                error_code="cache_invalid" if answer["exists"] else "cache_missing", error=answer["message"]
            )
            say(answer["message"], answer.get("hint", ""))
        return answer, 0 if answer["valid"] else 6
    templates = service.list_template_caches()
    for line in _table(templates):
        say(line)
    return {
        "success": True,
        "cache_dir": str(service.store.cache_dir),
        "templates": templates,
        "message": f"{len(templates)} templates in {service.store.cache_dir}",
    }, 0


def _table(templates: Sequence[Any]) -> list[str]:
    rows = [("template 模板", "engine", "frames", "size", "MB", "state")]
    for answer in templates:
        metadata = answer["metadata"] or {}
        size = metadata.get("frame_size")
        rows.append(
            (
                answer["template_id"],
                str(metadata.get("engine", "-")),
                str(metadata.get("frame_count", "-")),
                "x".join(map(str, size)) if isinstance(size, list) else "-",
                f"{answer['cache_size_mb']:.1f}",
                "valid" if answer["valid"] else answer["message"],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def info_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Describes the service."""
    return service_of(arguments).get_service_info(), 0


def serve_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Stays and serves callers over HTTP and TCP until it is asked to stop."""
    try:
        from musetalk.server.serve import serve
        from musetalk.server.worker import Worker
    except ModuleNotFoundError as e:
        raise EngineError(
            f"the resident worker needs the package {e.name} 缺少Python包", "run make install"
        ) from e
    service = service_of(arguments)
    worker = Worker(
        service.store.cache_dir.absolute(),  # answers name it, to callers who work elsewhere
        service.config,
        _server_config(arguments),
        tuple(arguments.devices.split(",")) if arguments.devices else (service.config.device,),
        settings=service.settings,
        encoding=service.encoding,
        memory_limit=arguments.memory_limit,
    )
    return serve(worker, say), 0


def _server_config(arguments: argparse.Namespace) -> ServerConfig:
    defaults = ServerConfig()
    server = ServerConfig(
        host=arguments.host,
        http_port=arguments.http_port,
        tcp_port=arguments.port,
        videos_dir=Path(
            arguments.videos_dir or os.environ.get("MUSE_VIDEOS_DIR") or defaults.videos_dir
        ).absolute(),
        temp_dir=Path(os.environ.get("MUSE_TEMP_DIR") or defaults.temp_dir).absolute(),
        preload=tuple(name for name in (arguments.preload or "").split(",") if name),
        max_sessions=arguments.max_sessions,
        grace=arguments.grace,
        keep=arguments.keep,
        job_deadline=arguments.job_deadline,
        token=arguments.token or os.environ.get("MUSETALK_TOKEN", ""),
        trust=tuple(arguments.trust or ()),
        allow_dirs=tuple(Path(folder) for folder in arguments.allow_dir or ()),
        segment_sound=arguments.segment_sound,
        client_connections=arguments.client_connections,
        client_uploads=arguments.client_uploads,
        client_jobs=arguments.client_jobs,
        client_sessions=arguments.client_sessions,
    )
    from musetalk.server.gate import is_loopback

    if not is_loopback(server.host) and not (server.token or server.trust):
        raise UsageError(
            f"--host {server.host} is open to others: a --token is needed 需要令牌",
            "set --token or MUSETALK_TOKEN, or allow networks with --trust CIDR",
        )
    return server


def _add_server(parser: argparse.ArgumentParser) -> None:
    defaults = ServerConfig()
    group = parser.add_argument_group("serve 常驻服务")
    group.add_argument("--host", default=defaults.host, help="address to listen on (default %(default)s)")
    group.add_argument("--http_port", type=int, default=defaults.http_port, help="(default %(default)s)")
    group.add_argument(
        "--port", type=int, default=defaults.tcp_port, help="TCP by lines (default %(default)s)"
    )
    group.add_argument("--devices", help="cuda:0,cuda:1 say; by default --device")
    group.add_argument("--videos_dir", help=f"finished videos (default {defaults.videos_dir})")
    group.add_argument("--preload", metavar="ID,ID", help="templates to open before the worker is ready")
    group.add_argument(
        "--memory_limit",
        type=int,
        default=Defaults.memory_limit,
        help="bytes of open templates (default %(default)s)",
    )
    group.add_argument("--max_sessions", type=int, help="instead of what a test at the start says")
    group.add_argument(
        "--grace",
        type=float,
        default=defaults.grace,
        help="seconds that running work has to end in (default %(default)g)",
    )
    group.add_argument(
        "--keep",
        type=float,
        default=defaults.keep,
        help="hours that finished jobs are kept (default %(default)g)",
    )
    group.add_argument(
        "--job_deadline",
        type=float,
        default=defaults.job_deadline,
        help="seconds that a job may take (default %(default)g)",
    )
    group.add_argument("--token", help="what callers from elsewhere must show; or MUSETALK_TOKEN")
    group.add_argument("--trust", action="append", metavar="CIDR", help="network that needs no token")
    group.add_argument("--allow_dir", action="append", metavar="DIR", help="folder that callers may name")
    for name in ("client_connections", "client_uploads", "client_jobs", "client_sessions"):
        group.add_argument(
            f"--{name}",
            type=int,
            default=getattr(defaults, name),
            help=f"{name.removeprefix('client_')} of one address at once "
            f"(default {getattr(defaults, name) or 'any number'})",
        )
    group.add_argument(
        "--segment_sound",
        choices=get_args(SoundCodec),
        default=defaults.segment_sound,
        help="in sessions' segments (default %(default)s: every sample as it was sent)",
    )


def preprocessing_main(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command line of enhanced_musetalk_preprocessing.py."""
    parser = _parser("enhanced_musetalk_preprocessing.py", "Make a template cache 预处理模板")
    parser.add_argument("--output_state", help="also write a copy of the .pkl here")
    return preprocess_command, parser.parse_args(argv)


def inference_main(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command line of ultra_fast_realtime_inference.py."""
    parser = _parser("ultra_fast_realtime_inference.py", "Render speech onto a template 生成视频")
    parser.add_argument("--template_dir", help="preprocess TEMPLATE_DIR/TEMPLATE_ID.jpg|png|… when needed")
    parser.add_argument("--benchmark", action="store_true", help="measure instead of rendering once")
    parser.add_argument("--benchmark_runs", type=int, default=Defaults.benchmark_runs)
    return inference_command, parser.parse_args(argv)


def service_main(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command line of integrated_musetalk_service.py."""
    parser = _parser("integrated_musetalk_service.py", "Enhanced MuseTalk: portrait + speech → video")
    commands = {
        "preprocess": preprocess_command,
        "inference": inference_command,
        "check_cache": check_command,
        "service_info": info_command,
        "serve": serve_command,
    }
    _add_server(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    for name, command in commands.items():
        group.add_argument(
            f"--{name}", action="store_const", const=command, dest="command", help=command.__doc__
        )
    arguments = parser.parse_args(argv)
    return arguments.command, arguments


def say(*lines: str) -> None:
    """Lines for a person, on stderr; empty ones are left out."""
    with contextlib.suppress(OSError):  # nobody reads them any more; the answer and the exit code remain
        for line in lines:
            if line:
                sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _failure(code: str, message: str, hint: str, template_id: str | None) -> Answer:
    return {
        "success": False,
        "error_code": code,
        "error": message,
        "message": message,
        "hint": hint,
        "template_id": template_id,
    }


def interrupted(exit_code: int, template_id: str | None) -> tuple[Answer, int]:
    """The answer to Ctrl-C or a request to end."""
    message, hint = "interrupted 已中断", "run the command again 请重新运行"
    say(message)
    return _failure("interrupted", message, hint, template_id), exit_code


def execute(
    main: Callable[[Sequence[str]], tuple[Command, argparse.Namespace]],
    argv: Sequence[str],
    ending: Ending | None = None,
) -> tuple[Answer, int]:
    """Runs one command line; every failure becomes its documented answer and exit code.

    Args:
        main: parses the command line.
        argv: the command line, without the program.
        ending: is told whose template it is about.
    """
    template_id = None
    try:
        command, arguments = main(argv)
        template_id = getattr(arguments, "template_id", None)
        if ending is not None:
            ending.template_id = template_id
        configure_logging(arguments.verbose)
        return command(arguments)
    except InterruptedRun as e:
        return interrupted(e.exit_code, template_id)
    except MuseTalkError as e:
        log.debug("raised here", exc_info=True)
        say(e.message, e.hint)
        return _failure(e.error_code, e.message, e.hint, template_id), e.exit_code
    except ModuleNotFoundError as e:
        log.debug("raised here", exc_info=True)
        message = f"the Python package {e.name} is not installed 缺少Python包"
        hint = _install_hint()
        say(message, hint)
        return _failure(EngineError.error_code, message, hint, template_id), EngineError.exit_code
    except Exception as e:  # noqa: BLE001 - the last line of defence: a defect becomes an answer too
        say(traceback.format_exc())
        message = f"internal error 内部错误: {type(e).__name__}: {e}"
        hint = "please report this with the lines above 请附上以上日志反馈"
        say(message, hint)
        return _failure("internal", message, hint, template_id), 1


def _install_hint() -> str:
    requirements = REPOSITORY / "requirements-lite.txt"
    install = f'"{sys.executable}" -m pip install'
    packages = "install the wheel again with its dependencies 请重新安装依赖,"
    if requirements.is_file():
        packages = (
            f'use the Python of `make install` (.venv), or run 请安装依赖: {install} -r "{requirements}"'
        )
    return f"{packages} and then {install} --no-deps {MEDIAPIPE_PACKAGE}"


def configure_logging(verbose: bool) -> None:
    """Sends the package's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)


def _ignore_signals() -> None:
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Ending:
    """The one answer that ends the process, from the main thread or, where that can't, without it.

    Python tells the main thread of a signal between two of its own steps. While a library loads or computes
    there is none for a long time, so a second thread hears of it from the system, waits a little and then
    answers in the main thread's place. What isn't cleaned up by then the next run sweeps.

    Args:
        stdout: where the answer goes.
        native: what native code writes to stderr, to be passed on before the end.
    """

    def __init__(self, stdout: IO[bytes], native: NativeMessages | None = None) -> None:
        self.template_id: str | None = None
        self._stdout = stdout
        self._native = native
        self._noticed = threading.Event()
        self._answering = threading.Lock()

    def watch(self) -> None:
        """Takes the signals that end a command; from the main thread."""
        self._signals, wakeup = os.pipe()
        if os.name != "nt":
            os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._interrupt)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        self._noticed.set()
        _ignore_signals()
        raise InterruptedRun(_interrupted_code(number))

    def _listen(self) -> None:
        number = os.read(self._signals, 1)[0]
        while signal.getsignal(number) not in (self._interrupt, signal.SIG_IGN):
            number = os.read(self._signals, 1)[0]  # somebody else's by now: a server's, that drains
        if self._noticed.wait(REACTION):
            time.sleep(CLEANUP)
        self.answer(*interrupted(_interrupted_code(number), self.template_id))

    def answer(self, answer: Answer, code: int) -> NoReturn:
        """Writes the answer and ends the process; whoever comes second waits for that."""
        self._answering.acquire()
        with contextlib.suppress(OSError):  # nobody reads it any more; the exit code remains
            text = json.dumps(answer, ensure_ascii=False, indent=2)
            self._stdout.write(text.encode("utf-8", "backslashreplace") + b"\n")
            self._stdout.flush()
        say()
        if self._native is not None:
            self._native.close()
        # Threads inside native calls must not hold back the exit; everything of ours is closed by now.
        os._exit(code)


def _interrupted_code(number: int) -> int:
    return 128 + (number if number in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM)


def _open_closed_streams() -> None:
    """Puts the null device where a caller closed a standard stream, before another file takes its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def run(main: Callable[[Sequence[str]], tuple[Command, argparse.Namespace]]) -> NoReturn:
    """Runs a script's command line and ends the process: JSON on stdout, the rest on stderr."""
    _open_closed_streams()
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    ending = Ending(os.fdopen(os.dup(1), "wb"), NativeMessages())
    if {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        os.dup2(sys.stderr.fileno(), 1)
    ending.watch()
    answer, code = execute(main, sys.argv[1:], ending)
    _ignore_signals()
    ending.answer(answer, code)
