"""The two older callers' ways, on bare sockets: JSON by lines, kept open, and JSON behind its length."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from musetalk.media.video import probe_video, read_video
from musetalk.server.tcp import MAX_MESSAGE, both_spellings, parse_message
from musetalk.tools.demo import PORTRAIT, SPEECH

TEMPLATE = "小哈 (1)"
DECODER = json.JSONDecoder()


class Client:
    """Reads as that caller does: until what came parses, for the reply has no length."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._left = ""

    def send(self, **request: Any) -> None:
        self.connection.sendall(json.dumps(request, ensure_ascii=False).encode() + b"\n")

    def reply(self) -> dict[str, Any]:
        content = self._left.encode()
        while True:
            try:
                answer, end = DECODER.raw_decode(content.decode().lstrip())
                self._left = content.decode().lstrip()[end:].lstrip()
                return answer
            except ValueError:
                block = self.connection.recv(1024)
                assert block, f"closed after {content!r}"
                content += block

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.reply()


@pytest.fixture
def client(served):
    with served.lines() as connection:
        yield Client(connection)


def inference(folder: Path, name: str = "a.mp4") -> dict[str, Any]:
    return {
        "command": "inference",
        "template_id": TEMPLATE,
        "audio_path": str(SPEECH),
        "output_path": str(folder / name),
        "template_dir": str(folder),
        "cache_dir": str(folder),
        "batch_size": 8,
        "fps": 25,
        "bbox_shift": 0,
        "parsing_mode": "jaw",
    }


def test_ping_in_both_spellings(client):
    answer = client.ask(command="ping")
    assert answer["success"] is True and answer["message"] == "pong" and answer["timestamp"] > 1.7e9
    assert answer["modelLoaded"] is answer["model_loaded"] is True


def test_status_has_the_caller_s_keys(client):
    answer = client.ask(command="status")
    wanted = {"success", "status", "modelLoaded", "device", "cacheDir", "activeThreads", "uptime", "version"}
    assert answer.keys() >= wanted and answer["device"] == "cpu"


def test_check_cache_tells_where_the_cache_is(client, served):
    answer = client.ask(command="check_cache", template_id=TEMPLATE)
    assert answer["success"] is True and answer["cacheExists"] is True
    for key in ("cachePath", "metadataPath"):
        assert (served.folder / answer[key]).is_file()
    answer = client.ask(command="check_cache", template_id="nobody")
    assert (answer["success"], answer["cacheExists"]) == (True, False) and answer["error"]


