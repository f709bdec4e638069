"""The two protocols on bare TCP that older callers speak: JSON by lines, and JSON behind its length.

The decisions a reader would question: keys leave in both spellings, `modelLoaded` and `model_loaded`. One
caller's reader is case-sensitive, other scripts read the other spelling, and neither can be changed. And a
connection whose line doesn't begin like an object is closed after its answer: a browser page can make a
browser send HTTP here, with the page's own lines in its body.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from musetalk import __version__
from musetalk.errors import ClientLimitError, MuseTalkError, UsageError
from musetalk.server.callers import Callers, failure
from musetalk.server.gate import is_loopback, is_trusted
from musetalk.server.paths import hide_folders

log = logging.getLogger(__name__)

MAX_MESSAGE = 1 << 20  # bytes
IDLE_SECONDS = 6 * 3600.0  # a connection is kept for hours; after as many without a word it is closed
HALF_SECONDS = 60.0  # for the rest of a message that has begun
WRITE_SECONDS = 60.0  # for a caller to take an answer
MAX_DEPTH = 32  # of nested JSON
MAX_CONNECTIONS = 256  # on each port
MAX_CALLS = 256  # answered at once; those that wait for their turn count
LENGTH = struct.Struct("<I")
ENDS = (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, ValueError)  # of a conversation

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")

Stop = Callable[[], None]


def camel_case(name: str) -> str:
    """`model_loaded` as `modelLoaded`."""
    return re.sub(r"_([a-z])", lambda found: found[1].upper(), name)


def both_spellings(answer: Mapping[str, Any]) -> dict[str, Any]:
    """`answer` with each key also as camelCase."""
    return {**answer, **{camel_case(key): value for key, value in answer.items()}}


def parse_message(content: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UsageError: it isn't one, or is nested deeper than `MAX_DEPTH`.
    """
    if _depth(content) > MAX_DEPTH:
        raise UsageError("the request is nested too deeply", "send one JSON object")
    try:
        message = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"the request is no JSON: {e}", "send one JSON object a line, in UTF-8") from e
    if not isinstance(message, dict):
        raise UsageError("the request is no JSON object", "send one JSON object a line")
    return message


