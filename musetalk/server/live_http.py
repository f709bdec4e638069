"""Live sessions over HTTP and WebSockets: speech in, events and fragmented mp4 or WebRTC out.

The decision a reader would question: a socket to a session that isn't there is accepted, told why and closed
with 4404, because a browser shows its page nothing of a refused handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from musetalk.config import Defaults
from musetalk.errors import InputError, MuseTalkError, UsageError
from musetalk.media.audio import SAMPLE_RATE
from musetalk.server.live import LiveSession, LiveSessions
from musetalk.server.live_sound import SpeechSender
from musetalk.server.viewers import Viewer
from musetalk.server.whep import Peers, check_available, is_available

NO_SESSION = 4404  # close codes of sockets
ENDED = 4410
END_SECONDS = 2.0  # in which an ended session frees its place
RAW_TYPES = ("audio/pcm", "audio/l16", "audio/raw")
MAX_EVENTS = 256  # that wait for a client who doesn't read
KNOWN_MESSAGES = ("config", "speak_end", "interrupt", "keep_alive")


class SessionRequest(BaseModel):
    """Body of `POST /v1/sessions`."""

    template_id: str
    fps: float | str = Defaults.fps
    width: int | None = None
    articulation: float = Defaults.articulation


def live_router(sessions: LiveSessions) -> APIRouter:
    """`/v1/sessions` and all below it."""
    router = APIRouter(prefix="/v1/sessions", tags=["live"])
    _add_sessions(router, sessions)
    _add_speech(router, sessions)
    _add_pictures(router, sessions)
    _add_whep(router, sessions, Peers())
    return router


def _add_sessions(router: APIRouter, sessions: LiveSessions) -> None:
    @router.post("", status_code=201)
    def start(body: SessionRequest, request: Request, response: Response) -> dict[str, Any]:
        """Starts a session: its id, its addresses and how many fit."""
        client = (request.client.host if request.client else "") or "?"
        session = sessions.start(body.template_id, body.fps, body.width, body.articulation, client)
        response.headers["Location"] = f"/v1/sessions/{session.session_id}"
        return {"success": True, **session.status(), **_addresses(session), **_capacity(sessions)}

    @router.get("")
    def listed() -> dict[str, Any]:
        """The sessions that live."""
        listed = [session.status() for session in sessions.all()]
        return {"success": True, "sessions": listed, **_capacity(sessions), "webrtc": is_available()}

    @router.get("/{session_id}")
    def told(session_id: str) -> dict[str, Any]:
        """What one session is doing."""
        session = _found(sessions, session_id)
        return {"success": True, **session.status(), **_addresses(session)}

    @router.delete("/{session_id}")
    def end(session_id: str) -> dict[str, Any]:
        """Ends a session and frees its place."""
        session = _found(sessions, session_id)
        session.end("the client ended it 会话已结束")
        session.over.wait(END_SECONDS)
        return {"success": True, **session.status()}


def _add_speech(router: APIRouter, sessions: LiveSessions) -> None:
    @router.websocket("/{session_id}/audio")
    async def audio(websocket: WebSocket, session_id: str) -> None:
        """Speech in: s16le in binary messages; JSON both ways beside it."""
        async with _connected(websocket, sessions, session_id) as session:
            if session is not None:
                await _converse(websocket, session)

    @router.post("/{session_id}/speech")
    async def speech(session_id: str, request: Request) -> dict[str, Any]:
        """Speech in as a file, in a form or as the body, or as a stream of raw samples."""
        session = _found(sessions, session_id)
        kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
        if kind.strip() in RAW_TYPES:
            seconds = await _hear_stream(session, request, _stated_rate(parameters))
        else:
            with _upload_folder(sessions) as folder:
                path = await _saved(request, folder)
                seconds = await asyncio.to_thread(session.speak_file, path)
        return {"success": True, "session_id": session_id, "seconds": round(seconds, 3)}

    @router.post("/{session_id}/interrupt")
    def interrupt(session_id: str) -> dict[str, Any]:
        """Drops all speech that wasn't shown; how many seconds of it were."""
        position = _found(sessions, session_id).interrupt()
        return {"success": True, "session_id": session_id, "position": position}


