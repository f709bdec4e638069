"""Which engine runs: asked and answered without importing one.

The decision a reader would question: a weight path that the caller named and that is missing is an error
even when `auto` could run `lite`, because a silent fallback would hide the wrong path for months.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from musetalk import config
from musetalk.config import EngineConfig, EngineName, ModelPaths
from musetalk.device import usable_by_torch
from musetalk.errors import CacheError, EngineError
from musetalk.weights import files

if TYPE_CHECKING:
    from musetalk.engines.base import Engine

MUSETALK_PACKAGES = ("torch", "safetensors")
LITE_PACKAGES = ("numpy", "cv2", "PIL", "onnxruntime", "soxr", "ffmpeg", "filelock", "mediapipe")
log = logging.getLogger(__name__)

INSTALL_COMMAND = "make install-full"


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine could run here.

    Attributes:
        name: the engine.
        available: whether its packages and weight files are there.
        reason: what is missing, in one line; empty when available.
    """

    name: EngineName
    available: bool
    reason: str


def _missing_packages(names: Iterable[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _lite_status() -> EngineStatus:
    packages = _missing_packages(LITE_PACKAGES)
    return EngineStatus("lite", not packages, _not_installed(packages) if packages else "")


def _not_installed(packages: Iterable[str]) -> str:
    return f"not installed 未安装: {', '.join(packages)}"


def _musetalk_status(models: ModelPaths) -> EngineStatus:
    packages = _missing_packages(MUSETALK_PACKAGES)
    missing = files.missing_files(models)
    if missing:
        return EngineStatus("musetalk", False, f"no weights 缺少权重: {', '.join(map(str, missing))}")
    if packages:
        return EngineStatus("musetalk", False, _not_installed(packages))
    return EngineStatus("musetalk", True, "")


def available_engines(models: ModelPaths | None = None) -> list[EngineStatus]:
    """Every engine of the toolkit and whether it could run here."""
    return [_musetalk_status(models or ModelPaths()), _lite_status()]


def choose_engine(engine_config: EngineConfig, template_engine: str | None = None) -> EngineName:
    """The engine to run; when `auto` can't take MuseTalk, one warning says why.

    Args:
        engine_config: what the caller asks for.
        template_engine: the engine that made the template's cache; None when there is none yet.

    Raises:
        WeightsError: MuseTalk's files are missing and the request, the cache or a named path needs them.
        EngineError: MuseTalk's packages are missing and the request or the cache needs them.
        CacheError: the cache was made by another engine than the one asked for.
    """
    request = engine_config.engine
    if template_engine not in (None, "lite", "musetalk"):
        raise CacheError(
            f"the template cache was made by engine {template_engine!r}, which is unknown",
            "run preprocessing again 请重新运行预处理",
        )
    if request != "auto" and template_engine not in (None, request):
        raise CacheError(
            f"the template cache was made by engine {template_engine}, not {request} 缓存由另一引擎生成",
            f"use --engine {template_engine}, or preprocess again with --engine {request} --force_refresh",
        )
    if request != "lite":
        named = files.missing_named_files(engine_config.models)
        if named:
            raise files.missing_weights_error(named)
    if "musetalk" in (request, template_engine):
        _require_musetalk(engine_config)
        return "musetalk"
    if "lite" in (request, template_engine):
        return "lite"
    status = _musetalk_status(engine_config.models)
    if status.available:
        _require_musetalk(engine_config)
        return "musetalk"
    log.warning("⚠️ using engine lite 使用lite引擎: musetalk has %s", status.reason)
    return "lite"


def _require_musetalk(engine_config: EngineConfig) -> None:
    files.require_files(engine_config.models)
    if engine_config.vae_decoder == "tiny" and (missing := files.missing_tiny_files(engine_config.models)):
        raise files.missing_weights_error(missing, "--only tiny")
    packages = _missing_packages(MUSETALK_PACKAGES)
    if packages:
        raise EngineError(
            f"engine musetalk is {_not_installed(packages)}",
            f"run {INSTALL_COMMAND}, or use --engine lite 请安装或改用lite引擎",
        )


def engine_fingerprint(name: EngineName, engine_config: EngineConfig) -> str:
    """What `create_engine(name, engine_config).fingerprint` would be, without a framework."""
    if name == "musetalk":
        return files.latents_fingerprint(files.find_files(engine_config.models))
    from musetalk.engines.lite.engine import LiteEngine

    return LiteEngine.fingerprint


def create_engine(name: EngineName, engine_config: EngineConfig, device: str) -> Engine:
    """A ready engine.

    Args:
        name: from `choose_engine`.
        engine_config: batch size, precision, runtime and weight paths.
        device: resolved, e.g. "cpu", "cuda:0"; MuseTalk runs on the CPU, with a warning, where torch can't
            use it.

    Raises:
        WeightsError: a weight file is missing, damaged or of another model.
        EngineError: a package the engine needs is not installed.
        DeviceError: torch can't use the device and the configuration is strict about it.
    """
    if name == "musetalk":
        _require_musetalk(engine_config)
        from musetalk.engines.musetalk.engine import MuseTalkEngine

        usable = usable_by_torch(device, strict=engine_config.strict_device)
        return MuseTalkEngine(files.find_files(engine_config.models), engine_config, usable)
    from musetalk.engines.lite.engine import LiteEngine

    return LiteEngine(config.LITE_MODELS)
