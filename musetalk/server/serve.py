"""The worker's life: warm-up, listening on its ports, and an end that finishes what runs.

The decision a reader would question: HTTP and the framed protocol share a port. The first four bytes tell
them apart: a length of less than 16 MB ends in a zero byte, a method's name doesn't.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from musetalk.announcement import Announcement, announced, engine_settings
from musetalk.errors import OutputError
from musetalk.server.callers import Callers
from musetalk.server.commands import Overheard
from musetalk.server.gate import is_loopback
from musetalk.server.http import create_app
from musetalk.server.tcp import MAX_CONNECTIONS, MAX_MESSAGE, FramedProtocol, LineProtocol
from musetalk.server.worker import Worker

log = logging.getLogger(__name__)

BACKLOG = 512  # connections that the system holds until they are taken
KEEP_ALIVE = 75  # seconds that an HTTP connection is kept between two requests
HEADER_SECONDS = 60.0  # for a request's first line and headers to arrive in
HOUSEKEEPING_SECONDS = 30  # between two looks at what is to be swept
DEADLINE_SECONDS = 1  # between two looks at what is overdue


def serve(worker: Worker, say: Callable[[str], None]) -> dict[str, Any]:
    """Warms the worker up, serves until it is asked to stop, and tells how it ended.

    Args:
        say: takes a line for a person.

    Raises:
        OutputError: a port is taken, by another worker perhaps.
    """
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(_bound(worker.server.host, worker.server.http_port))
        lines = stack.enter_context(_bound(worker.server.host, worker.server.tcp_port))
        stack.callback(worker.close)
        worker.warm_up(say)
        return asyncio.run(_serve(worker, http, lines, say, start))


async def _serve(
    worker: Worker, http: socket.socket, lines: socket.socket, say: Callable[[str], None], start: float
) -> dict[str, Any]:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    _stop_on_signals(loop, stopping)
    callers = Callers(worker)
    server = _HttpServer(_http_config(create_app(worker, callers), FramedProtocol(callers)))
    line_server = await asyncio.start_server(
        LineProtocol(callers, stopping.set).serve, sock=lines, limit=MAX_MESSAGE
    )
    running = asyncio.create_task(server.serve([http]))
    housekeeping = asyncio.create_task(keep_house(callers))
    seconds = time.perf_counter() - start
    host, port = http.getsockname()[:2]
    with _announced(worker, port):
        tcp = lines.getsockname()[1]
        say(f"✅ ready in {seconds:.1f} s 服务就绪: http://{host}:{port} · tcp {host}:{tcp}")
        await _first(stopping.wait(), running)
        say("stopping, what runs is finished first 正在停止")
        worker.draining = True
    with ThreadPoolExecutor(1, "drain") as apart:  # the loop's threads may all wait for what is drained
        finished = await loop.run_in_executor(apart, worker.drain)
    housekeeping.cancel()
    callers.jobs.close()
    line_server.close()
    server.should_exit = True
    server.force_exit = not finished
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(running, 2)
    words = "everything was finished" if finished else "what still ran was cut off"
    return {"success": True, "message": f"✅ worker ended 服务已停止, {words}", "finished": finished}


def _announced(worker: Worker, port: int) -> AbstractContextManager[None]:
    """Tells the commands of this machine, where they can reach the worker and use its paths."""
    if not is_loopback(worker.server.host):
        return contextlib.nullcontext()
    logging.getLogger("musetalk").addHandler(Overheard())
    devices = [place.scheduler.device for place in worker.places]
    settings = engine_settings(worker.service.config)
    worker.announcement = Announcement(os.getpid(), worker.server.host, port, devices, settings)
    return announced(worker.service.store.cache_dir, worker.announcement)


async def keep_house(callers: Callers) -> None:
    """Sweeps now and then, and ends what is overdue at once: neither waits for the other."""
    await asyncio.gather(
        _repeat(callers.keep_house, HOUSEKEEPING_SECONDS), _repeat(callers.end_overdue, DEADLINE_SECONDS)
    )


async def _repeat(work: Callable[[], None], seconds: float) -> None:
    """Does `work` for ever, `seconds` after it was done last; one that failed is logged."""
    while True:
        try:
            await asyncio.to_thread(work)
        except Exception:
            log.exception("housekeeping failed, it is tried again")
        await asyncio.sleep(seconds)


async def _first(*waits: Any) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _stop_on_signals(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if threading.current_thread() is threading.main_thread() and hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: loop.call_soon_threadsafe(stopping.set))


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket's address, taken before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        if sys.platform != "win32":  # there it would let two workers take one port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
            taken.listen(BACKLOG)
        except OSError as e:
            raise OutputError(
                f"{host}:{port} can't be listened on 端口无法监听: {e.strerror or e}",
                "a worker may run there already; stop it or choose another --http_port or --port",
            ) from e
        yield taken


class _HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_config(app: Any, framed: FramedProtocol) -> uvicorn.Config:
    class Protocol(_EitherProtocol):
        other = framed

    return uvicorn.Config(
        app,
        http=Protocol,
        log_level="warning",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
    )


class _EitherProtocol(H11Protocol):
    """HTTP, or the framed protocol where the connection's first bytes are a length."""

    other: FramedProtocol
    _first_bytes: bytes | None = b""
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS or self._has_too_many():
            transport.close()
        self._await_headers()

    def _has_too_many(self) -> bool:
        """Whether this address has more connections than one may."""
        limit = self.other.client_connections
        if limit is None or self.client is None:
            return False
        addresses = [getattr(one, "client", None) or ("", 0) for one in self.connections]
        return sum(address[0] == self.client[0] for address in addresses) > limit

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._stop_waiting()  # the protocol that takes over has time limits of its own
        super().handle_websocket_upgrade(event)

    def _await_headers(self) -> None:
        """Ends the connection of a client that never gets to the end of its headers."""
        if self._patience is None:
            self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _http_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_protocol() is not self:
            return
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers()
        else:
            self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        if self._first_bytes is None:
            self._http_received(data)
            return
        self._first_bytes += data
        if len(self._first_bytes) < 4:
            return
        data, self._first_bytes = self._first_bytes, None
        if data[3] != 0:
            self._http_received(data)
            return
        self._hand_over(data)

    def _hand_over(self, data: bytes) -> None:
        self._stop_waiting()
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        reader = asyncio.StreamReader(limit=MAX_MESSAGE, loop=self.loop)
        protocol = asyncio.StreamReaderProtocol(reader, self.other.serve, loop=self.loop)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(data)
