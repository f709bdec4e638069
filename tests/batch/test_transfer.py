"""Files that lie elsewhere, on file systems and servers of the test's own."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from musetalk.batch.transfer import deliver, fetch, is_remote, local_path, name_of, remote_size
from musetalk.errors import InputError, OutputError

NAME = "小 哈.wav"


@pytest.fixture
def site(tmp_path) -> Iterator[str]:
    """The address of a server that gives out a folder with `小 哈.wav` in it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / NAME).write_bytes(b"sound")

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Silent, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_paths_and_file_addresses_are_of_this_machine(tmp_path):
    path = tmp_path / NAME
    for place in (str(path), path.as_uri(), path.as_uri().replace("file:///", "FILE://localhost/")):
        assert not is_remote(place) and local_path(place) == path
    assert not is_remote("C:\\x\\y.wav") and not is_remote("a:b.wav") and is_remote("s3://b/k.wav")
    assert local_path("a.wav") == Path("a.wav").absolute()
    assert fetch(str(path), tmp_path) == path  # its absence is told by whoever reads it


def test_names_are_what_follows_the_last_slash():
    assert name_of("https://x.y/a/%E5%B0%8F.wav?sig=1/2") == "小.wav"
    assert name_of(str(Path("a") / NAME)) == NAME


def test_http_inputs_are_fetched(site, tmp_path):
    pytest.importorskip("fsspec", reason="needs fsspec (requirements-remote.txt)")
    pytest.importorskip("aiohttp", reason="needs aiohttp (requirements-remote.txt)")
    found = fetch(f"{site}/%E5%B0%8F%20%E5%93%88.wav", tmp_path)
    assert found == tmp_path / NAME and found.read_bytes() == b"sound"
    with pytest.raises(InputError, match="can't be fetched"):
        fetch(f"{site}/nothing.wav", tmp_path)


def test_outputs_are_sent_and_found_again(tmp_path):
    pytest.importorskip("fsspec", reason="needs fsspec (requirements-remote.txt)")
    file = tmp_path / "made.mp4"
    file.write_bytes(b"film")
    place = "memory://bucket/deep/made.mp4"
    assert remote_size(place) is None
    deliver(file, place)
    assert remote_size(place) == 4 and fetch(place, tmp_path / "..").read_bytes() == b"film"


def test_elsewhere_a_file_shows_only_when_whole(tmp_path, monkeypatch):
    pytest.importorskip("fsspec", reason="needs fsspec (requirements-remote.txt)")
    from fsspec.implementations.local import LocalFileSystem

    file, folder = tmp_path / "made.mp4", tmp_path / "far"
    file.write_bytes(b"film")
    deliver(file, f"local://{folder}/a.mp4")
    assert [path.name for path in folder.iterdir()] == ["a.mp4"]

    def torn(self: object, source: str, target: str, **_: object) -> None:
        Path(target).write_bytes(b"fi")
        raise OSError("the line is down")

    monkeypatch.setattr(LocalFileSystem, "put_file", torn)
    with pytest.raises(OutputError, match="the line is down"):
        deliver(file, f"local://{folder}/b.mp4")
    assert not (folder / "b.mp4").exists()


def test_an_unknown_kind_of_address_is_a_bad_row(tmp_path):
    pytest.importorskip("fsspec", reason="needs fsspec (requirements-remote.txt)")
    with pytest.raises(InputError, match="nowhere://x"):
        fetch("nowhere://x/y.wav", tmp_path)
