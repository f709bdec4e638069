"""The resident worker on Ray Serve: as many as the load asks for, behind one address.

    pip install -r requirements-ray.txt
    MUSETALK_TOKEN=… serve run ray_serve:application min_replicas=1 max_replicas=8 num_gpus=0.5

from this folder, with the project on PYTHONPATH. Every replica of `Engine` is a whole worker with all its
calls; `Front` passes each call on. Who sets no token runs on the loopback address alone, on one machine.

The decision a reader would question: calls go to a replica's own HTTP port, not through Serve's handles:
sessions stream both ways for hours and belong to one replica. What Serve sees instead is a lease: a request
to the replica that lasts as long as the call or the session. So its router, autoscaler and draining know the
load that there is. A replica that dies takes the sessions it held along, nothing else.
"""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, WebSocket
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.util import get_node_ip_address
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.websockets import WebSocketDisconnect

from musetalk.config import Defaults, EngineConfig, ServerConfig
from musetalk.server.callers import Callers
from musetalk.server.gate import refusal_body
from musetalk.server.http import create_app
from musetalk.server.serve import keep_house
from musetalk.server.worker import Worker

LEASE_SECONDS = 60.0  # that a call waits for a replica with room, a new one perhaps
LOOK_SECONDS = 2.0  # between two looks at which sessions live
SILENT_SECONDS = 660.0  # after which a session of segments has ended by itself
KNOWN_PLACES = 100_000  # sessions and jobs whose replica is remembered
MAX_JSON = 1 << 20  # bytes of a body that is read to find a session's id in it
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length"}
IN_BODY = ("/api/start_session", "/api/process_segment", "/v1/sessions")
TWICE_IS_HARMLESS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")
NO_ROOM = (BackPressureError, RayServeException, RayError, asyncio.TimeoutError, StopAsyncIteration)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
SOCKET_BYTES = 16 << 20  # of a message


class Options(BaseModel):
    """What `serve run` or a RayService's `args` may say.

    Attributes:
        min_replicas, max_replicas: workers.
        fronts: replicas of `Front`.
        target: calls and sessions that a replica should have; more of them ask for another replica.
        most: that a replica is given at once.
        num_cpus, num_gpus: that each takes of its node.
        templates: that a replica is known to have open; calls for those go to it first.
        upscale_delay, downscale_delay: seconds that the load has to last.
        look_back: seconds whose mean load counts.
        grace: seconds that a replica which is taken away has to finish in.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target: float = 2.0
    most: int = 8
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    templates: int = 16
    upscale_delay: float = 10.0
    downscale_delay: float = 300.0
    look_back: float = 30.0
    grace: float = 600.0
    fronts: int = 1
    engine: str = EngineConfig.engine
    device: str = EngineConfig.device
    cache_dir: str = os.environ.get("MUSE_TEMPLATE_CACHE_DIR", Defaults.cache_dir)
    videos_dir: str = os.environ.get("MUSE_VIDEOS_DIR", str(ServerConfig.videos_dir))
    temp_dir: str = os.environ.get("MUSE_TEMP_DIR", str(ServerConfig.temp_dir))


def settings_of(options: Options) -> ServerConfig:
    """A replica's addresses and limits; none of one address, since all callers have `Front`'s."""
    token = os.environ.get("MUSETALK_TOKEN", "")
    return ServerConfig(
        host=get_node_ip_address() if token else "127.0.0.1",
        videos_dir=Path(options.videos_dir).absolute(),
        temp_dir=Path(options.temp_dir).absolute(),
        max_sessions=options.most,
        grace=min(options.grace, 3600.0),
        token=token,
        client_connections=None,
        client_uploads=None,
        client_jobs=None,
        client_sessions=None,
    )


@serve.deployment
class Engine:
    """A worker on a port of its own, for as long as its replica lives."""

    def __init__(self, options: Options) -> None:
        server = settings_of(options)
        config = EngineConfig(engine=options.engine, device=options.device)  # type: ignore[arg-type]
        self.worker = Worker(Path(options.cache_dir).absolute(), config, server, (options.device,))
        self.worker.warm_up(lambda line: None)
        self._open = serve.multiplexed(max_num_models_per_replica=options.templates)(_open_template)
        self._callers = Callers(self.worker)
        self._socket = socket.create_server((server.host, 0))
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        self._thread = threading.Thread(target=self._run, name="worker-http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        app = create_app(self.worker, self._callers)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            loop="asyncio",
            ws="websockets-sansio",
            ws_max_size=SOCKET_BYTES,
        )

        async def run() -> None:
            housekeeping = asyncio.create_task(keep_house(self._callers))
            await uvicorn.Server(config).serve([self._socket])
            housekeeping.cancel()

        asyncio.run(run())

    def check_health(self) -> None:
        """Raises where the worker no longer answers; Serve then replaces the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker's server has ended")

    async def lend(self) -> AsyncIterator[str]:
        """Gives the worker's address; the lease lasts until the caller ends it."""
        template_id = serve.get_multiplexed_model_id()
        if template_id:
            with contextlib.suppress(Exception):  # the call itself is told what is wrong with its template
                await self._open(self, template_id)
        yield self.address
        await asyncio.Event().wait()

    async def holds(self, name: str) -> str:
        """The worker's address where it has that session or runs that job; "" where not."""
        known = self._callers.jobs.running(name) is not None or self._callers.sessions.holds(name)
        return self.address if known or await self._has_live(name) else ""

    async def _has_live(self, name: str) -> bool:
        token = {"Authorization": f"Bearer {self.worker.server.token}"}
        url = f"http://{self.address}/v1/sessions/{name}"
        async with aiohttp.ClientSession(headers=token) as client, client.get(url) as answer:
            return answer.status == 200

    def __del__(self) -> None:
        """Ends what still runs: all leases are over, or the grace is."""
        worker = getattr(self, "worker", None)
        if worker is not None:
            worker.draining = worker.stopping = True
            worker.close()


