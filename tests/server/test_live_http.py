"""Live sessions as their clients meet them: sockets, uploads, streams, and sides that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import urllib.parse
import wave
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from musetalk.media.audio import read_waveform
from musetalk.media.fragments import begins_with_key
from musetalk.media.video import read_video
from musetalk.server import live_http
from musetalk.server.live_http import ENDED, NO_SESSION, mime_type
from tests.served import Served
from tests.server.live_stand_ins import session as stand_in_session

TEMPLATE = "小哈 (1)"
RATE = 16_000


def tone(seconds: float, rate: int = RATE) -> bytes:
    """A voice-like buzz, s16le."""
    t = np.arange(int(seconds * rate)) / rate
    return (8000 * np.sign(np.sin(2 * np.pi * 150 * t)) * np.sin(2 * np.pi * 3 * t)).astype("<i2").tobytes()


def wav(seconds: float) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(tone(seconds))
    return content.getvalue()


@pytest.fixture
def session(served: Served) -> Iterator[dict[str, Any]]:
    """A session of its own, ended behind the test."""
    status, _, answer = served.call("POST", "/v1/sessions", {"template_id": TEMPLATE})
    assert status == 201, answer
    yield answer
    served.call("DELETE", f"/v1/sessions/{answer['session_id']}")


def open_socket(served: Served, address: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{served.http_port}{address}", max_size=None)


def received(connection: ClientConnection, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first event that is wanted; those before it are passed over."""
    while True:
        event = json.loads(connection.recv(timeout=60))
        if wanted(event):
            return event


def is_state(state: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event.get("type") == "state" and event["state"] == state


def send(connection: ClientConnection, **message: Any) -> None:
    connection.send(json.dumps(message))


def test_a_session_says_where_it_is_and_how_many_fit(served, session):
    assert session["fps"] == 25 and (session["width"], session["height"]) == (512, 512)
    assert session["capacity"] == {"sessions": 3, "active": 1}
    status, _, told = served.call("GET", f"/v1/sessions/{session['session_id']}")
    assert status == 200 and told["addresses"] == session["addresses"]
    assert served.call("GET", "/v1/sessions")[2]["sessions"][0]["session_id"] == session["session_id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"template_id": "nobody"}, 404, "cache_missing"),
        ({"template_id": TEMPLATE, "fps": 1000}, 400, "bad_input"),
        ({"template_id": TEMPLATE, "fps": "x"}, 400, "bad_input"),
        ({"template_id": TEMPLATE, "width": 100_000}, 400, "bad_input"),
        ({"template_id": TEMPLATE, "width": -2}, 400, "bad_input"),
        ({}, 422, "usage"),
    ],
)
def test_what_cannot_be_a_session_takes_no_place(served, body, status, code):
    got, _, answer = served.call("POST", "/v1/sessions", body)
    assert (got, answer["error_code"]) == (status, code) and answer["hint"]
    assert served.call("GET", "/v1/sessions")[2]["capacity"]["active"] == 0


def test_beyond_the_capacity_a_session_is_refused_until_one_ends(served):
    started = [served.call("POST", "/v1/sessions", {"template_id": TEMPLATE})[2] for _ in range(3)]
    status, headers, answer = served.call("POST", "/v1/sessions", {"template_id": TEMPLATE})
    assert (status, answer["error_code"]) == (503, "busy") and int(headers["retry-after"]) > 0
    for one in started:
        assert served.call("DELETE", f"/v1/sessions/{one['session_id']}")[0] == 200
    assert served.call("GET", "/v1/sessions")[2]["capacity"]["active"] == 0


def test_speech_by_socket_is_talked_and_rested_from(served, session):
    with open_socket(served, session["addresses"]["audio"]) as audio:
        ready = received(audio, lambda event: True)
        assert (ready["type"], ready["sample_rate"], ready["state"]) == ("ready", RATE, "idle")
        content = tone(1.0)
        for at in range(0, len(content), 640):
            audio.send(content[at : at + 640])
        send(audio, type="speak_end")
        received(audio, is_state("talking"))
        assert received(audio, lambda e: e["type"] == "playback" and e["position"] >= 1)["position"] == 1.0
        received(audio, is_state("idle"))


def test_another_rate_may_be_named(served, session):
    with open_socket(served, session["addresses"]["audio"]) as audio:
        send(audio, type="config", sample_rate=48_000)
        audio.send(tone(1.0, 48_000))
        send(audio, type="speak_end")
        assert received(audio, lambda e: e["type"] == "playback" and e["position"] > 0.9)["position"] == 1.0