@pytest.fixture(scope="module")
def other_cache(served, tmp_path_factory) -> Path:
    """Another cache folder, whose template of the same id has frames of another size."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("another cache 缓存")
    Image.open(PORTRAIT).resize((384, 384)).save(folder / "small.png")
    with served.lines() as connection:
        request = {"template_id": TEMPLATE, "template_image_path": str(folder / "small.png")}
        answer = Client(connection).ask(command="preprocess", cache_dir=str(folder), **request)
    assert answer["success"] is True and Path(answer["metadata"]["cache_path"]).parent == folder
    return folder


def test_a_request_s_own_cache_folder_is_used_in_both_protocols(client, served, other_cache, tmp_path):
    request = {**inference(tmp_path), "cache_dir": str(other_cache)}
    assert client.ask(**request)["success"] is True
    assert probe_video(tmp_path / "a.mp4").width == 384
    _, answer = framed(served, json.dumps({**request, "output_path": str(tmp_path / "b.mp4")}).encode())
    assert answer["Success"] is True and probe_video(tmp_path / "b.mp4").width == 384
    assert client.ask(**inference(tmp_path, "c.mp4"))["success"] is True
    assert probe_video(tmp_path / "c.mp4").width == 512, "the worker's own template of that id is another"
    answer = client.ask(command="check_cache", template_id=TEMPLATE, cache_dir=str(other_cache))
    assert answer["cacheExists"] is True and Path(answer["cachePath"]).parent == other_cache


def test_a_named_cache_folder_without_the_template_leaves_it_to_the_worker_s_own(client, served, tmp_path):
    """This caller preprocesses without naming a folder, and names one when it renders."""
    for folder in (tmp_path, tmp_path / "none", served.folder / "cache" / TEMPLATE):
        assert client.ask(**{**inference(tmp_path), "cache_dir": str(folder)})["success"] is True
    answer = client.ask(**{**inference(tmp_path), "cache_dir": str(tmp_path), "template_id": "nobody"})
    assert answer["errorType"] == "CacheMissingError"


def test_a_picture_in_template_dir_is_made_into_the_named_cache_folder(client, served, tmp_path):
    (tmp_path / "fresh.jpg").write_bytes(PORTRAIT.read_bytes())
    request = {**inference(tmp_path), "template_id": "fresh", "cache_dir": str(tmp_path / "cache")}
    assert client.ask(**request)["success"] is True
    assert (tmp_path / "cache" / "fresh_preprocessed.pkl").is_file()
    assert client.ask(command="check_cache", template_id="fresh")["cacheExists"] is False


def test_preprocess_and_inference(client, tmp_path):
    answer = client.ask(
        command="preprocess",
        template_id="by line",
        template_image_path=str(PORTRAIT),
        bbox_shift=0,
        parsing_mode="jaw",
    )
    assert answer["success"] is True and answer["templateId"] == "by line" and answer["processTime"] > 0
    answer = client.ask(**inference(tmp_path, "视频.mp4"))
    assert answer["success"] is True and answer["inferenceTime"] > 0 and answer["templateId"] == TEMPLATE
    assert answer["resultPath"] == answer["result_path"] == str(tmp_path / "视频.mp4")
    assert len(list(read_video(tmp_path / "视频.mp4"))) == 190


def test_articulation_shapes_an_inference(client, tmp_path):
    usual, wide = (
        client.ask(**inference(tmp_path, f"{value}.mp4"), articulation=value) for value in (1, "1.5")
    )
    assert usual["success"] is wide["success"] is True
    assert (tmp_path / "1.mp4").read_bytes() != (tmp_path / "1.5.mp4").read_bytes()


def test_replies_keep_the_order_of_requests(client, tmp_path):
    client.send(**inference(tmp_path))
    client.send(command="ping")
    client.send(command="status")
    assert client.reply()["resultPath"] and client.reply()["message"] == "pong" and client.reply()["uptime"]


def test_others_are_answered_while_an_inference_runs(client, served, tmp_path):
    client.send(**inference(tmp_path))
    with served.lines() as other:
        assert Client(other).ask(command="ping")["success"] is True
        client.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connection.recv(1)
    client.connection.setblocking(True)
    assert client.reply()["success"] is True


def test_a_failure_is_an_answer_with_its_kind(client, tmp_path):
    answer = client.ask(**{**inference(tmp_path), "template_id": "nobody"})
    assert answer["success"] is False and answer["error"] and answer["errorType"] == "CacheMissingError"
    answer = client.ask(**{**inference(tmp_path), "audio_path": str(tmp_path / "missing.wav")})
    assert answer["success"] is False and answer["errorType"] == "InputError"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": "many"},
        {"batch_size": -1},
        {"batch_size": [1]},
        {"fps": "fast"},
        {"fps": 1e999},
        {"fps": [25]},
        {"articulation": 1.6},
        {"articulation": "wide"},
        {"articulation": None},
        {"template_id": 7},
        {"template_id": "../../x"},
        {"audio_path": None},
        {"output_path": "\0"},
        {"output_path": "/proc/1/x.mp4"},
        {"audio_path": "x" * 5000},
        {"audio_path": "\ud800"},
    ],
)
def test_values_of_the_wrong_kind_are_the_caller_s_mistake(client, tmp_path, changed):
    client.connection.sendall(json.dumps({**inference(tmp_path), **changed}).encode() + b"\n")
    answer = client.reply()
    assert answer["success"] is False and answer["error_code"] != "internal", answer
    assert client.ask(command="ping")["success"] is True


def test_an_object_in_pieces_and_several_in_one(client):
    for byte in b'{"command": "ping"}\n':
        client.connection.sendall(bytes([byte]))
    assert client.reply()["success"] is True
    client.connection.sendall(b'\n  \n{"command":"ping"}\r\n{"command":"status"}\n')
    assert client.reply()["message"] == "pong" and client.reply()["status"] == "running"


def test_unknown_commands_and_objects_that_are_none_are_told(client):
    assert "unknown command" in client.ask(command="dance")["error"]
    client.connection.sendall(b'{"command": \n')
    assert client.reply()["error_code"] == "usage"
    assert client.ask(command="ping")["success"] is True


def test_a_browser_page_cannot_make_its_browser_speak_lines(served, tmp_path):
    """HTTP, as a page may send it across origins; its body is a command."""
    body = json.dumps(inference(tmp_path)) + "\n"
    with served.lines() as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n\r\n{body}".encode())
        heard = b""
        while block := _received(connection):
            heard += block
    assert heard.count(b"\n") == 1 and json.loads(heard)["success"] is False
    assert not list(tmp_path.iterdir())


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""


def test_a_line_without_end_is_cut_off(served):
    with served.lines() as connection, pytest.raises(OSError):
        for _ in range(64):
            connection.sendall(b'{"a": "' + b"x" * (MAX_MESSAGE // 8))
        while connection.recv(1 << 16):
            pass
        raise ConnectionResetError
    with served.lines() as connection:
        assert Client(connection).ask(command="ping")["success"] is True


def test_a_client_that_vanishes_disturbs_nobody(served, tmp_path):
    with served.lines() as connection:
        Client(connection).send(**inference(tmp_path))
    with served.lines() as connection:
        assert Client(connection).ask(command="ping")["success"] is True


def framed(served, body: bytes) -> tuple[bytes, dict[str, Any] | None]:
    """The first read and the whole answer of a request behind its length."""
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=60) as connection:
        connection.sendall(struct.pack("<I", len(body)) + body)
        first = content = _received(connection)
        while block := _received(connection):
            content += block
    return first, json.loads(content[4:]) if content else None


def test_framed_answer_leaves_in_one_write(served, tmp_path):
    request = {key: value for key, value in inference(tmp_path).items() if key != "command"}
    first, answer = framed(served, json.dumps(request).encode())
    assert struct.unpack("<I", first[:4])[0] == len(first) - 4
    assert answer["Success"] is True and answer["OutputPath"] == str(tmp_path / "a.mp4")
    assert len(list(read_video(tmp_path / "a.mp4"))) == 190


@pytest.mark.parametrize(
    "body", [b"{}", b"[1]", b"\xff\xff", b'{"template_id": "\\ud800", "audio_path": "\\ud800"}']
)
def test_framed_failure_is_an_answer_in_its_case(served, body):
    _, answer = framed(served, body)
    assert answer["Success"] is False and answer["OutputPath"] == "" and answer["Error"]


def test_framed_request_may_come_byte_by_byte(served):
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in struct.pack("<I", 2) + b"{}":
            connection.sendall(bytes([byte]))
        assert json.loads(connection.recv(1 << 16)[4:])["Success"] is False


def test_a_length_of_gigabytes_takes_no_memory(served):
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=60) as connection:
        connection.sendall(struct.pack("<I", MAX_MESSAGE + 1))
        assert _received(connection) == b""


def test_several_clients_get_their_own(served, tmp_path):
    answers: dict[int, dict[str, Any]] = {}

    def call(number: int) -> None:
        with served.lines() as connection:
            answers[number] = Client(connection).ask(**inference(tmp_path, f"{number}.mp4"))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[n]["resultPath"] for n in range(3)] == [str(tmp_path / f"{n}.mp4") for n in range(3)]


def test_one_address_has_as_many_connections_by_line_as_it_may(start_worker):
    worker = start_worker("--client_connections", "2")
    with worker.lines() as first, worker.lines() as second:
        assert all(Client(one).ask(command="ping")["success"] for one in (first, second))
        with worker.lines() as third:
            assert _received(third) == b""
    answered = False
    while not answered:  # once the worker has seen that they are closed
        with worker.lines() as again, contextlib.suppress(OSError, AssertionError):
            answered = Client(again).ask(command="ping")["success"]


def test_both_spellings():
    assert both_spellings({"model_loaded": 1, "a": 2}) == {"model_loaded": 1, "modelLoaded": 1, "a": 2}


@pytest.mark.parametrize("content", [b'{"a":' * 40 + b"1" + b"}" * 40, b"[" * 10**6, b"1", b"", b'{"a": 1'])
def test_what_is_no_shallow_object_is_refused_quickly(content):
    began = time.process_time()
    with pytest.raises(ValueError, match="request"):
        parse_message(content)
    assert time.process_time() - began < 5, "bounded work for a bounded message"
