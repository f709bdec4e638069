"""HTTP: what production callers use, and how every error is told."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from musetalk import __version__
from musetalk.config import Defaults
from musetalk.errors import (
    BusyError,
    CacheMissingError,
    ClientLimitError,
    InputError,
    MuseTalkError,
    UsageError,
)
from musetalk.server.callers import Callers, failure
from musetalk.server.commands import commands_router
from musetalk.server.files_http import AnswersHead, MediaFile
from musetalk.server.gate import Gate
from musetalk.server.live import LiveSessions
from musetalk.server.live_http import live_router
from musetalk.server.operations import Metered, make_registry, operations_router
from musetalk.server.page_http import page_router
from musetalk.server.paths import hide_folders
from musetalk.server.tcp import MAX_CALLS, encoded
from musetalk.server.videos import templates_router, videos_router

if TYPE_CHECKING:
    from musetalk.server.worker import Worker

STATUS_OF_EXIT_CODE = {1: 500, 2: 400, 3: 400, 4: 422, 5: 503, 6: 409, 7: 507, 130: 409}
VIDEO_NAME = re.compile(r"[\w.\- ()\[\]]{1,120}\.(mp4|mov|mkv|webm)")


class PreprocessRequest(BaseModel):
    """Body of `/api/preprocess_template`."""

    template_id: str
    image_path: str
    force: bool = False
    bbox_shift: int | None = None
    parsing_mode: str | None = None


class StartSessionRequest(BaseModel):
    """Body of `/api/start_session`."""

    session_id: str
    template_id: str
    articulation: float = Defaults.articulation


class SegmentRequest(BaseModel):
    """Body of `/api/process_segment`."""

    session_id: str
    audio_path: str
    segment_index: Annotated[int, Field(ge=0, lt=10**9)] = 0
    is_final: bool = False


def http_status(error: MuseTalkError) -> int:
    """The HTTP status that fits an error."""
    if isinstance(error, ClientLimitError):
        return 429
    if isinstance(error, BusyError):
        return 503
    if isinstance(error, CacheMissingError):
        return 404
    return STATUS_OF_EXIT_CODE.get(error.exit_code, 500)


def trusted(request: Request) -> bool:
    """Whether the caller may name any path of this machine."""
    return bool(request.scope["state"].get("trusted"))


def client_of(request: Request) -> str:
    """The address that calls."""
    return (request.client.host if request.client else "") or "?"


class Answer(JSONResponse):
    """JSON in UTF-8, in which half a surrogate pair, that a request may hold, becomes its number."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return encoded(content)


@asynccontextmanager
async def _many_threads(_app: FastAPI) -> AsyncIterator[None]:
    """Lets as many calls wait for their turn as the worker queues, so that none holds up another kind."""
    import anyio.to_thread

    anyio.to_thread.current_default_thread_limiter().total_tokens = MAX_CALLS
    yield


def create_app(worker: Worker, callers: Callers) -> Any:
    """The ASGI application of a worker.

    Args:
        worker: does the work.
        callers: what today's callers may ask.
    """
    app = FastAPI(
        title="Enhanced MuseTalk",
        version=__version__,
        docs_url=None,  # both would fetch their scripts from elsewhere
        redoc_url=None,
        default_response_class=Answer,
        lifespan=_many_threads,
    )
    app.state.worker, app.state.callers = worker, callers
    _add_errors(app)
    registry = make_registry(worker, callers.jobs)
    app.include_router(callers_router(worker, callers))
    app.include_router(live_router(LiveSessions(worker)))
    app.include_router(page_router(worker))
    app.include_router(videos_router(worker, callers.jobs))
    app.include_router(templates_router(worker))
    app.include_router(operations_router(app, worker, registry))
    app.include_router(commands_router(worker, lambda: worker.announcement))
    return Gate(AnswersHead(Metered(app, registry)), worker.server, worker.clients)