def test_an_interrupt_reports_what_was_shown(served, session):
    with open_socket(served, session["addresses"]["audio"]) as audio:
        audio.send(tone(10))
        received(audio, lambda e: e["type"] == "playback")
        send(audio, type="interrupt")
        position = received(audio, lambda e: e["type"] == "interrupted")["position"]
        assert 0 < position < 9
        told = served.call("GET", f"/v1/sessions/{session['session_id']}")[2]
        assert (told["state"], told["waiting_seconds"]) == ("idle", 0)


@pytest.mark.parametrize(
    "text",
    ["nonsense", "[]", "{}", '{"type": "fly"}', '{"type": "config", "sample_rate": "fast"}', "[" * 999],
)
def test_a_message_that_makes_no_sense_is_told_and_nothing_more(served, session, text):
    with open_socket(served, session["addresses"]["audio"]) as audio:
        audio.send(text)
        error = received(audio, lambda e: e["type"] == "error")
        assert error["error_code"] in ("usage", "bad_input") and error["hint"]
        send(audio, type="keep_alive")
        audio.send(tone(0.2))
        received(audio, is_state("talking"))


def form(content: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("how", ["form", "body", "raw"])
def test_speech_by_post(served, session, how):
    bodies = {
        "form": form(wav(1.0)),
        "body": (wav(1.0), {"Content-Type": "audio/wav"}),
        "raw": (tone(1.0, 8000), {"Content-Type": "audio/pcm;rate=8000"}),
    }
    with open_socket(served, session["addresses"]["audio"]) as audio:
        status, _, answer = served.call("POST", session["addresses"]["speech"], *bodies[how])
        assert (status, answer["seconds"]) == (200, pytest.approx(1.0, abs=0.01))
        received(audio, is_state("talking"))
        received(audio, is_state("idle"))


def test_what_is_no_sound_is_said_so_and_leaves_no_upload(served, session):
    speech = session["addresses"]["speech"]
    status, _, answer = served.call("POST", speech, b"no sound" * 99, {"Content-Type": "audio/wav"})
    assert (status, answer["error_code"]) == (400, "bad_input")
    assert served.call("POST", speech, *form(b""))[0] == 400
    left = [path for path in (served.folder / "output" / "uploads").rglob("*") if path.is_file()]
    assert not left


def seen(video: ClientConnection, fragments: int) -> tuple[dict[str, Any], bytes]:
    """What the stream says of itself, and its first fragments: about 48 are a second."""
    ready = json.loads(video.recv(timeout=60))
    return ready, b"".join(video.recv(timeout=60) for _ in range(fragments))


def test_the_stream_shows_the_mouth_move_to_the_sound_it_carries(served, session, speech, tmp_path):
    spoken = speech.read_bytes()
    with open_socket(served, session["addresses"]["video"]) as video:
        shown: list[bytes] = []
        watching = threading.Thread(target=lambda: shown.extend(seen(video, 145)), daemon=True)
        watching.start()
        with open_socket(served, session["addresses"]["audio"]) as audio:
            served.call("POST", session["addresses"]["speech"], spoken, {"Content-Type": "audio/flac"})
            received(audio, is_state("talking"))
        watching.join()
    ready, content = shown
    assert ready["mime"] == mime_type(content) and "avc1." in ready["mime"]
    path = tmp_path / "seen.mp4"
    path.write_bytes(content)
    frames = np.stack(list(read_video(path))).astype(np.int16)
    assert frames.shape[1:] == (512, 512, 3) and len(frames) > 20
    mouth = np.abs(np.diff(frames[:, 150:190, 200:250], axis=0)).mean()
    still = np.abs(np.diff(frames[:, 450:, :100], axis=0)).mean()
    assert mouth > 3 * still + 0.1
    assert np.abs(np.concatenate(list(read_waveform(path)))).max() > 0.05


def test_a_plain_player_may_take_the_stream_and_a_joiner_begins_at_a_key_frame(served, session):
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_socket(served, session["addresses"]["video"]))
        seen(first, 40)
        second = stack.enter_context(open_socket(served, session["addresses"]["video"]))
        second.recv(timeout=60)
        header, fragment = second.recv(timeout=60), second.recv(timeout=60)
        assert header[4:8] == b"ftyp" and begins_with_key(fragment[: fragment.find(b"mdat") - 4])
        with socket.create_connection(("127.0.0.1", served.http_port), 60) as plain:
            path = urllib.parse.quote(session["addresses"]["stream"])
            plain.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            content = b""
            while b"moof" not in content:
                content += plain.recv(1 << 16)
            assert b"video/mp4" in content and b"ftyp" in content
            assert served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["viewers"] == 3


