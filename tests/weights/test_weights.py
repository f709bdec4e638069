"""Downloads against a server on this machine that cuts connections, lies and serves a mirror."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from musetalk import config
from musetalk.config import ModelPaths
from musetalk.errors import OutputError, UsageError, WeightsError
from musetalk.weights import __main__ as commands
from musetalk.weights import files as weight_files
from musetalk.weights.download import is_the_hub
from musetalk.weights.folder import WeightsFolder
from musetalk.weights.registry import REGISTRY, OfficialFile, Source

CONTENT = np.random.RandomState(5).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REVISION = "c" * 40
HUB_PATH = f"/owner/name/resolve/{REVISION}/net.pth"


@dataclass
class Behaviour:
    """What the server does with one path.

    Attributes:
        content: what it holds.
        cut_after: body bytes of each answer but the last, which is whole; one entry an answer.
        claimed: Content-Length that it claims, of whole answers.
        ranges: whether it honours Range.
    """

    content: bytes = CONTENT
    cut_after: list[int] = field(default_factory=list)
    claimed: int | None = None
    ranges: bool = True
    requests: list[str | None] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: dict[str, Behaviour] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        behaviour = self.server.paths.get(self.path)
        if behaviour is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and behaviour.ranges else 0
        body = behaviour.content[start:]
        if not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            size = len(behaviour.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(body) if behaviour.claimed is None else behaviour.claimed))
        self.send_header("ETag", f'"{hashlib.sha256(behaviour.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        behaviour.authorizations.append(self.headers.get("Authorization"))
        if with_body:
            behaviour.requests.append(asked)
            cut = behaviour.cut_after.pop(0) if behaviour.cut_after else None
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None or behaviour.claimed is not None

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    server = LoopbackServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def plain_file(
    server: LoopbackServer, size: int | None = len(CONTENT), sha256: str | None = SHA256
) -> OfficialFile:
    return OfficialFile("plain", "folder/net.pth", Source("", f"{server.address}/net.pth", "", size, sha256))


def hub_file(size: int | None = len(CONTENT), sha256: str | None = SHA256) -> OfficialFile:
    return OfficialFile("hub", "folder/net.pth", Source("owner/name", "net.pth", REVISION, size, sha256))


def download(folder: Path, file: OfficialFile, mirror: str | None = None) -> str:
    return WeightsFolder(folder, [file]).download(file, mirror, pause=0)


def test_a_plain_download_cut_twice_goes_on_where_it_stopped(server: LoopbackServer, tmp_path: Path) -> None:
    server.paths["/net.pth"] = behaviour = Behaviour(cut_after=[100_000, 50_000])
    assert download(tmp_path, plain_file(server)) == "downloaded"
    assert (tmp_path / "folder/net.pth").read_bytes() == CONTENT
    assert behaviour.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_is_read_again_from_the_start(server: LoopbackServer, tmp_path: Path) -> None:
    server.paths["/net.pth"] = Behaviour(cut_after=[100_000], ranges=False)
    download(tmp_path, plain_file(server))
    assert (tmp_path / "folder/net.pth").read_bytes() == CONTENT


def test_a_file_of_unknown_size_is_resumed_and_recorded(server: LoopbackServer, tmp_path: Path) -> None:
    server.paths["/net.pth"] = Behaviour(cut_after=[100_000])
    file = plain_file(server, size=None, sha256=None)
    folder = WeightsFolder(tmp_path, [file])
    folder.download(file, pause=0)
    assert folder.state(file) == "ok"
    assert folder.expected(file).sha256 == SHA256
    (tmp_path / "folder/net.pth").write_bytes(CONTENT[::-1])
    assert folder.state(file) == "wrong"


@pytest.mark.parametrize("claimed", [len(CONTENT) + 1000, len(CONTENT) - 1000])
def test_a_lie_about_the_length_never_leaves_a_file(
    server: LoopbackServer, tmp_path: Path, claimed: int
) -> None:
    server.paths["/net.pth"] = Behaviour(claimed=claimed, ranges=False)
    file = plain_file(server, size=len(CONTENT) + 1000)
    with pytest.raises(WeightsError, match=r"net\.pth can't be downloaded"):
        download(tmp_path, file)
    assert not (tmp_path / "folder/net.pth").exists()


def test_a_longer_file_than_announced_is_refused(server: LoopbackServer, tmp_path: Path) -> None:
    server.paths["/net.pth"] = Behaviour()
    with pytest.raises(WeightsError):
        download(tmp_path, plain_file(server, size=1000))
    assert not (tmp_path / "folder/net.pth").exists()


def test_another_checksum_is_kept_as_bad_and_never_in_place(server: LoopbackServer, tmp_path: Path) -> None:
    server.paths["/net.pth"] = Behaviour(content=CONTENT[::-1])
    with pytest.raises(WeightsError, match="checksum") as error:
        download(tmp_path, plain_file(server))
    assert error.value.exit_code == 5
    assert (tmp_path / "folder/net.pth.bad").read_bytes() == CONTENT[::-1]
    assert not (tmp_path / "folder/net.pth").exists()
    server.paths["/net.pth"] = Behaviour()
    assert download(tmp_path, plain_file(server)) == "downloaded"


def test_a_file_in_place_is_not_asked_for_again_and_a_wrong_one_is_kept_aside(
    server: LoopbackServer, tmp_path: Path
) -> None:
    server.paths["/net.pth"] = behaviour = Behaviour()
    file, target = plain_file(server), tmp_path / "folder/net.pth"
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert download(tmp_path, file) == "present"
    assert behaviour.requests == []
    target.write_bytes(b"mine")
    assert download(tmp_path, file) == "downloaded"
    assert target.read_bytes() == CONTENT
    assert target.with_name("net.pth.bad").read_bytes() == b"mine"


def test_a_file_that_no_server_has_is_named_with_what_to_do(server: LoopbackServer, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"net\.pth can't be downloaded from http") as error:
        download(tmp_path, plain_file(server))
    assert "--mirror" in error.value.hint


def test_the_mirror_is_asked_first_and_the_origin_when_it_has_nothing(
    server: LoopbackServer, tmp_path: Path
) -> None:
    mirror = f"{server.address}/mirror/"
    server.paths["/net.pth"] = origin = Behaviour()
    server.paths["/mirror/folder/net.pth"] = Behaviour()
    download(tmp_path / "a", plain_file(server), mirror)
    assert origin.requests == []
    del server.paths["/mirror/folder/net.pth"]
    download(tmp_path / "b", plain_file(server), mirror)
    assert (tmp_path / "b/folder/net.pth").read_bytes() == CONTENT


def test_a_hub_mirror_that_cuts_the_connection_is_resumed(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the full environment (make install-full)")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # it resumes whole chunks
    server.paths[HUB_PATH] = behaviour = Behaviour(cut_after=[100_000])
    assert download(tmp_path, hub_file(), server.address) == "downloaded"
    assert (tmp_path / "folder/net.pth").read_bytes() == CONTENT
    assert behaviour.requests == [None, "bytes=100000-"]


def test_a_hub_file_with_another_checksum_is_kept_as_bad(server: LoopbackServer, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the full environment (make install-full)")
    server.paths[HUB_PATH] = Behaviour(content=CONTENT[::-1])
    with pytest.raises(WeightsError, match="checksum"):
        download(tmp_path, hub_file(), server.address)
    assert (tmp_path / "folder/net.pth.bad").read_bytes() == CONTENT[::-1]
    assert not (tmp_path / "folder/net.pth").exists()


def test_the_command_honours_hf_endpoint_and_refuses_what_is_not_official(
    server: LoopbackServer, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the full environment (make install-full)")
    official = next(file for file in REGISTRY if file.path == "whisper/config.json")
    source = official.source
    path = f"/{source.repository}/resolve/{source.revision}/{source.location}"
    server.paths[path] = Behaviour(content=b"{}")
    command = [sys.executable, "-m", "musetalk.weights", "download", "--only", official.path]
    run = subprocess.run(
        [*command, "--models_dir", str(tmp_path / "模型 (1)")],
        cwd=config.REPOSITORY,
        env={**os.environ, "HF_ENDPOINT": server.address},
        capture_output=True,
        check=False,
    )
    answer = json.loads(run.stdout)
    assert run.returncode == 5, run.stderr.decode()
    assert answer["success"] is False and answer["error_code"] == "weights"
    assert "whisper/config.json" in answer["message"] and answer["hint"]
    assert (tmp_path / "模型 (1)/whisper/config.json.bad").read_bytes() == b"{}"


@pytest.mark.parametrize("named", ["--mirror", "HF_ENDPOINT"])
def test_a_stored_token_goes_to_no_other_host_than_the_hubs(
    server: LoopbackServer, tmp_path: Path, named: str
) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the full environment (make install-full)")
    official = next(file for file in REGISTRY if file.path == "whisper/config.json")
    source = official.source
    path = f"/{source.repository}/resolve/{source.revision}/{source.location}"
    server.paths[path] = behaviour = Behaviour(content=b"{}")
    command = [sys.executable, "-m", "musetalk.weights", "download", "--only", official.path]
    command += ["--models_dir", str(tmp_path), *([named, server.address] if named == "--mirror" else [])]
    endpoint = {} if named == "--mirror" else {"HF_ENDPOINT": server.address}
    subprocess.run(
        command,
        cwd=config.REPOSITORY,
        env={**os.environ, **endpoint, "HF_TOKEN": "hf_secret"},
        capture_output=True,
        check=False,
    )
    assert behaviour.authorizations and set(behaviour.authorizations) == {None}


@pytest.mark.parametrize(
    ("address", "is_it"),
    [
        *[("https://huggingface.co", True), ("https://HuggingFace.co/", True)],
        *[("https://hf-mirror.com", False), ("http://huggingface.co", False)],
        *[("https://huggingface.co.example.org", False), ("https://huggingface.co@example.org", False)],
    ],
)
def test_only_the_hubs_own_host_is_the_hub(address: str, is_it: bool) -> None:
    assert is_the_hub(address) is is_it


def test_download_list_and_verify_agree(
    server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.paths["/net.pth"] = Behaviour()
    registry = [plain_file(server)]

    def run(command: str) -> tuple[int, dict]:
        arguments = [command, "--only", "plain", "--models_dir", str(tmp_path)]
        code = commands.main(arguments, registry)
        return code, json.loads(capsys.readouterr().out)

    assert run("list")[1]["files"][0]["state"] == "missing"
    assert run("verify")[0] == 5
    assert run("download")[1]["files"][0]["state"] == "downloaded"
    assert not (tmp_path / ".download").exists()
    assert run("list")[1]["files"][0]["state"] == "present"
    assert run("verify") == (0, run("verify")[1])
    assert run("verify")[1]["files"][0]["state"] == "ok"
    (tmp_path / "folder/net.pth").write_bytes(CONTENT[:-1])
    code, answer = run("verify")
    assert (code, answer["success"], answer["files"][0]["state"]) == (5, False, "wrong")


def test_unknown_names_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonsense"):
        WeightsFolder(tmp_path).select(["v15", "nonsense"])


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    huge = OfficialFile("x", "x/y", Source("", "http://127.0.0.1:1/", "", 1 << 60, SHA256))
    folder = WeightsFolder(tmp_path, [huge])
    with pytest.raises(OutputError, match="free"):
        commands.download_command(folder, [huge], None)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert (
        commands.main(["download", "--only", "s3fd", "--models_dir", str(tmp_path / "file" / "models")]) == 7
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error_code"] == "output" and "💡" in captured.err


def test_registry_places_are_those_the_engine_looks_at() -> None:
    paths = {file.path for file in REGISTRY}
    for version in ("v1", "v15"):
        files = weight_files.find_files(ModelPaths(version=version))
        below = {path.relative_to(config.REPOSITORY / "models").as_posix() for path in files.paths()}
        assert below <= paths


def test_missing_files_are_all_named_with_size_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "REPOSITORY", tmp_path / "nowhere")
    with pytest.raises(WeightsError) as error:
        weight_files.require_files(ModelPaths())
    for name in ("musetalk.json", "unet.pth (3,400.1 MB)", "diffusion_pytorch_model.safetensors", "whisper"):
        assert name in error.value.message
    assert "python -m musetalk.weights download" in error.value.hint


def test_the_working_directory_comes_before_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, repository = tmp_path / "here", tmp_path / "repository"
    for root in (here, repository):
        (root / "models/whisper").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(config, "REPOSITORY", repository)
    named = ModelPaths(whisper_dir=Path("models/whisper"))
    assert weight_files.find_files(named).whisper_config == here / "models/whisper/config.json"
    (here / "models/whisper").rmdir()
    assert weight_files.find_files(named).whisper_config == repository / "models/whisper/config.json"


@pytest.mark.parametrize("vae_type", ["my-vae", "models/my-vae", "{absolute}"])
def test_vae_type_is_a_name_under_models_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae_type: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models/my-vae"
    folder.mkdir(parents=True)
    (folder / "diffusion_pytorch_model.bin").touch()
    files = weight_files.find_files(ModelPaths(vae_type=vae_type.format(absolute=folder)))
    assert files.vae_config == folder / "config.json"
    assert files.vae_weights == folder / "diffusion_pytorch_model.bin"


def test_the_environments_models_folder_comes_before_the_repositorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, named, here = (tmp_path / name for name in ("repository", "named", "here"))
    for folder in (repository / "models" / "whisper", named / "whisper", here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(config, "REPOSITORY", repository)
    whisper = Path("models/whisper")
    assert weight_files.look_up(whisper) == repository / whisper
    monkeypatch.setenv("MUSE_MODELS_DIR", str(named))
    assert weight_files.look_up(whisper) == named / "whisper"
    assert (
        weight_files.models_folder() == named and weight_files.look_up(Path("models/none")) == named / "none"
    )
    (repository / "models" / "sd-vae").mkdir()
    assert weight_files.look_up(Path("models/sd-vae")) == repository / "models" / "sd-vae"
    (here / whisper).mkdir(parents=True)
    assert weight_files.look_up(whisper) == here / whisper
    assert weight_files.look_up(tmp_path / "absolute") == tmp_path / "absolute"
    assert weight_files.look_up(Path("elsewhere/x")) == repository / "elsewhere/x"