def callers_router(worker: Worker, callers: Callers) -> APIRouter:
    """`/api/*`, `/health` and `/videos/{name}`, as the production caller speaks."""
    router = APIRouter(tags=["callers"])

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """That the worker is there."""
        return {"status": "ok", "version": __version__}

    @router.post("/api/initialize")
    async def initialize() -> dict[str, Any]:
        """Nothing is left to do: the worker was warm before it listened."""
        return {"success": True, "message": "✅ ready 已就绪"}

    @router.post("/api/preprocess_template")
    def preprocess_template(body: PreprocessRequest, request: Request) -> Any:
        """Makes a template's cache, or finds it up to date."""
        with _told_as_bad_request(body.template_id, request) as told:
            answer = callers.preprocess(body.model_dump(), trusted(request))
            return {**answer, "cache_path": str(worker.service.store.found_pickle(body.template_id))}
        return told.answer

    @router.post("/api/start_session")
    def start_session(body: StartSessionRequest, request: Request) -> Any:
        """Takes a place for a session and opens its template."""
        with _told_as_bad_request(body.template_id, request) as told:
            session = callers.sessions.start(
                body.session_id, body.template_id, body.articulation, client_of(request)
            )
            return {"success": True, "session_id": session.session_id, "template_id": session.template_id}
        return told.answer

    @router.post("/api/process_segment")
    def process_segment(body: SegmentRequest, request: Request) -> Any:
        """Renders one segment of a session's speech."""
        with _told_as_bad_request(None, request) as told:
            audio = callers.find(body.audio_path, "audio_path", trusted(request))
            return callers.sessions.process(body.session_id, audio, body.segment_index, body.is_final)
        return told.answer

    @router.post("/api/end_session/{session_id}")
    def end_session(session_id: str, request: Request) -> Any:
        """Ends a session and frees its place."""
        with _told_as_bad_request(None, request) as told:
            return callers.sessions.end(session_id)
        return told.answer

    @router.get("/api/status")
    def status() -> dict[str, Any]:
        """What the worker is doing."""
        return worker.status()

    @router.get("/videos/{name}")
    def video(name: str) -> Any:
        """A finished video, with ranges."""
        folder = worker.server.videos_dir.resolve()
        path = (folder / name).resolve() if VIDEO_NAME.fullmatch(name) else folder
        if path.parent != folder or not path.is_file():
            raise HTTPException(404, f"no video {name[:80]!r} 视频不存在")
        return MediaFile(path)

    return router


class _told_as_bad_request:  # noqa: N801 - used as a statement
    """Errors of the block become the 400 with `detail` that these callers log; overload stays 503 and 429.

    Args:
        template_id: the request's, for the answer.
        request: tells who calls.
    """

    def __init__(self, template_id: str | None, request: Request) -> None:
        self._template_id = template_id
        self._request = request
        self.answer: JSONResponse | None = None

    def __enter__(self) -> _told_as_bad_request:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, MuseTalkError):
            return False
        status = http_status(error)
        kept = status >= 500 or status == 429
        shown = error
        if not trusted(self._request):
            shown = hide_folders(error, self._request.app.state.worker.folders)
        self.answer = error_answer(shown, status if kept else 400, self._template_id)
        return True


def error_answer(error: MuseTalkError, status: int, template_id: str | None = None) -> JSONResponse:
    """An error as the documented dict, with the `detail` that callers log."""
    words = f"{error.message} {error.hint}".strip()
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else {}
    return Answer({**failure(error, template_id), "detail": words}, status, headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(MuseTalkError)
    def told(request: Request, error: MuseTalkError) -> JSONResponse:
        shown = error if trusted(request) else hide_folders(error, app.state.worker.folders)
        return error_answer(shown, http_status(error))

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0] if error.errors() else {"loc": (), "msg": "invalid"}
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return error_answer(UsageError(f"{where}: {first['msg']}", "see /docs"), 422)

    @app.exception_handler(HTTPException)
    def plain(_request: Request, error: HTTPException) -> JSONResponse:
        answer = error_answer(InputError(str(error.detail), "see /docs"), error.status_code)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    def gone(_request: Request, _error: ClientDisconnect) -> JSONResponse:
        return error_answer(UsageError("the request's body ended early 请求未传完", "send it again"), 400)

    @app.exception_handler(Exception)
    def defect(_request: Request, error: Exception) -> JSONResponse:
        words = f"internal error 内部错误: {type(error).__name__}"
        return error_answer(MuseTalkError(words, "the worker's log has the details 详见服务日志"), 500)
