"""The official weights without having them: every tensor they hold, in every form they come in.

`official_tensors.json` lists the names and shapes that the published files hold, as their configurations and
the libraries that wrote them say. Sizes published beside the files confirm it to a thousandth.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk import config
from musetalk.config import REPOSITORY, ModelPaths
from musetalk.errors import WeightsError
from musetalk.tools.random_weights import SIZES
from musetalk.weights import __main__ as commands
from musetalk.weights.files import find_files, missing_files, official_paths
from musetalk.weights.registry import REGISTRY
from tests.engines.conftest import NEEDS_FULL

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("safetensors", reason=NEEDS_FULL)

from safetensors.torch import load_file, save_file  # noqa: E402

from musetalk import checkpoints  # noqa: E402
from musetalk.engines.musetalk import networks  # noqa: E402

OFFICIAL: dict[str, dict[str, list[int]]] = json.loads(
    (REPOSITORY / "tests" / "data" / "official_tensors.json").read_text("utf-8")
)
COUNTS = {"unet": 686, "vae": 248, "whisper": 167, "taesd": 134}
OPENERS = {
    "unet": networks.open_unet,
    "vae": networks.open_vae,
    "whisper": networks.open_whisper_encoder,
    "taesd": networks.open_tiny_decoder,
}
PUBLISHED = {
    "unet": "musetalkV15/unet.pth",
    "vae": "sd-vae/diffusion_pytorch_model.safetensors",
    "whisper": "whisper/model.safetensors",
}
NEWER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SETTINGS = {"unet": "musetalkV15/musetalk.json", "vae": "sd-vae/config.json"}


def official(network: str) -> dict[str, Any]:
    return {name: torch.empty(shape, device="meta") for name, shape in OFFICIAL[network].items()}


def newer(name: str) -> str:
    for old, new in NEWER_NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


@pytest.fixture
def configurations(tmp_path: Path) -> Path:
    """The official layout with the full networks' configurations and no weights."""
    for name in OPENERS:
        path = tmp_path / SETTINGS.get(name, f"{name}/config.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(getattr(SIZES["full"], name)))
    return tmp_path


def open_with(
    network: str, tensors: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> networks.Network:
    monkeypatch.setattr(networks, "read_tensors", lambda _path: tensors)
    return OPENERS[network](find_files(official_paths(folder)))


@pytest.mark.parametrize("network", OPENERS)
def test_the_list_is_whole(network: str) -> None:
    assert len(OFFICIAL[network]) == COUNTS[network]


@pytest.mark.parametrize("network", PUBLISHED)
def test_the_lists_bytes_are_those_of_the_published_files(network: str) -> None:
    size = next(file.source.size for file in REGISTRY if file.path == PUBLISHED[network])
    assert size is not None
    listed = 4 * sum(math.prod(shape) for shape in OFFICIAL[network].values())
    assert listed < size < 1.001 * listed  # the rest is the file's table of contents


@pytest.mark.parametrize("network", OPENERS)
def test_every_official_tensor_is_taken_at_its_full_shape(
    configurations: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    opened = open_with(network, official(network), configurations, monkeypatch)
    assert sum(parameter.numel() for parameter in opened.module.parameters()) > 1_000_000


@pytest.mark.parametrize("network", ["unet", "vae"])
def test_a_tensor_less_or_more_is_refused(
    configurations: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    tensors = official(network)
    first = next(iter(tensors))
    with pytest.raises(WeightsError, match="extra"):
        open_with(network, {**tensors, "another": tensors[first]}, configurations, monkeypatch)
    del tensors[first]
    with pytest.raises(WeightsError, match="missing"):
        open_with(network, tensors, configurations, monkeypatch)


def test_newer_spellings_of_the_vaes_attention_are_taken(
    configurations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = {newer(name): tensor for name, tensor in official("vae").items()}
    assert renamed.keys() != OFFICIAL["vae"].keys()
    open_with("vae", renamed, configurations, monkeypatch)


def test_whisper_without_its_head_is_taken(configurations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in official("whisper").items()}
    open_with("whisper", bare, configurations, monkeypatch)
    encoder = {name: tensor for name, tensor in bare.items() if name.startswith("encoder.")}
    open_with("whisper", encoder, configurations, monkeypatch)


def _zipped(tensors: dict[str, Any], path: Path) -> None:
    torch.save(tensors, path)


def _older(tensors: dict[str, Any], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _parameters(tensors: dict[str, Any], path: Path) -> None:
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, path)


def _half(tensors: dict[str, Any], path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, path)


def _parallel(tensors: dict[str, Any], path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)


def _training(tensors: dict[str, Any], path: Path) -> None:
    torch.save({"state_dict": tensors, "epoch": 3}, path)


def _exported(tensors: dict[str, Any], path: Path) -> None:
    save_file(tensors, path)


FORMS: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "zip": ("unet.pth", _zipped),
    "bin of an old torch": ("pytorch_model.bin", _older),
    "parameters": ("unet.pth", _parameters),
    "half precision": ("unet.pth", _half),
    "trained on several cards": ("unet.pth", _parallel),
    "training checkpoint": ("unet.pth", _training),
    "safetensors": ("unet.safetensors", _exported),
    "safetensors under another name": ("pytorch_model.bin", _exported),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_parameters(
    tiny_models: Path, tmp_path: Path, form: str
) -> None:
    name, save = FORMS[form]
    tensors = torch.load(tiny_models / "musetalkV15/unet.pth")
    save(tensors, tmp_path / name)
    models = ModelPaths(
        unet_config=tiny_models / "musetalkV15/musetalk.json", unet_model_path=tmp_path / name
    )
    expected = {
        key: tensor.half().float() if form == "half precision" else tensor for key, tensor in tensors.items()
    }
    found = checkpoints.read_tensors(tmp_path / name)
    assert found.keys() == expected.keys()
    opened = networks.open_unet(find_files(models))
    opened._prepare = None  # as they were read
    for key, tensor in opened.load("cpu", "float32").state_dict().items():
        torch.testing.assert_close(tensor, expected[key], atol=0, rtol=0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "REPOSITORY", tmp_path / "nowhere")
    return tmp_path


def _in_hub_layout(source: Path, cache: Path, repository: str, revisions: tuple[str, ...] = ("abc",)) -> Path:
    place = cache / f"models--{repository.replace('/', '--')}"
    for revision in revisions:
        shutil.copytree(source, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revisions[-1])
    return place


@pytest.mark.parametrize("where", ["the hub's own cache", "below models"])
def test_weights_in_a_hub_cache_are_found(
    tiny_models: Path, root: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    cache = root / ("models" if where == "below models" else "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    _in_hub_layout(tiny_models / "sd-vae", cache, "stabilityai/sd-vae-ft-mse")
    whisper = _in_hub_layout(tiny_models / "whisper", cache, "openai/whisper-tiny", ("old", "new"))
    musetalk = root / "musetalk"
    shutil.copytree(tiny_models / "musetalkV15", musetalk / "musetalkV15")
    _in_hub_layout(musetalk, cache, "TMElyralab/MuseTalk")
    assert missing_files(ModelPaths()) == []
    files = find_files(ModelPaths())
    assert files.whisper_config == whisper / "snapshots" / "new" / "config.json"
    for opener in (networks.open_unet, networks.open_vae, networks.open_whisper_encoder):
        opener(files)


def test_what_the_caller_names_is_never_replaced_by_a_cached_copy(
    tiny_models: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    _in_hub_layout(tiny_models / "whisper", root / "hub", "openai/whisper-tiny")
    named = ModelPaths(whisper_dir=Path("models/whisper"))
    assert find_files(named).whisper_config == root / "nowhere" / "models/whisper/config.json"


def test_a_named_folder_may_have_the_hubs_layout(tiny_models: Path, root: Path) -> None:
    place = _in_hub_layout(tiny_models / "sd-vae", root, "stabilityai/sd-vae-ft-mse")
    files = find_files(ModelPaths(vae_type=str(place)))
    assert files.vae_config == place / "snapshots" / "abc" / "config.json"


def test_the_callers_older_folders_are_found(tiny_models: Path, root: Path) -> None:
    shutil.copytree(tiny_models / "sd-vae", root / "models" / "sd-vae-ft-mse")
    shutil.copytree(tiny_models / "whisper", root / "models" / "whisper")
    (root / "models" / "musetalk").mkdir()
    shutil.copy(tiny_models / "musetalkV15/musetalk.json", root / "models/musetalk/musetalk.json")
    shutil.copy(tiny_models / "musetalkV15/unet.pth", root / "models/musetalk/pytorch_model.bin")
    assert missing_files(ModelPaths(version="v1")) == []


def verify(folder: Path, *groups: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    commands.main(["verify", "--only", *groups, "--models_dir", str(folder)])
    answer = json.loads(capsys.readouterr().out)
    return {Path(file["path"]).relative_to(folder).as_posix(): file for file in answer["files"]}


def test_verify_says_what_would_load_and_what_size_it_has(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_models, tmp_path / "models")
    (folder / "sd-vae/config.json").write_text("{")
    shutil.rmtree(folder / "taesd")
    vae = load_file(folder / "sd-vae/diffusion_pytorch_model.safetensors")
    assert vae
    files = verify(folder, "v15", "vae", "whisper", "tiny", capsys=capsys)
    unet = files["musetalkV15/unet.pth"]
    assert (unet["state"], unet["loads"], unet["problem"]) == ("wrong", True, "")
    assert unet["size"] == 3_400_074_924
    assert unet["found_size"] == (folder / "musetalkV15/unet.pth").stat().st_size
    broken = files["sd-vae/diffusion_pytorch_model.safetensors"]
    assert broken["loads"] is False and "config.json" in broken["problem"]
    assert files["whisper/model.safetensors"]["loads"] is True
    absent = files["taesd/config.json"]
    assert (absent["state"], absent["loads"], absent["found_size"]) == ("missing", None, None)


def test_verify_tries_the_face_networks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "face-parse-bisent" / "79999_iter.pth"
    path.parent.mkdir()
    torch.save({"a": torch.from_numpy(np.zeros(3, np.float32))}, path)
    found = verify(tmp_path, "bisenet", capsys=capsys)["face-parse-bisent/79999_iter.pth"]
    assert found["loads"] is False and "belongs to another network" in found["problem"]