async def _open_template(engine: Any, template_id: str) -> Any:
    place = engine.worker.place_for(template_id)
    return await asyncio.to_thread(place.service.renderer().open, template_id)


@dataclass
class Lease:
    """A session's hold on its replica.

    Attributes:
        stream: ends it when it is cancelled.
        address: the replica's.
        live: whether the replica can be asked for it.
        used: when it was called last.
    """

    stream: Any
    address: str
    live: bool
    used: float


def session_of(path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The session or job that a call belongs to; "" where it belongs to none."""
    parts = path.split("/")
    if path.startswith(("/v1/sessions/", "/v1/videos/", "/api/end_session/")):
        return parts[3]
    if path in ("/api/start_session", "/api/process_segment"):
        return str(body.get("session_id") or "")
    return headers.get("idempotency-key", "") if path == "/v1/videos" else ""


def _begun(request: Request, answer: aiohttp.ClientResponse, name: str) -> str:
    """The session or job that an answer says has begun."""
    location = answer.headers.get("location", "")
    if answer.status in (200, 201) and location.startswith(("/v1/sessions/", "/v1/videos/")):
        return location.split("/")[3]
    return name if answer.status == 200 and request.url.path == "/api/start_session" else ""


def _forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in HOP_BY_HOP}


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body) if len(body) <= MAX_JSON else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def told(status: int, words: str, headers: Mapping[str, str] | None = None) -> Response:
    """A failure in the words of the worker."""
    code = {404: "bad_input", 503: "busy"}[status]
    return JSONResponse(refusal_body(code, words), status, dict(headers or {}))


def busy() -> Response:
    """No replica has room, nor came one in time."""
    return told(503, "all workers are busy 服务繁忙", {"Retry-After": "5"})


async def _relay(outer: WebSocket, inner: aiohttp.ClientWebSocketResponse) -> None:
    """Messages both ways until one side closes."""

    async def inwards() -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await outer.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if message.get("bytes") is not None:
                    await inner.send_bytes(message["bytes"])
                else:
                    await inner.send_str(message["text"])

    async def outwards() -> None:
        async for message in inner:
            if message.type == aiohttp.WSMsgType.BINARY:
                await outer.send_bytes(message.data)
            elif message.type == aiohttp.WSMsgType.TEXT:
                await outer.send_text(message.data)

    tasks = [asyncio.ensure_future(work()) for work in (inwards, outwards)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(RuntimeError):
        await outer.close(inner.close_code or 1000)


# below everything that it uses: Serve takes a copy of it here
front = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)


@serve.deployment
@serve.ingress(front)
class Front:
    """Passes calls on to the replica that has their session, or to one with room."""

    def __init__(self, engines: Any) -> None:
        self._engines = engines
        self._places: OrderedDict[str, str] = OrderedDict()
        self._leases: dict[str, Lease] = {}
        self._client: aiohttp.ClientSession | None = None
        self._watch: asyncio.Task[None] | None = None

    @front.api_route("/{path:path}", methods=METHODS)
    async def call(self, request: Request) -> Response:
        """One HTTP call."""
        path, body, said = request.url.path, None, {}
        if request.method == "POST" and path in IN_BODY:
            body = await request.body()
            said = _json_object(body)
        name = session_of(path, said, request.headers)
        address = await self._place_of(name) if name else ""
        if address:
            if (lease := self._leases.get(name)) is not None:
                lease.used = time.monotonic()
            return await self._passed(request, address, body, None, name)
        try:
            stream, address = await self._lease(str(said.get("template_id") or ""))
        except NO_ROOM:
            return busy()
        return await self._passed(request, address, body, stream, name)

    @front.websocket("/{path:path}")
    async def converse(self, websocket: WebSocket) -> None:
        """One WebSocket of a session."""
        name = session_of(websocket.url.path, {}, websocket.headers)
        address = await self._place_of(name) if name else ""
        await websocket.accept()
        if not address:
            await websocket.close(4404, "no such session 会话不存在")
            return
        target = f"ws://{address}{websocket.url.path}?{websocket.url.query}"
        headers = {
            key: value for key, value in _forwarded(websocket.headers).items() if "websocket" not in key
        }
        async with self._http().ws_connect(target, headers=headers, max_msg_size=SOCKET_BYTES) as inner:
            await _relay(websocket, inner)

    async def _lease(self, template_id: str) -> tuple[Any, str]:
        """A replica with room, one that has the template open where there is one; its stream and address."""
        options = {"multiplexed_model_id": template_id} if template_id else {}
        stream = self._engines.options(stream=True, **options).lend.remote()
        try:
            return stream, await asyncio.wait_for(stream.__anext__(), LEASE_SECONDS)
        except BaseException:
            stream.cancel()
            raise

    async def _place_of(self, name: str) -> str:
        """The address of the replica that has a session or job; "" where none says so."""
        if name in self._places:
            return self._places[name]
        broadcast = self._engines.broadcast("holds", name)
        for found in await broadcast.results_async(return_exceptions=True):
            if isinstance(found, str) and found:  # the others haven't it, or have just died
                self._remember(name, found)
                return found
        return ""

    def _remember(self, name: str, address: str) -> None:
        self._places[name] = address
        if len(self._places) > KNOWN_PLACES:
            self._places.popitem(last=False)

    async def _passed(
        self, request: Request, address: str, body: bytes | None, stream: Any, name: str = ""
    ) -> Response:
        """The replica's answer, streamed; the lease ends with it unless it began a session."""
        url = f"http://{address}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        data = request.stream() if body is None and request.method in ("POST", "PUT", "PATCH") else body
        try:
            answer = await self._http().request(
                request.method, url, data=data, headers=_forwarded(request.headers), allow_redirects=False
            )
        except aiohttp.ClientError as e:
            if isinstance(e, aiohttp.ClientConnectorError):
                self._forget(address)
            if stream is not None:
                stream.cancel()
            return await self._elsewhere(request, body, name)
        session = _begun(request, answer, name)
        if session:
            self._remember(session, address)
            if stream is not None and not answer.headers.get("location", "").startswith("/v1/videos/"):
                live = bool(answer.headers.get("location"))
                self._leases[session] = Lease(stream, address, live, time.monotonic())
                self._keep_watch()
                stream = None
        if request.url.path.startswith("/api/end_session/") or request.method == "DELETE":
            self._release(name or session_of(request.url.path, {}, {}))

        async def content() -> AsyncIterator[bytes]:
            try:
                async for block in answer.content.iter_any():
                    yield block
            finally:
                answer.close()
                if stream is not None:
                    stream.cancel()

        headers = {key: value for key, value in answer.headers.items() if key.lower() not in HOP_BY_HOP}
        if "Content-Length" in answer.headers and answer.headers.get("Content-Encoding") is None:
            headers["Content-Length"] = answer.headers["Content-Length"]
        return StreamingResponse(content(), answer.status, {**headers, "X-Worker": address})

    def _forget(self, address: str) -> None:
        """Nothing is left of a replica that died."""
        for name in [known for known, at in self._places.items() if at == address]:
            del self._places[name]
            self._release(name)

    async def _elsewhere(self, request: Request, body: bytes | None, name: str) -> Response:
        """After a replica was lost: another one is asked what it can answer and what does no harm twice."""
        path = request.url.path
        if path.startswith(("/v1/sessions/", "/api/end_session/")) or path == "/api/process_segment":
            return told(404, "the session's worker is gone, start it again 会话所在服务已退出，请重新开始")
        if request.method in TWICE_IS_HARMLESS or body is not None:
            with contextlib.suppress(*NO_ROOM):
                stream, address = await self._lease("")
                return await self._passed(request, address, body, stream, name)
        return busy()

    def _release(self, name: str) -> None:
        lease = self._leases.pop(name, None)
        if lease is not None:
            lease.stream.cancel()

    def _http(self) -> aiohttp.ClientSession:
        if self._client is None:
            limits = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=limits, auto_decompress=False
            )
        return self._client

    def _keep_watch(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._release_ended())

    async def _release_ended(self) -> None:
        """Ends the leases of sessions that are over."""
        while self._leases:
            await asyncio.sleep(LOOK_SECONDS)
            for name, lease in list(self._leases.items()):
                if not await self._lives(name, lease):
                    self._release(name)

    async def _lives(self, name: str, lease: Lease) -> bool:
        if not lease.live:
            return time.monotonic() - lease.used < SILENT_SECONDS
        token = {"Authorization": f"Bearer {os.environ.get('MUSETALK_TOKEN', '')}"}
        try:
            async with self._http().get(
                f"http://{lease.address}/v1/sessions/{name}", headers=token
            ) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


def application(options: Options) -> Any:
    """The application: `serve run ray_serve:application max_replicas=8`."""
    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target,
        "upscale_delay_s": options.upscale_delay,
        "downscale_delay_s": options.downscale_delay,
        "look_back_period_s": options.look_back,
        "metrics_interval_s": min(10.0, options.look_back / 3),
    }
    engines = Engine.options(
        autoscaling_config=scaling,
        max_ongoing_requests=options.most,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        graceful_shutdown_timeout_s=options.grace,
        health_check_period_s=5,
        health_check_timeout_s=15,
    ).bind(options)
    return Front.options(num_replicas=options.fronts, max_ongoing_requests=1000).bind(engines)
