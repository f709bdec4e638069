"""A command that lets a resident worker do its work and answers as if it had done it itself.

The decision a reader would question: without being told, a command uses a worker only where the answer would
be its own: the same user, version, cache folder, engine settings and device. In every doubt it works itself.
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk import __version__
from musetalk.announcement import engine_settings, find_announcements, proof
from musetalk.config import EngineConfig
from musetalk.device import resolve_device
from musetalk.errors import EngineError, MuseTalkError

CONNECT_SECONDS = 2.0
SILENT_SECONDS = 3600.0  # that a worker may be silent for; it says something each second while it lives
LOST = (OSError, http.client.HTTPException, ValueError)

log = logging.getLogger("musetalk")


class WorkerLostError(Exception):
    """The worker isn't there, went away, or takes no more work."""


@dataclass(frozen=True)
class Address:
    """Where a worker listens.

    Attributes:
        nonce: what it must know; "" where the person named the address.
    """

    host: str
    port: int
    nonce: str = ""


def find_worker(choice: str, cache_dir: Path, config: EngineConfig) -> Address | None:
    """The worker that a command may use.

    Args:
        choice: "auto", "off" or "HOST:PORT".
        cache_dir: the command's cache folder.
        config: the command's engine settings.

    Raises:
        EngineError: `choice` names a worker that isn't there or is of another version.
    """
    if choice == "off":
        return None
    if choice != "auto":
        return _named(choice)
    announcements = find_announcements(cache_dir)
    if not announcements:
        return None
    wanted = engine_settings(config)
    device = resolve_device(config.device, strict=config.strict_device).name
    fitting = (
        Address(found.host, found.port, found.nonce)
        for found in announcements
        if found.version == __version__ and found.settings == wanted and device in found.devices
    )
    return next(filter(_proves_itself, fitting), None)


def _named(choice: str) -> Address:
    host, _, port = choice.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise EngineError(f"--worker is {choice!r}", "choose auto, off or HOST:PORT")
    address = Address(host.strip("[]"), int(port))
    try:
        version = _ask(address, "/health").get("version")
    except LOST as e:
        raise EngineError(
            f"no worker answers at {choice} 常驻服务无响应", "start one with --serve, or use --worker auto"
        ) from e
    if version != __version__:
        raise EngineError(f"the worker at {choice} is version {version}, not {__version__}", "restart it")
    return address


def _proves_itself(address: Address) -> bool:
    challenge = secrets.token_hex(16)
    try:
        said = _ask(address, f"/worker/proof?challenge={challenge}").get("proof")
    except LOST:
        return False
    return isinstance(said, str) and hmac.compare_digest(said, proof(address.nonce, challenge))


def _ask(address: Address, path: str) -> dict[str, Any]:
    with _connection(address, CONNECT_SECONDS) as connection:
        connection.request("GET", path, headers=_headers())
        answer = json.loads(connection.getresponse().read(1 << 16))
    if not isinstance(answer, dict):
        raise ValueError("the answer is no object")
    return answer


@contextlib.contextmanager
def _connection(address: Address, seconds: float) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=seconds)
    try:
        yield connection
    finally:
        connection.close()


def _headers() -> dict[str, str]:
    token = os.environ.get("MUSETALK_TOKEN", "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def run_on_worker(
    address: Address, command: str, request: Mapping[str, Any], paths: Mapping[str, str]
) -> dict[str, Any]:
    """The answer of a command that the worker did; closing the connection cancels it there.

    Args:
        command: "preprocess" or "inference".
        request: its arguments, with absolute paths.
        paths: absolute paths and how the person wrote them: so they stand in the answer.

    Raises:
        WorkerLostError: it has to be done here.
        MuseTalkError: it failed, in the words and with the codes that it would have failed with here.
    """
    body = json.dumps({"command": command, **request}).encode()
    try:
        with _connection(address, CONNECT_SECONDS) as connection:
            headers = {**_headers(), "Content-Type": "application/json"}
            connection.request("POST", "/worker/run", body, headers)
            connection.sock.settimeout(SILENT_SECONDS)
            answer = connection.getresponse()
            if answer.status != 200:
                raise WorkerLostError(f"it answered {answer.status}")
            return _conversation(answer, paths)
    except LOST as e:
        raise WorkerLostError(str(e) or type(e).__name__) from e


def _conversation(answer: http.client.HTTPResponse, paths: Mapping[str, str]) -> dict[str, Any]:
    bar = _Bar()
    with contextlib.closing(bar):
        for line in answer:
            said = _as_written(json.loads(line), paths)
            if "progress" in said:
                bar.show(*said["progress"])
            elif "log" in said:
                log.log(said["level"], "%s", said["log"])
            elif "answer" in said:
                return dict(said["answer"])
            elif "failure" in said:
                _raise(said["failure"])
    raise WorkerLostError("it ended without an answer")


def _raise(failure: Mapping[str, Any]) -> None:
    if failure["error_code"] == "busy":
        raise WorkerLostError(failure["message"])
    error = MuseTalkError(failure["message"], failure["hint"])
    error.error_code, error.exit_code = failure["error_code"], failure["exit_code"]
    raise error


def _as_written(value: Any, paths: Mapping[str, str]) -> Any:
    """`value` with absolute paths as the person wrote them."""
    if isinstance(value, str):
        for absolute, written in paths.items():
            value = value.replace(absolute, written)
        return value
    if isinstance(value, dict):
        return {key: _as_written(part, paths) for key, part in value.items()}
    return [_as_written(part, paths) for part in value] if isinstance(value, list) else value


class _Bar:
    """The command's progress bar, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, count: int, expected: int | None) -> None:
        if self._bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=expected, desc="render 渲染", unit="frame", file=sys.stderr)
        if self._bar is not None:
            self._bar.update(count - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
