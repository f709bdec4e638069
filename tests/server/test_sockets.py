"""What becomes of a connection whose headers have ended: it is the next protocol's, with its time limits."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest

from musetalk.server import serve

HEADERS = 0.2  # seconds that a client has for its headers here
MOST = 3  # connections of one address


async def late_words(scope, receive, send):
    """An application whose socket says something long after the headers' time."""
    if scope["type"] == "lifespan":
        return
    await receive()
    await send({"type": "websocket.accept"})
    await asyncio.sleep(3 * HEADERS)
    await send({"type": "websocket.send", "text": "still here"})
    await receive()


@pytest.fixture
def address(monkeypatch):
    """The port of an HTTP server in this process, with little patience for headers."""
    monkeypatch.setattr(serve, "HEADER_SECONDS", HEADERS)
    taken = socket.create_server(("127.0.0.1", 0))
    server = serve._HttpServer(serve._http_config(late_words, SimpleNamespace(client_connections=MOST)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([taken])), daemon=True)
    thread.start()
    yield taken.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def test_a_websocket_outlives_the_time_for_headers(address):
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{address}/v1/sessions/x/video") as viewer:
        assert viewer.recv(timeout=20) == "still here"


def test_headers_that_never_end_are_hung_up_on(address):
    with socket.create_connection(("127.0.0.1", address), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        assert client.recv(1000) == b""


def test_an_address_has_as_many_connections_as_it_may(address, monkeypatch):
    monkeypatch.setattr(serve, "HEADER_SECONDS", 600)
    kept = [socket.create_connection(("127.0.0.1", address), timeout=20) for _ in range(MOST)]
    try:
        with socket.create_connection(("127.0.0.1", address), timeout=20) as refused:
            assert refused.recv(1) == b""
    finally:
        for connection in kept:
            connection.close()
