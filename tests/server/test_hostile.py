"""Ten thousand messages that no caller would send, on both ports; others are answered meanwhile.

The messages come from a seed: a failure is found again by its number.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading

from tests.server.test_tcp import Client

MESSAGES = 10_000
PER_CONNECTION = 50
VALUES = (
    *("", "x", "../x", "/etc/passwd", "C:\\x", "\0", "\ud800", "小哈 (1)", "a" * 300, "nul"),
    *(None, True, 0, -1, 1e308, 2**70, [], [[]], {}, {"a": 1}),
)
KEYS = (
    *("command", "template_id", "audio_path", "output_path", "template_image_path", "image_path", "fps"),
    *("batch_size", "bbox_shift", "parsing_mode", "cache_dir", "template_dir", "session_id", "segment_index"),
)
COMMANDS = ("ping", "status", "check_cache", "preprocess", "inference", "", "PING", "exec", "__init__")
PATHS = (
    *("/", "/health", "/api/status", "/api/initialize", "/api/start_session", "/api/process_segment"),
    *("/api/preprocess_template", "/api/end_session/x", "/videos/x.mp4", "/videos/..%2f..%2fetc%2fpasswd"),
    *("/videos/%00.mp4", "/v1/videos", "/v1/videos/video_x", "/v1/templates", "/v1/templates/%2e%2e"),
    *("/v1/templates/x/preview", "/worker/run", "/worker/proof", "/metrics", "/docs", "/openapi.json"),
    *("/capabilities", "/%ff", "//", "/v1/sessions", "/v1/sessions/x"),
)


def an_object(rng: random.Random) -> bytes:
    chosen = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(rng.randrange(6))}
    if rng.random() < 0.7:
        chosen["command"] = rng.choice(COMMANDS)
    return json.dumps(chosen).encode()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The message, or less, more or other than it."""
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        at = rng.randrange(len(content) + 1)
        return content[:at] + rng.randbytes(rng.randrange(9)) + content[at:]
    if kind == 2:
        return rng.randbytes(rng.randrange(60))
    return content if kind == 3 else b"[" * rng.randrange(200) + content


def a_line(rng: random.Random) -> bytes:
    return damaged(rng, an_object(rng)) + b"\n"


def a_frame(rng: random.Random) -> bytes:
    body = damaged(rng, an_object(rng))
    length = len(body) if rng.random() < 0.8 else rng.randrange(1 << 32)
    return struct.pack("<I", length) + body


def an_http_request(rng: random.Random) -> bytes:
    body = damaged(rng, an_object(rng)) if rng.random() < 0.6 else b""
    method = rng.choice(("GET", "POST", "POST", "DELETE", "PUT", "HEAD", "X"))
    host = rng.choice(("localhost", "localhost", "localhost", "evil.example", "[", ""))
    kinds = ("application/json", "text/plain", "multipart/form-data; boundary=x", "multipart/form-data")
    kind = rng.choice(kinds)
    length = len(body) if rng.random() < 0.95 else rng.randrange(10**6)
    head = f"{method} {rng.choice(PATHS)} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
    content = head.encode() + f"Content-Length: {length}\r\nConnection: close\r\n\r\n".encode() + body
    return damaged(rng, content) if rng.random() < 0.1 else content


def is_whole(message: bytes) -> bool:
    """Whether an HTTP request has all that its length promises, so that an answer is owed to it."""
    head, gap, body = message.partition(b"\r\n\r\n")
    return gap != b"" and f"Content-Length: {len(body)}\r\nConnection: close".encode() in head


def exchange(port: int, messages: list[bytes], *, whole: bool = False) -> bytes:
    """What comes back, read to the end; whoever is hung up on has had his answer."""
    heard = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            for message in messages:
                connection.sendall(message)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(1 << 16):
                heard += block
    except OSError:
        pass
    return heard


def fuzz(served, seed: int, count: int) -> list[str]:
    """Answers that no message may get."""
    rng, wrong = random.Random(seed), []
    for _ in range(count // PER_CONNECTION):
        kind = rng.randrange(3)
        if kind == 0:
            for _ in range(PER_CONNECTION // 2):
                heard = exchange(served.tcp_port, [a_line(rng), a_line(rng)])
                wrong += [line.decode() for line in heard.splitlines() if b'"internal"' in line]
            continue
        make = a_frame if kind == 1 else an_http_request
        for _ in range(PER_CONNECTION):
            message = make(rng)
            heard = exchange(served.http_port, [message])
            if b'"internal"' in heard or heard.startswith(b"HTTP/1.1 500") or b"root:" in heard:
                wrong.append(repr((message, heard[-300:])))
    return wrong


def test_ten_thousand_messages_hurt_nobody(served):
    wrong: list[str] = []
    threads = [
        threading.Thread(target=lambda seed=seed: wrong.extend(fuzz(served, seed, MESSAGES // 4)))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    answered = 0
    while any(thread.is_alive() for thread in threads):
        with served.lines() as connection:
            assert Client(connection).ask(command="ping")["success"] is True
        assert served.call("GET", "/health")[0] == 200
        answered += 1
        threads[0].join(0.2)
    assert not wrong, wrong[:5]
    assert answered and served.process.poll() is None
    outside = {path.name for path in served.folder.iterdir()} - {"cache", "videos", "output"}
    assert not outside, "nothing is written where nobody asked for it"