def _add_pictures(router: APIRouter, sessions: LiveSessions) -> None:
    @router.websocket("/{session_id}/video")
    async def video(websocket: WebSocket, session_id: str) -> None:
        """Fragmented mp4: a text message that names its codecs, then the header and fragments."""
        async with _connected(websocket, sessions, session_id) as session:
            if session is not None:
                await _show(websocket, session)

    @router.get("/{session_id}/stream.mp4")
    async def stream(session_id: str) -> StreamingResponse:
        """The same for any player that takes an address."""
        contents = _contents(_found(sessions, session_id))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(contents, media_type="video/mp4", headers=headers)


def _add_whep(router: APIRouter, sessions: LiveSessions, peers: Peers) -> None:
    @router.post("/{session_id}/whep")
    async def offer(session_id: str, request: Request) -> Response:
        """WebRTC by WHEP: an SDP offer in, an SDP answer out."""
        session = _found(sessions, session_id)
        try:
            check_available()
        except MuseTalkError as e:
            raise HTTPException(501, f"{e.message}: {e.hint}") from e
        sdp = (await request.body()).decode("utf-8", "replace")
        peer_id, answer = await peers.answer(session, sdp)
        location = f"/v1/sessions/{session_id}/whep/{peer_id}"
        return Response(answer, 201, {"Location": location}, "application/sdp")

    @router.delete("/{session_id}/whep/{peer_id}")
    async def hang_up(session_id: str, peer_id: str) -> dict[str, Any]:
        """Ends a WebRTC viewer."""
        if not await peers.close(peer_id):
            raise HTTPException(404, f"no viewer {peer_id[:60]!r} of session {session_id[:60]!r}")
        return {"success": True}


def _found(sessions: LiveSessions, session_id: str) -> LiveSession:
    try:
        return sessions.get(session_id)
    except InputError as e:
        raise HTTPException(404, f"{e.message}: {e.hint}") from e


def _addresses(session: LiveSession) -> dict[str, Any]:
    base = f"/v1/sessions/{session.session_id}"
    names = {"stream": "stream.mp4"}
    kinds = ("audio", "video", "speech", "interrupt", "stream", "whep")
    return {"addresses": {kind: f"{base}/{names.get(kind, kind)}" for kind in kinds}}


def _capacity(sessions: LiveSessions) -> dict[str, Any]:
    worker = sessions.worker
    return {"capacity": {"sessions": worker.capacity, "active": worker.sessions}}


@asynccontextmanager
async def _connected(
    websocket: WebSocket, sessions: LiveSessions, session_id: str
) -> AsyncIterator[LiveSession | None]:
    """An accepted socket to a session, which isn't alone meanwhile; None where it isn't there."""
    await websocket.accept()
    try:
        session = sessions.get(session_id)
    except InputError as e:
        await _send(websocket, _error(e))
        await websocket.close(NO_SESSION)
        yield None
        return
    session.connect()
    try:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            yield session
    finally:
        session.disconnect()


async def _converse(websocket: WebSocket, session: LiveSession) -> None:
    """Takes speech and messages until either side ends."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](MAX_EVENTS)
    events.put_nowait({"type": "ready", "sample_rate": SAMPLE_RATE, **session.status()})
    sender = SpeechSender(session.speech)
    forget = session.listen(lambda event: _put(loop, events, event))
    telling = asyncio.create_task(_tell(websocket, events))
    try:
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            session.sign()
            try:
                if message.get("bytes"):
                    sender.push_pcm(message["bytes"])
                elif message.get("text"):
                    for reply in _heed(session, sender, message["text"]):
                        _put_newest(events, reply)
            except MuseTalkError as e:
                _put_newest(events, _error(e))
    finally:
        forget()
        telling.cancel()


def _heed(session: LiveSession, sender: SpeechSender, text: str) -> Iterator[dict[str, Any]]:
    """Does what a text message asks.

    Raises:
        UsageError: it asks for nothing that is known.
    """
    try:
        message = json.loads(text)
        kind = message["type"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise UsageError("the message is no JSON object with a type", 'send {"type": "speak_end"}') from e
    if kind == "config":
        sender.set_rate(message.get("sample_rate", SAMPLE_RATE))
        session.speech.set_realtime(bool(message.get("realtime")))
    elif kind == "speak_end":
        sender.end()
    elif kind == "interrupt":
        yield {"type": "interrupted", "position": session.interrupt()}
    elif kind != "keep_alive":
        raise UsageError(f"unknown message {str(kind)[:40]!r}", f"send one of {', '.join(KNOWN_MESSAGES)}")


async def _tell(websocket: WebSocket, events: asyncio.Queue[dict[str, Any]]) -> None:
    """Sends events; closes the socket behind the last."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            event = await events.get()
            await _send(websocket, event)
            if event["type"] == "ended":
                await websocket.close(ENDED)
                return