def test_viewers_that_stall_vanish_and_come_again_hold_up_nobody(served, session):
    address = f"/v1/sessions/{session['session_id']}"
    stalled = socket.create_connection(("127.0.0.1", served.http_port), 60)
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.sendall(f"GET {session['addresses']['stream']} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    with open_socket(served, session["addresses"]["video"]) as good:
        received_fragments = 0
        while received_fragments < 40:
            message = good.recv(timeout=60)
            received_fragments += isinstance(message, bytes) and b"moof" in message
        for _ in range(3):
            with open_socket(served, session["addresses"]["video"]) as vanishing:
                vanishing.recv(timeout=60)
                vanishing.socket.shutdown(socket.SHUT_RDWR)
        stalled.close()
        while served.call("GET", address)[2]["viewers"] != 1:
            good.recv(timeout=60)


def test_metrics_and_status_tell_what_a_session_costs(served, session):
    def worked() -> dict[str, float]:
        text = served.call("GET", "/metrics")[2].decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    with open_socket(served, session["addresses"]["video"]) as video:
        before = worked()
        frames = served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["frames"]
        while served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["frames"] < frames + 75:
            video.recv(timeout=60)
    after = worked()
    assert after["musetalk_frames_total"] >= before["musetalk_frames_total"] + 25
    told = served.call("GET", f"/v1/sessions/{session['session_id']}")[2]["frame_ms"]
    assert set(told) == {"features", "generate", "composite", "output"} and min(told.values()) > 0
    for stage in told:
        name = f'musetalk_stage_seconds_sum{{stage="{stage}"}}'
        assert after[name] > before.get(name, 0.0)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_sockets_of_a_session_that_is_not_there_are_told_why(served, kind):
    with open_socket(served, f"/v1/sessions/none/{kind}") as connection:
        assert json.loads(connection.recv(timeout=60))["type"] == "error"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=60)
    assert closed.value.rcvd.code == NO_SESSION


def test_the_end_of_a_session_closes_what_belongs_to_it(served, session):
    with (
        open_socket(served, session["addresses"]["audio"]) as audio,
        open_socket(served, session["addresses"]["video"]) as video,
    ):
        seen(video, 20)
        served.call("DELETE", f"/v1/sessions/{session['session_id']}")
        received(audio, lambda event: event["type"] == "ended")
        codes = []
        for connection in (audio, video):
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    connection.recv(timeout=60)
            codes.append(closed.value.rcvd.code)
    assert codes == [ENDED, ENDED]
    assert (
        served.call("POST", session["addresses"]["speech"], wav(0.1), {"Content-Type": "audio/wav"})[0] == 404
    )
    assert served.call("DELETE", f"/v1/sessions/{session['session_id']}")[0] == 404


class Deaf:
    """A client's socket that takes nothing until he has sent all that he will."""

    def __init__(self, live, events: int, *, lost: bool = False):
        self.live, self.events, self.lost = live, events, lost
        self.sent: list[dict[str, Any]] = []
        self.reads, self.ended = asyncio.Event(), asyncio.Event()

    async def send_text(self, text: str) -> None:
        if self.lost:
            raise WebSocketDisconnect
        await self.reads.wait()
        self.sent.append(json.loads(text))
        if self.sent[-1].get("position") == self.events - 1:
            self.ended.set()

    async def receive(self) -> dict[str, Any]:
        for n in range(self.events):
            self.live._tell({"type": "playback", "position": n})
        for _ in range(3):
            await asyncio.sleep(0)
        self.reads.set()
        if self.events:
            await self.ended.wait()
        return {"type": "websocket.disconnect"}


@pytest.mark.parametrize("lost", [False, True])
def test_a_socket_leaves_no_listener_in_its_session(lost):
    live = stand_in_session()

    async def conversed() -> Deaf:
        client = Deaf(live, 0, lost=lost)
        with contextlib.suppress(WebSocketDisconnect):
            await live_http._converse(client, live)
        return client

    asyncio.run(conversed())
    assert live._listeners == ()


def test_a_client_who_does_not_read_is_told_only_the_newest():
    live = stand_in_session()

    async def conversed() -> Deaf:
        client = Deaf(live, 5000)
        await live_http._converse(client, live)
        return client

    client = asyncio.run(conversed())
    assert client.sent[-1]["position"] == 4999 and len(client.sent) <= live_http.MAX_EVENTS + 1
