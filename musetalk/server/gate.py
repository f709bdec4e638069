"""Who may call: checked once, in front of every route.

The decision a reader would question: on the loopback address a call needs no token, but its `Host` must name
the loopback and its `Origin`, where a browser sends one, must be the page that the worker itself serves.
Otherwise any page that a person has open could call the worker through that person's browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from musetalk.config import ServerConfig
from musetalk.errors import ClientLimitError
from musetalk.server.clients import Clients

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
INSIDE_SUFFIXES = (".internal", ".local", ".localhost")
OPEN_PATHS = ("/health", "/healthz", "/readyz", "/")  # say nothing but that the worker is there
PAGE_FOLDER = "/page/"  # the operator's page itself, which asks for the token by itself
MAX_BODY = 2 << 30  # bytes, of an upload
UPLOAD_TYPES = ("multipart/", "audio/", "video/", "image/", "application/ogg", "application/octet-stream")
MAX_JSON = 1 << 20  # bytes, of every other body
BODY_SECONDS = 60.0  # for a body to arrive in
UPLOAD_SECONDS = 3600.0  # for an upload

Scope = Mapping[str, Any]


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        parsed = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return address == "localhost"
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def is_trusted(address: str, networks: Sequence[str]) -> bool:
    """Whether an address lies in one of the networks that need no token."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in ipaddress.ip_network(network, strict=False) for network in networks)


class Gate:
    """ASGI middleware that lets a call through or answers it.

    Args:
        app: what is behind the gate.
        server: host, token and trusted networks.
        clients: counts what each of them sends.

    A call that went through has ``trusted`` in its scope's state: the caller may name any path.
    """

    def __init__(self, app: Any, server: ServerConfig, clients: Clients | None = None) -> None:
        self._app = app
        self._clients = clients or Clients(server)
        self._server = server
        self._local = is_loopback(server.host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Checks one call."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is None:
            state = scope.setdefault("state", {})
            state["trusted"] = self._local
            state["operator"] = self._local or self._shows_token(scope, _headers(scope))
            await self._passed(scope, _limited(scope, receive), send)
        elif scope["type"] == "http":
            await _refuse(send, *refusal)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 4000 + refusal[0], "reason": refusal[1][:100]})

    async def _passed(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a call on; uploads as many at once as one address may send."""
        if scope["type"] != "http" or not _is_upload(_headers(scope)):
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._clients.counted((scope.get("client") or ("", 0))[0], "uploads"))
            except ClientLimitError as e:
                await _refuse(send, 429, e.message)
                return
            await self._app(scope, receive, send)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """HTTP status and words for a call that may not go through; None for one that may."""
        headers = _headers(scope)
        host, client = headers.get("host", ""), (scope.get("client") or ("", 0))[0]
        if self._local and _host_name(host) not in LOOPBACK_NAMES:
            return 403, f"host {host[:60]!r} is not this worker 主机名不符"
        origin = headers.get("origin")
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            return 403, f"pages of {origin[:60]} may not call this worker 跨站请求被拒绝"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _limit(headers):
            return 413, "the request is too large 请求过大"
        trusted = is_trusted(client, self._server.trust) and _is_inside_name(_host_name(host))
        open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith(PAGE_FOLDER)
        free = self._local or open_path or trusted
        if not free and not self._shows_token(scope, headers):
            return 401, "a token is needed 需要令牌: Authorization: Bearer TOKEN, or ?token="
        return None

    def _shows_token(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        shown = headers.get("authorization", "").removeprefix("Bearer ").strip()
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        candidates = [shown, headers.get("x-token", ""), *query.get("token", [])]
        expected = self._server.token.encode()
        return bool(expected) and any(
            hmac.compare_digest(candidate.encode("utf-8", "replace"), expected) for candidate in candidates
        )


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """The name in a `Host` header; "" when it can't be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_inside_name(name: str) -> bool:
    """Whether a name is one of a container network: an address, or a name that no stranger can register.

    A page whose own name was made to point here (DNS rebinding) comes with a public name.
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(INSIDE_SUFFIXES))
    return True


def _is_upload(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith(UPLOAD_TYPES)


def _limit(headers: Mapping[str, str]) -> int:
    return MAX_BODY if _is_upload(headers) else MAX_JSON


def _limited(scope: Scope, receive: Any) -> Any:
    """`receive`, ended where a body without a stated length grows beyond its limit."""
    left = _limit(_headers(scope))
    patience = BODY_SECONDS if left == MAX_JSON else UPLOAD_SECONDS
    deadline: float | None = None  # from the first look on: a call may have waited for its turn before
    arriving = scope["type"] == "http"

    async def counted() -> Any:
        nonlocal left, arriving, deadline
        if not arriving:
            return await receive()
        now = asyncio.get_running_loop().time()
        deadline = deadline or now + patience
        try:
            message = await asyncio.wait_for(receive(), deadline - now)
        except asyncio.TimeoutError:
            return {"type": "http.disconnect"}
        left -= len(message.get("body", b""))
        arriving = bool(message.get("more_body"))
        return message if left >= 0 else {"type": "http.disconnect"}

    return counted


def refusal_body(code: str, words: str) -> dict[str, Any]:
    """The documented dict of a failure that no error of the toolkit is behind."""
    told = dict.fromkeys(("error", "message", "detail"), words)
    return {"success": False, "error_code": code, **told, "hint": ""}


async def _refuse(send: Any, status: int, words: str) -> None:
    code = {401: "unauthorized", 403: "forbidden", 413: "too_large", 429: "busy"}[status]
    content = json.dumps(refusal_body(code, words), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"10"))
    if status in (413, 429):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
