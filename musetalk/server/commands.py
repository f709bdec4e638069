"""What the commands ask of the worker: their own work, told line by line while it is done.

The decision a reader would question: warnings are told to whoever's request made them. The pipeline's threads
carry their request's context, and the handler puts each record where that context says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from musetalk.announcement import Announcement, proof
from musetalk.config import Defaults, EncodingConfig, PreprocessingConfig
from musetalk.errors import InputError, MuseTalkError
from musetalk.rendering import Conduct
from musetalk.server.tcp import MAX_CALLS, encoded
from musetalk.server.worker import Worker

Say = Callable[[dict[str, Any]], None]

ALIVE_SECONDS = 1.0  # after which a silent command says that it lives
TOLD_FRAMES = 10  # of progress, at a time

log = logging.getLogger(__name__)
listening: ContextVar[Say | None] = ContextVar("listening", default=None)


class CommandRequest(BaseModel):
    """Body of `/worker/run`: a command's arguments, its paths absolute."""

    command: Literal["preprocess", "inference"]
    template_id: str
    settings: dict[str, Any] = {}
    encoding: dict[str, Any] = {}
    template_image_path: str = ""
    force_refresh: bool = False
    output_state: str = ""
    audio_path: str = ""
    output_path: str = ""
    fps: str = ""
    articulation: float = Defaults.articulation
    frames_dir: str = ""
    template_dir: str = ""
    batch_size: int = 1


class Overheard(logging.Handler):
    """Tells warnings to the command whose request made them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record."""
        say = listening.get()
        if say is not None:
            say({"log": record.getMessage(), "level": record.levelno})


def commands_router(worker: Worker, announcement: Callable[[], Announcement | None]) -> APIRouter:
    """`/worker/proof` and `/worker/run`, for commands on the same machine."""
    router = APIRouter(prefix="/worker", tags=["commands"])
    calls = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="command")

    @router.get("/proof")
    async def prove(challenge: Annotated[str, Query(min_length=16, max_length=128)]) -> dict[str, str]:
        """That this is the worker that announced itself."""
        own = announcement()
        if own is None:
            raise HTTPException(404, "this worker isn't announced")
        return {"proof": proof(own.nonce, challenge)}

    @router.post("/run", response_class=StreamingResponse)
    async def run(body: CommandRequest, request: Request) -> Any:
        """A command's work: JSON by lines, the last one its answer or failure."""
        if not request.scope["state"].get("trusted"):
            raise HTTPException(403, "commands are run for this machine alone 仅限本机")
        return StreamingResponse(_told(worker, body, calls), media_type="application/x-ndjson")

    return router


async def _told(worker: Worker, body: CommandRequest, calls: Executor) -> AsyncIterator[bytes]:
    """The command's lines; when nobody takes them any more, it is cancelled."""
    loop, lines, cancel = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](), threading.Event()

    def say(line: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker ends
            loop.call_soon_threadsafe(lines.put_nowait, line)

    work = loop.run_in_executor(calls, _done, worker, body, say, cancel)
    try:
        while True:
            try:
                line = await asyncio.wait_for(lines.get(), ALIVE_SECONDS)
            except asyncio.TimeoutError:
                line = {}
            yield encoded(line) + b"\n"
            if "answer" in line or "failure" in line:
                return
    finally:
        cancel.set()
        work.cancel()


def _done(worker: Worker, body: CommandRequest, say: Say, cancel: threading.Event) -> None:
    with _listened_to(say):
        try:
            run = _preprocess if body.command == "preprocess" else _inference
            say({"answer": run(worker, body, say, cancel)})
        except MuseTalkError as e:
            failure = {"error_code": e.error_code, "exit_code": e.exit_code, "message": e.message}
            say({"failure": {**failure, "hint": e.hint}})
        except Exception as e:
            log.exception("a command failed")
            words = f"internal error 内部错误: {type(e).__name__}: {e}"
            told = {
                "error_code": "internal",
                "exit_code": 1,
                "message": words,
                "hint": "see the worker's log",
            }
            say({"failure": told})


@contextlib.contextmanager
def _listened_to(say: Say) -> Iterator[None]:
    told = listening.set(say)
    try:
        yield
    finally:
        listening.reset(told)


def _preprocess(worker: Worker, body: CommandRequest, say: Say, cancel: threading.Event) -> dict[str, Any]:
    answer = worker.preprocess(
        body.template_id, Path(body.template_image_path), _settings(body), body.force_refresh, cancel=cancel
    )
    if body.output_state:
        worker.service.store.export(body.template_id, Path(body.output_state))
    return dict(answer)


def _inference(worker: Worker, body: CommandRequest, say: Say, cancel: threading.Event) -> dict[str, Any]:
    def progress(count: int, expected: int | None) -> None:
        if count % TOLD_FRAMES == 0 or count == expected:
            say({"progress": [count, expected]})

    answer = worker.render_file(
        body.template_id,
        Path(body.audio_path),
        Path(body.output_path),
        body.fps,
        articulation=body.articulation,
        batch_size=body.batch_size,
        frames_dir=Path(body.frames_dir) if body.frames_dir else None,
        template_dir=Path(body.template_dir) if body.template_dir else None,
        settings=_settings(body),
        encoding=_encoding(body),
        conduct=Conduct(cancel=cancel, progress=progress, bar=False),
    )
    return dict(answer)


def _settings(body: CommandRequest) -> PreprocessingConfig:
    try:
        return PreprocessingConfig(**body.settings)
    except TypeError as e:
        raise InputError(f"settings {json.dumps(body.settings)[:200]} can't be used", "see --help") from e


def _encoding(body: CommandRequest) -> EncodingConfig:
    try:
        return EncodingConfig(**body.encoding)
    except TypeError as e:
        raise InputError(f"encoding {json.dumps(body.encoding)[:200]} can't be used", "see --help") from e