async def _show(websocket: WebSocket, session: LiveSession) -> None:
    """Sends the stream until the viewer goes or the session ends."""
    gone = asyncio.create_task(_until_gone(websocket))
    sending = asyncio.create_task(_send_stream(websocket, session))
    await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
    for task in (gone, sending):
        task.cancel()
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await asyncio.gather(gone, sending, return_exceptions=True)
        await websocket.close(ENDED)


async def _until_gone(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        continue


async def _send_stream(websocket: WebSocket, session: LiveSession) -> None:
    contents = _contents(session)
    try:
        header = await anext(contents, b"")
        await _send(websocket, {"type": "ready", "mime": mime_type(header)})
        await websocket.send_bytes(header)
        async for content in contents:
            await websocket.send_bytes(content)
    finally:
        await contents.aclose()


async def _contents(session: LiveSession) -> AsyncGenerator[bytes, None]:
    """The stream's header, then its fragments, as far as this viewer keeps up."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the session
            loop.call_soon_threadsafe(woken.set)

    viewer: Viewer = await asyncio.to_thread(session.viewers.join, wake)
    session.connect()
    try:
        while not viewer.over:
            await woken.wait()
            woken.clear()
            for content in viewer.take():
                yield content
    finally:
        session.disconnect()
        session.viewers.leave(viewer)


def mime_type(header: bytes) -> str:
    """What a browser's MediaSource wants to know: the profile and level are in the header's avcC box."""
    at = header.find(b"avcC")
    profile = header[at + 5 : at + 8].hex() if at >= 0 else "42c01e"
    return f'video/mp4; codecs="avc1.{profile},mp4a.40.2"'


async def _hear_stream(session: LiveSession, request: Request, rate: int) -> float:
    """Pushes raw s16le samples as they come, as one utterance; its seconds."""
    interrupts, samples = session.interrupts, 0
    sender = SpeechSender(session.speech, rate)
    async for content in request.stream():
        if session.ended or session.interrupts != interrupts:
            break
        session.sign()
        samples += sender.push_pcm(content)
    else:
        samples += sender.end()
    return samples / SAMPLE_RATE


def _stated_rate(parameters: str) -> int:
    found = re.search(r"rate\s*=\s*(\d{1,9})", parameters)
    return int(found[1]) if found else SAMPLE_RATE


@contextmanager
def _upload_folder(sessions: LiveSessions) -> Iterator[Path]:
    temp_dir = sessions.worker.server.temp_dir
    temp_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=temp_dir, prefix="speech-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def _saved(request: Request, folder: Path) -> Path:
    """The request's sound file, from a form's `file` or the whole body."""
    path = folder / "speech"
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        async with request.form(max_files=1) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise UsageError("the form has no file 缺少文件", "send the sound as the field 'file'")
            with path.open("wb") as file:
                while content := await upload.read(1 << 20):
                    file.write(content)
        return path
    with path.open("wb") as file:
        async for content in request.stream():
            file.write(content)
    return path


def _error(error: MuseTalkError) -> dict[str, Any]:
    kind = "error" if error.exit_code != 1 else "warning"
    return {"type": kind, "error_code": error.error_code, "message": error.message, "hint": error.hint}


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: dict[str, Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended before the session
        loop.call_soon_threadsafe(_put_newest, events, event)


def _put_newest(events: asyncio.Queue[Any], event: dict[str, Any]) -> None:
    """Appends an event; where the client doesn't read, the oldest is dropped for it."""
    if events.full():
        events.get_nowait()
    events.put_nowait(event)


async def _send(websocket: WebSocket, message: dict[str, Any]) -> None:
    await websocket.send_text(json.dumps(message, ensure_ascii=False))
