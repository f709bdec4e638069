"""Who may call: rebinding, other pages, tokens, networks, sizes; and which paths a caller may name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import ServerConfig
from musetalk.errors import InputError
from musetalk.server import gate
from musetalk.server.gate import Gate, is_loopback, is_trusted
from musetalk.server.paths import check_output, find_cache, find_input, last_name

LOCAL = ServerConfig()
OPEN = ServerConfig(host="0.0.0.0", token="geheim", trust=("172.18.0.0/16",))


def refused(
    server: ServerConfig,
    path: str = "/api/status",
    client: str = "127.0.0.1",
    query: str = "",
    **headers: str,
) -> int | None:
    """The status of a refusal, or None; headers by their names with _ for -."""
    named = {"host": "localhost:28888", **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http",
        "path": path,
        "client": (client, 5),
        "query_string": query.encode(),
        "headers": [(name.encode(), text.encode("latin-1")) for name, text in named.items()],
    }
    refusal = Gate(None, server).refusal(scope)
    return refusal and refusal[0]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:28888", "[::1]:28888", "LOCALHOST:1"])
def test_this_machine_s_names_are_let_through(host):
    assert refused(LOCAL, host=host) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "localhost@evil.example:1"]
)
def test_a_rebound_name_is_refused(host):
    assert refused(LOCAL, host=host) == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:28888", None),
        ("https://localhost:28888", None),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("file://localhost:28888", 403),
    ],
)
def test_only_pages_of_the_worker_may_call(origin, status):
    assert refused(LOCAL, origin=origin) == status


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer geheim"}, None),
        ({"authorization": "Bearer Geheim"}, 401),
        ({"authorization": "Bearer gehei"}, 401),
        ({"authorization": "Bearer é"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"x_token": "geheim"}, None),
        ({"query": "a=1&token=geheim"}, None),
        ({"query": "token=%ff%00"}, 401),
        ({"path": "/health"}, None),
        ({"path": "/healthz"}, None),
        ({"path": "/health/../api/status"}, 401),
        ({"client": "172.18.3.4", "host": "musetalk-python:28888"}, None),
        ({"client": "172.18.3.4", "host": "172.18.0.2:28888"}, None),
        ({"client": "::ffff:172.18.3.4", "host": "musetalk-python"}, None),
        ({"client": "172.18.3.4", "host": "rebound.example"}, 401),
        ({"client": "172.19.3.4"}, 401),
        ({"client": "garbage"}, 401),
    ],
)
def test_an_open_worker_wants_its_token(arguments, status):
    assert refused(OPEN, **{"client": "10.0.0.9", **arguments}) == status


def test_no_token_set_lets_nobody_in_by_an_empty_one():
    server = ServerConfig(host="0.0.0.0", trust=("172.18.0.0/16",))
    assert refused(server, client="10.0.0.9", authorization="Bearer ") == 401
    assert refused(server, client="10.0.0.9", query="token=") == 401


@pytest.mark.parametrize(
    ("length", "kind", "status"),
    [
        ("1048576", "application/json", None),
        ("1048577", "application/json", 413),
        ("1048577", "multipart/form-data; boundary=x", None),
        ("99999999999999", "multipart/form-data; boundary=x", 413),
        ("-1", "application/json", 413),
        ("1e9", "application/json", 413),
        ("²", "application/json", 413),
    ],
)
def test_bodies_are_bounded_by_what_they_say(length, kind, status):
    assert refused(LOCAL, content_length=length, content_type=kind) == status


def passed_on(server: ServerConfig, messages: list[dict[str, Any]]) -> list[str]:
    """Kinds of the messages that the application behind the gate receives."""
    received: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in messages:
            received.append((await receive())["type"])  # noqa: PERF401 - `receive` looks at what there is

    async def receive() -> dict[str, Any]:
        if not messages[0]:
            await asyncio.Event().wait()
        return messages[len(received)]

    scope = {
        "type": "http",
        "path": "/",
        "client": ("127.0.0.1", 5),
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(Gate(app, server)(scope, receive, None))
    return received


def test_a_body_without_a_length_is_cut_off_where_it_grows_too_large():
    block = {"type": "http.request", "body": b"x" * (1 << 19), "more_body": True}
    assert passed_on(LOCAL, [block] * 4) == [
        "http.request",
        "http.request",
        "http.disconnect",
        "http.disconnect",
    ]


def test_a_body_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    assert passed_on(LOCAL, [{}]) == ["http.disconnect"]


def test_addresses():
    assert is_loopback("127.8.8.8") and is_loopback("::1") and is_loopback("::ffff:127.0.0.1")
    assert not any(map(is_loopback, ("10.0.0.1", "0.0.0.0", "127.0.0.1.example", "", "::")))
    assert is_trusted("10.1.2.3", ["10.0.0.0/8"]) and not is_trusted("11.1.2.3", ["10.0.0.0/8"])
    assert not is_trusted("x", ["10.0.0.0/8"])


@pytest.mark.parametrize(
    ("text", "name"),
    [("C:\\a\\b.wav", "b.wav"), ("/a/b.wav", "b.wav"), ("\\\\server\\s\\b.wav", "b.wav"), ("b.wav", "b.wav")],
)
def test_a_file_s_own_name_in_paths_of_every_system(text, name):
    assert last_name(text) == name


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.wav").write_bytes(b"a")
    (tmp_path / "secret.wav").write_bytes(b"s")
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "out").symlink_to(tmp_path)
    return folder


def test_a_stranger_reads_only_below_the_shared_folders(shared):
    for text in ("a.wav", str(shared / "a.wav"), str(shared / "deep" / ".." / "a.wav"), "/app/x/a.wav"):
        assert find_input(text, [shared], [shared]) == (shared / "a.wav").resolve()


@pytest.mark.parametrize(
    "text",
    [
        "{shared}/../secret.wav",
        "{shared}/link.wav",
        "{shared}/out/secret.wav",
        "link.wav",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "..",
        "../secret.wav",
        "..\\secret.wav",
        "C:\\Windows\\win.ini",
        "\\\\server\\share\\a.wav",
        "//server/share/a.wav",
        "CON",
        "nul.wav",
        "COM1.mp4",
        "a\0.wav",
        "a" * 5000,
        "\ud800",
        "",
        ".",
        "~/secret.wav",
        "file:///etc/passwd",
    ],
)
def test_a_stranger_gets_nowhere_else(shared, text):
    text = text.format(shared=shared)
    with pytest.raises(InputError):
        find_input(text, [shared], [shared])
    if not text.startswith("link"):
        with pytest.raises(InputError):
            check_output(text, [shared])


def test_a_refusal_names_no_folder_of_the_server(shared):
    with pytest.raises(InputError) as refusal:
        find_input("/srv/private/customer.wav", [shared], [shared])
    assert str(shared) not in str(refusal.value) and "/srv" not in refusal.value.message


def test_a_call_that_waited_for_its_turn_is_not_taken_for_one_whose_body_never_came():
    async def looked_late() -> str:
        loop, late = asyncio.get_running_loop(), 0.0
        clock = loop.time
        loop.time = lambda: clock() + late
        kinds: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal late
            late = gate.BODY_SECONDS + 1
            kinds.append((await receive())["type"])

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "path": "/", "client": ("127.0.0.1", 5), "headers": headers}
        await Gate(app, LOCAL)(scope, receive, None)
        return kinds[0]

    assert asyncio.run(looked_late()) == "http.request"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("Multipart/Form-Data; boundary=x", None), ("Application/Ogg", None), ("text/plain", 413), ("", 413)],
)
def test_only_uploads_may_be_large_however_their_type_is_written(kind, status):
    headers = {"content_type": kind, "content_length": str(10 << 20)}
    assert refused(LOCAL, "/v1/templates", **headers) == status


def test_a_cache_folder_is_the_worker_s_or_an_allowed_one(tmp_path):
    own, allowed, private = (tmp_path / name for name in ("own", "allowed", "private"))
    for folder in (own, own / "anna", allowed / "cache", private):
        folder.mkdir(parents=True)
    find = lambda path: find_cache(str(path), own, "anna", [allowed])  # noqa: E731
    assert find(own) == find(own / "anna") == find(allowed / ".." / "own") == own
    assert find("C:\\musetalk\\cache") == find("/app/cache") == own, "the caller's name for the shared folder"
    assert find(allowed / "cache") == allowed / "cache"
    for elsewhere in (
        private,
        allowed / ".." / "private",
        "//host/share",
        "\\\\host\\s",
    ):
        with pytest.raises(InputError):
            find(elsewhere)
    assert find_cache(str(private), own, "anna", None) == private


def test_an_address_may_send_as_many_uploads_at_once_as_it_may():
    gate_, begun, go_on = None, [], asyncio.Event()

    async def app(scope, receive, send):
        begun.append(scope["client"][0])
        await go_on.wait()

    async def call(client: str, kind: str) -> list[dict[str, Any]]:
        scope = {
            "type": "http",
            "path": "/v1/videos",
            "client": (client, 5),
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", kind.encode())],
        }
        sent: list[dict[str, Any]] = []

        async def send(message):
            sent.append(message)

        await gate_(scope, None, send)
        return sent

    async def conversation() -> None:
        first = [asyncio.create_task(call("a", "multipart/form-data")) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await call("a", "Multipart/Form-Data")
        assert refused[0]["status"] == 429 and (b"retry-after", b"10") in refused[0]["headers"]
        others = [asyncio.create_task(call(*who)) for who in (("b", "audio/flac"), ("a", "application/json"))]
        await asyncio.sleep(0)
        assert begun == ["a", "a", "b", "a"]
        go_on.set()
        await asyncio.gather(*first, *others)
        await call("a", "multipart/form-data")
        assert len(begun) == 5, "what ended counts no more"

    gate_ = Gate(app, ServerConfig(client_uploads=2))
    asyncio.run(conversation())
