"""WebRTC out of a live session: WHEP, one offer and one answer over HTTP, with aiortc where it is installed.

The decision a reader would question: each viewer has an encoder of his own here, since WebRTC fits the
quality to each viewer's network. Who wants one encode for all watches the fragmented mp4.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from musetalk.errors import EngineError, InputError
from musetalk.media.audio import SAMPLE_RATE, int16_samples

if TYPE_CHECKING:
    from musetalk.server.live import LiveSession

VIDEO_CLOCK = 90_000  # Hz, of RTP's pictures
FALLEN_BEHIND = 12  # frames that may wait for a viewer


def is_available() -> bool:
    """Whether aiortc is installed."""
    return importlib.util.find_spec("aiortc") is not None


def check_available() -> None:
    """Raises EngineError when aiortc isn't installed."""
    if not is_available():
        raise EngineError(
            "WebRTC isn't installed 未安装WebRTC组件", "run: pip install -r requirements-webrtc.txt"
        )


class Peers:
    """The WebRTC viewers of all sessions."""

    def __init__(self) -> None:
        self._peers: dict[str, tuple[LiveSession, Any, PeerOutput, Callable[[], None]]] = {}

    async def answer(self, session: LiveSession, offer: str) -> tuple[str, str]:
        """Connects a viewer: his id and the answer to his SDP `offer`.

        Raises:
            EngineError: aiortc isn't installed.
            InputError: the offer can't be used, or the session has ended.
        """
        check_available()
        from aiortc import RTCPeerConnection, RTCSessionDescription

        peer_id, connection = secrets.token_hex(8), RTCPeerConnection()
        output = PeerOutput(session.settings.fps)
        try:
            await connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            connection.addTrack(output.pictures)
            connection.addTrack(output.sound)
            await connection.setLocalDescription(await connection.createAnswer())
        except Exception as e:
            await connection.close()
            raise InputError(f"the offer can't be used: {e} SDP无效", "send a WHEP offer") from e
        self._peers[peer_id] = (session, connection, output, self._watch(peer_id, session, connection))
        session.connect()
        session.add_output(output)
        if session.ended:  # the end may have been told before anybody here listened
            await self.close(peer_id)
            raise InputError("the session has ended 会话已结束", "POST /v1/sessions makes another")
        return peer_id, connection.localDescription.sdp

    def _watch(self, peer_id: str, session: LiveSession, connection: Any) -> Callable[[], None]:
        """Closes a viewer who is lost, and every viewer of a session that ends; returns what ends that."""
        loop = asyncio.get_running_loop()

        @connection.on("connectionstatechange")
        async def changed() -> None:
            if connection.connectionState in ("failed", "closed"):
                await self.close(peer_id)

        def told(event: dict[str, Any]) -> None:
            if event["type"] == "ended":
                with contextlib.suppress(RuntimeError):  # the loop has ended before the session
                    asyncio.run_coroutine_threadsafe(self.close(peer_id), loop)

        return session.listen(told)

    async def close(self, peer_id: str) -> bool:
        """Ends a viewer; whether there was one."""
        if peer_id not in self._peers:
            return False
        session, connection, output, forget = self._peers.pop(peer_id)
        forget()
        session.remove_output(output)
        session.disconnect()
        output.end()
        await connection.close()
        return True


class PeerOutput:
    """A session's `Output` that feeds one viewer's two tracks.

    Args:
        fps: frames per second.

    Attributes:
        pictures, sound: aiortc tracks.
    """

    def __init__(self, fps: Fraction) -> None:
        self._fps = fps
        self._loop = asyncio.get_running_loop()
        self._frames = self._samples = 0
        self._picture_queue: asyncio.Queue[Any] = asyncio.Queue()
        self._sound_queue: asyncio.Queue[Any] = asyncio.Queue()
        self.pictures = _track("video", self._picture_queue)
        self.sound = _track("audio", self._sound_queue)

    def write(self, i420: np.ndarray, samples: np.ndarray) -> None:
        """See `Output`."""
        from av import AudioFrame, VideoFrame

        picture = VideoFrame.from_ndarray(i420, format="yuv420p")
        picture.pts = int(self._frames * VIDEO_CLOCK / self._fps)
        picture.time_base = Fraction(1, VIDEO_CLOCK)
        pcm = int16_samples(samples)
        sound = AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, self._samples, Fraction(1, SAMPLE_RATE)
        self._frames += 1
        self._samples += len(samples)
        with contextlib.suppress(RuntimeError):  # the loop has ended before the session
            self._loop.call_soon_threadsafe(self._deliver, picture, sound)

    def _deliver(self, picture: Any, sound: Any) -> None:
        for waiting, frame in ((self._picture_queue, picture), (self._sound_queue, sound)):
            while waiting.qsize() >= FALLEN_BEHIND:
                waiting.get_nowait()
            waiting.put_nowait(frame)

    def end(self) -> None:
        """Ends both tracks."""
        self.pictures.stop()
        self.sound.stop()


def _track(kind: str, frames: asyncio.Queue[Any]) -> Any:
    """An aiortc track that gives what comes into `frames`."""
    from aiortc import MediaStreamTrack

    class Track(MediaStreamTrack):  # type: ignore[misc]
        async def recv(self) -> Any:
            return await frames.get()

    Track.kind = kind
    return Track()