def _depth(content: bytes) -> int:
    """How deeply brackets are nested outside strings; one without an end reaches to the message's."""
    deepest = depth = 0
    for bracket in _BRACKETS.finditer(_STRINGS.sub(b"", content)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


class _Protocol:
    """A way of speaking over bare connections: each is let in, counted, and closed behind its conversation.

    Args:
        callers: what may be asked.
        name: of the threads that answer.
    """

    def __init__(self, callers: Callers, name: str) -> None:
        self._callers = callers
        self._calls = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix=name)
        self._connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Converses on one connection until its end."""
        address = (writer.get_extra_info("peername") or ("", 0))[0]
        local, worker = is_loopback(address), self._callers.worker
        welcome = local or is_trusted(address, worker.server.trust)
        self._connections += 1
        try:
            with contextlib.suppress(*ENDS, ClientLimitError), worker.clients.counted(address, "connections"):
                if welcome and self._connections <= MAX_CONNECTIONS:
                    await self._converse(reader, writer, local)
        finally:
            self._connections -= 1
            writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trusted: bool
    ) -> None:
        """Answers what is asked on one connection."""
        raise NotImplementedError


class LineProtocol(_Protocol):
    """Port 58080: one JSON object a line, one answer a line, in order.

    Args:
        callers: what may be asked.
        stop: ends the worker.
    """

    def __init__(self, callers: Callers, stop: Stop) -> None:
        super().__init__(callers, "tcp")
        self._stop = stop
        self._commands: dict[str, Callable[[dict[str, Any], bool], dict[str, Any]]] = {
            "ping": lambda request, trusted: callers.ping(),
            "status": lambda request, trusted: self._status(),
            "check_cache": self._check,
            "preprocess": self._preprocess,
            "inference": self._inference,
        }

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trusted: bool
    ) -> None:
        while line := await _read_line(reader):
            await _write(writer, json_line(await self.answer(line, trusted)))
            if not line.startswith(b"{"):
                return

    async def answer(self, line: bytes, trusted: bool) -> dict[str, Any]:
        """The answer to one line; a failure is an answer too."""
        request: dict[str, Any] = {}
        try:
            request = parse_message(line)
            name = request.get("command")
            if name == "shutdown" and trusted:
                asyncio.get_running_loop().call_soon(self._stop)
                return {"success": True, "message": "the worker ends 服务即将退出"}
            if not isinstance(name, str) or name not in self._commands:
                raise UsageError(f"unknown command {str(name)[:40]!r}", f"use {', '.join(self._commands)}")
            call = functools.partial(self._commands[name], request, trusted)
            return await asyncio.get_running_loop().run_in_executor(self._calls, call)
        except MuseTalkError as e:
            shown = e if trusted else hide_folders(e, self._callers.worker.folders)
            return {**failure(shown, request.get("template_id")), "error_type": type(e).__name__}
        except Exception as e:
            log.exception("a request failed")
            error = MuseTalkError(f"internal error 内部错误: {type(e).__name__}", "see the worker's log")
            return {**failure(error), "error_type": type(e).__name__}

    def _status(self) -> dict[str, Any]:
        status = self._callers.worker.status()
        return {
            "success": True,
            "status": status["status"],
            "model_loaded": True,
            "device": ",".join(status["config"]["devices"]),
            "cache_dir": status["config"]["cache_dir"],
            "active_threads": status["running"],
            "uptime": status["uptime"],
            "version": __version__,
        }

    def _check(self, request: dict[str, Any], trusted: bool) -> dict[str, Any]:
        answer, store = self._callers.check(request, trusted)
        template_id = answer["template_id"]
        return {
            "success": True,
            "template_id": template_id,
            "cache_exists": answer["valid"],
            "cache_path": str(store.found_pickle(template_id)),
            "metadata_path": str(store.found_metadata(template_id)),
            "error": "" if answer["valid"] else answer["message"],
            "error_type": "" if answer["valid"] else "CacheError",
        }

    def _preprocess(self, request: dict[str, Any], trusted: bool) -> dict[str, Any]:
        answer = self._callers.preprocess(request, trusted)
        return {**answer, "process_time": answer["processing_time"], "error": "", "error_type": ""}

    def _inference(self, request: dict[str, Any], trusted: bool) -> dict[str, Any]:
        answer = self._callers.inference(request, trusted)
        return {
            **answer,
            "result_path": answer["output_path"],
            "inference_time": answer["processing_time"],
            "error": "",
            "error_type": "",
        }


class FramedProtocol(_Protocol):
    """JSON behind a uint32 little-endian length, one request a connection, on the HTTP port.

    Args:
        callers: what may be asked.
    """

    def __init__(self, callers: Callers) -> None:
        super().__init__(callers, "framed")
        self.client_connections = callers.worker.server.client_connections

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trusted: bool
    ) -> None:
        (length,) = LENGTH.unpack(await asyncio.wait_for(reader.readexactly(4), HALF_SECONDS))
        if length <= MAX_MESSAGE:
            body = await asyncio.wait_for(reader.readexactly(length), HALF_SECONDS)
            content = encoded(await self.answer(body, trusted))
            # length and body in one write: this caller takes the length with one read
            await _write(writer, LENGTH.pack(len(content)) + content)

    async def answer(self, body: bytes, trusted: bool) -> dict[str, Any]:
        """`Success` and `OutputPath`, or the error's words."""
        try:
            call = functools.partial(self._callers.inference, parse_message(body), trusted)
            answer = await asyncio.get_running_loop().run_in_executor(self._calls, call)
            return {"Success": True, "OutputPath": answer["output_path"], **answer}
        except MuseTalkError as e:
            shown = e if trusted else hide_folders(e, self._callers.worker.folders)
            words = f"{shown.message} {shown.hint}".strip()
            return {"Success": False, "OutputPath": "", "Error": words, **failure(shown)}
        except Exception as e:
            log.exception("a request failed")
            words = f"internal error 内部错误: {type(e).__name__}"
            return {"Success": False, "OutputPath": "", "Error": words, "success": False, "error": words}


def json_line(answer: Mapping[str, Any]) -> bytes:
    """An answer in both spellings, on one line."""
    return encoded(both_spellings(answer)) + b"\n"


def encoded(answer: Mapping[str, Any]) -> bytes:
    """An answer as JSON in UTF-8; half a surrogate pair, which a request may hold, as its number."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace")


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line that isn't empty; b"" at the end."""
    while True:
        first = await asyncio.wait_for(reader.read(1), IDLE_SECONDS)
        if first.strip():
            rest = await asyncio.wait_for(reader.readline(), HALF_SECONDS)
            return first + rest
        if not first:
            return b""


async def _write(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await asyncio.wait_for(writer.drain(), WRITE_SECONDS)
