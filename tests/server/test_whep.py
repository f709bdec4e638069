"""WebRTC out of a live session, met by a peer of its own; and what is said where it isn't installed."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import numpy as np
import pytest

from musetalk.errors import EngineError, InputError
from musetalk.server import whep
from tests.served import Served
from tests.server.live_stand_ins import session as stand_in_session

TEMPLATE = "小哈 (1)"
needs_aiortc = pytest.mark.skipif(
    importlib.util.find_spec("aiortc") is None, reason="aiortc isn't installed: requirements-webrtc.txt"
)


@pytest.fixture
def session(served: Served):
    answer = served.call("POST", "/v1/sessions", {"template_id": TEMPLATE})[2]
    yield answer
    served.call("DELETE", f"/v1/sessions/{answer['session_id']}")


async def watched(served: Served, session: dict[str, Any], pictures: int) -> tuple[list[Any], list[Any], str]:
    """Pictures, as many sounds, and where to hang up, of a viewer who receives both."""
    from aiortc import RTCPeerConnection, RTCSessionDescription

    viewer, tracks = RTCPeerConnection(), {}
    viewer.on("track", lambda track: tracks.update({track.kind: track}))
    for kind in ("video", "audio"):
        viewer.addTransceiver(kind, direction="recvonly")
    await viewer.setLocalDescription(await viewer.createOffer())
    status, headers, answer = await asyncio.to_thread(
        served.call,
        "POST",
        session["addresses"]["whep"],
        viewer.localDescription.sdp.encode(),
        {"Content-Type": "application/sdp"},
    )
    assert status == 201 and headers["content-type"] == "application/sdp"
    await viewer.setRemoteDescription(RTCSessionDescription(answer.decode(), "answer"))
    try:
        received = [
            [await asyncio.wait_for(tracks[kind].recv(), 60) for _ in range(pictures)]
            for kind in ("video", "audio")
        ]
        viewers = await asyncio.to_thread(served.call, "GET", f"/v1/sessions/{session['session_id']}")
        assert viewers[2]["viewers"] == 1
        ended = await asyncio.to_thread(served.call, "DELETE", headers["location"])
        assert ended[0] == 200
    finally:
        await viewer.close()
    return received[0], received[1], headers["location"]


@needs_aiortc
def test_a_viewer_sees_and_hears_the_session(served, session):
    pictures, sounds, location = asyncio.run(watched(served, session, 20))
    assert {(picture.width, picture.height) for picture in pictures} == {(512, 512)}
    assert float(np.std(pictures[-1].to_ndarray(format="gray"))) > 20
    assert [sound.sample_rate for sound in sounds] == [48_000] * 20
    assert served.call("DELETE", location)[0] == 404
    assert served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["viewers"] == 0


@needs_aiortc
def test_pictures_and_sound_carry_counted_times():
    async def written() -> tuple[list[Any], list[Any]]:
        output = whep.PeerOutput(25)
        for _ in range(5):
            output.write(np.zeros((96, 64), np.uint8), np.zeros(640, np.float32))
        return [[await track.recv() for _ in range(5)] for track in (output.pictures, output.sound)]

    pictures, sounds = asyncio.run(written())
    assert [float(picture.pts * picture.time_base) for picture in pictures] == [0, 0.04, 0.08, 0.12, 0.16]
    assert [float(sound.pts * sound.time_base) for sound in sounds] == [0, 0.04, 0.08, 0.12, 0.16]


@needs_aiortc
def test_a_viewer_who_takes_nothing_is_skipped_forward():
    async def written() -> tuple[Any, Any]:
        output = whep.PeerOutput(25)
        for _ in range(100):
            output.write(np.zeros((96, 64), np.uint8), np.zeros(640, np.float32))
        await asyncio.sleep(0)
        return await output.pictures.recv(), await output.sound.recv()

    picture, sound = asyncio.run(written())
    expected = (100 - whep.FALLEN_BEHIND) * 0.04
    assert float(picture.pts * picture.time_base) == float(sound.pts * sound.time_base) == expected


@needs_aiortc
def test_an_offer_that_is_none_is_refused(served, session):
    status, _, answer = served.call("POST", session["addresses"]["whep"], b"v=0\r\n")
    assert (status, answer["error_code"]) == (400, "bad_input")
    assert served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["viewers"] == 0


def test_where_it_is_not_installed_a_hint_says_how(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="WebRTC") as refused:
        whep.check_available()
    assert "requirements-webrtc.txt" in refused.value.hint


def test_without_it_the_route_answers_501(monkeypatch):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from musetalk.server import live_http
    from musetalk.server.live import LiveSession, LiveSessions
    from tests.server.live_stand_ins import session as stand_in

    class One(LiveSessions):
        def get(self, session_id: str) -> LiveSession:
            return stand_in()

    monkeypatch.setattr(live_http, "check_available", lambda: (_ for _ in ()).throw(EngineError("x", "y")))
    app = FastAPI()
    app.include_router(live_http.live_router(One(None)))
    assert TestClient(app).post("/v1/sessions/a/whep", content=b"").status_code == 501


async def offered() -> str:
    from aiortc import RTCPeerConnection

    viewer = RTCPeerConnection()
    for kind in ("video", "audio"):
        viewer.addTransceiver(kind, direction="recvonly")
    await viewer.setLocalDescription(await viewer.createOffer())
    sdp = viewer.localDescription.sdp
    await viewer.close()
    return sdp


@needs_aiortc
def test_a_viewer_who_has_gone_leaves_nothing_in_the_session():
    live = stand_in_session()

    async def come_and_gone() -> None:
        peers = whep.Peers()
        peer_id, _ = await peers.answer(live, await offered())
        assert (len(live._listeners), len(live._outputs)) == (1, 1)
        assert await peers.close(peer_id) and not await peers.close(peer_id)

    asyncio.run(come_and_gone())
    assert (live._listeners, live._outputs, live._connected) == ((), (), 0)


@needs_aiortc
def test_a_viewer_who_comes_as_the_session_ends_is_refused_and_leaves_nothing():
    live = stand_in_session()
    live.end("enough")
    with pytest.raises(InputError, match="has ended"):
        asyncio.run(answered(live))
    assert (live._listeners, live._outputs, live._connected) == ((), (), 0)


async def answered(live: Any) -> None:
    await whep.Peers().answer(live, await offered())
