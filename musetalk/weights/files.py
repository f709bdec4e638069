"""The files that the MuseTalk engine reads: where they are looked for, what is missing, which they are.

The decision a reader would question: a fingerprint samples a file instead of reading it. Another training
differs in every sample, and gigabytes need not be read at every request.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from musetalk import config
from musetalk.config import ModelPaths, Version
from musetalk.errors import WeightsError
from musetalk.weights.registry import (
    MUSETALK_REPOSITORY,
    REGISTRY,
    TAESD_REPOSITORY,
    VAE_REPOSITORY,
    WHISPER_REPOSITORY,
    OfficialFile,
)

DOWNLOAD_COMMAND = "python -m musetalk.weights download"
UNET_FILES: dict[Version, tuple[str, str]] = {
    "v1": ("models/musetalk/musetalk.json", "models/musetalk/pytorch_model.bin"),
    "v15": ("models/musetalkV15/musetalk.json", "models/musetalkV15/unet.pth"),
}
VAE_WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WHISPER_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
OLDER_VAE_FOLDER = "models/sd-vae-ft-mse"  # of callers that follow MuseTalk 1.0's instructions
WHISPER_FOLDER = "models/whisper"
TAESD_FOLDER = "models/taesd"
MODELS_VARIABLE = "MUSE_MODELS_DIR"
FINGERPRINT_SAMPLES = 64
FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class MuseTalkFiles:
    """The files that the MuseTalk engine reads; `missing_files` says which are not there.

    Those of TAESD are read where the tiny decoder is asked for, and nowhere else.
    """

    version: Version
    unet_config: Path
    unet_weights: Path
    vae_config: Path
    vae_weights: Path
    whisper_config: Path
    whisper_weights: Path
    taesd_config: Path
    taesd_weights: Path

    def paths(self) -> tuple[Path, ...]:
        """The six files that are always read."""
        return (
            self.unet_config,
            self.unet_weights,
            self.vae_config,
            self.vae_weights,
            self.whisper_config,
            self.whisper_weights,
        )


def models_folder() -> Path:
    """Where the official weights belong: in $MUSE_MODELS_DIR, else in the repository's models/."""
    named = os.environ.get(MODELS_VARIABLE)
    return Path(named).expanduser() if named else config.REPOSITORY / "models"


def look_up(path: Path) -> Path:
    """`path` itself when absolute; else below the working directory, else below the repository's folder.

    What is below models/ is looked for in `models_folder` before the repository.
    """
    path = path.expanduser()
    places = [Path.cwd() / path, config.REPOSITORY / path]
    if path.parts[:1] == ("models",):
        places.insert(1, models_folder().joinpath(*path.parts[1:]))
    return next((place for place in places if path.is_absolute() or place.exists()), places[1])


def _vae_folder(vae_type: str) -> Path:
    named = Path(vae_type)
    candidates = [look_up(named), look_up(Path("models") / named)]
    if len(named.parts) == 1:
        candidates.reverse()
    if vae_type == ModelPaths.vae_type:
        candidates.append(look_up(Path(OLDER_VAE_FOLDER)))
    found = next((folder for folder in candidates if folder.is_dir()), candidates[0])
    return _folder(found, VAE_REPOSITORY if vae_type == ModelPaths.vae_type else "")


def _folder(place: Path, repository: str = "") -> Path:
    """The folder with a network's files: `place`, or the snapshot where that has the hub's cache layout.

    Args:
        place: where they belong.
        repository: whose copy in a hub's cache is taken where `place` isn't there; empty for none.
    """
    if repository and not place.exists():
        return _cached_copy(repository) or place
    return _snapshot(place) or place


def _unet_file(named: Path | None, official: str) -> Path:
    """A file of MuseTalk's own repository: the one that is named, in its place, or in a hub's cache."""
    place = look_up(named or Path(official))
    if named is None and not place.is_file() and (copy := _cached_copy(MUSETALK_REPOSITORY)):
        return copy / Path(official).relative_to("models")
    return place


def _cached_copy(repository: str) -> Path | None:
    """A repository's snapshot below models/ or in huggingface_hub's own cache."""
    name = f"models--{repository.replace('/', '--')}"
    return _snapshot(look_up(Path("models") / name)) or _snapshot(hub_cache() / name)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what other programs downloaded."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"


def _snapshot(place: Path) -> Path | None:
    """The snapshot that `main` names, else the newest; None where `place` hasn't the hub's layout."""
    snapshots = place / "snapshots"
    if not snapshots.is_dir():
        return None
    main = place / "refs" / "main"
    if main.is_file():
        named = snapshots / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    return max(
        (path for path in snapshots.iterdir() if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )


def _first_present(folder: Path, names: tuple[str, ...]) -> Path:
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def find_files(models: ModelPaths) -> MuseTalkFiles:
    """Where each file of the MuseTalk engine is, or would be."""
    unet_config, unet_weights = UNET_FILES[models.version]
    vae = _vae_folder(models.vae_type)
    whisper = _folder(
        look_up(models.whisper_dir or Path(WHISPER_FOLDER)), "" if models.whisper_dir else WHISPER_REPOSITORY
    )
    taesd = _folder(
        look_up(models.taesd_dir or Path(TAESD_FOLDER)), "" if models.taesd_dir else TAESD_REPOSITORY
    )
    return MuseTalkFiles(
        version=models.version,
        unet_config=_unet_file(models.unet_config, unet_config),
        unet_weights=_unet_file(models.unet_model_path, unet_weights),
        vae_config=vae / "config.json",
        vae_weights=_first_present(vae, VAE_WEIGHT_NAMES),
        whisper_config=whisper / "config.json",
        whisper_weights=_first_present(whisper, WHISPER_WEIGHT_NAMES),
        taesd_config=taesd / "config.json",
        taesd_weights=_first_present(taesd, VAE_WEIGHT_NAMES),
    )


def official_paths(folder: Path, version: Version = ModelPaths.version) -> ModelPaths:
    """Every file in its official place below the models folder `folder`, all of them named."""
    config_path, weights_path = (folder / Path(name).relative_to("models") for name in UNET_FILES[version])
    return ModelPaths(
        version=version,
        unet_config=config_path,
        unet_model_path=weights_path,
        vae_type=str(folder / ModelPaths.vae_type),
        whisper_dir=folder / Path(WHISPER_FOLDER).name,
        taesd_dir=folder / Path(TAESD_FOLDER).name,
    )


def missing_files(models: ModelPaths) -> list[Path]:
    """The engine's files that are not there."""
    return [path for path in find_files(models).paths() if not path.is_file()]


def missing_tiny_files(models: ModelPaths) -> list[Path]:
    """The tiny decoder's files that are not there."""
    files = find_files(models)
    return [path for path in (files.taesd_config, files.taesd_weights) if not path.is_file()]


def missing_named_files(models: ModelPaths) -> list[Path]:
    """Missing files that the caller named himself, rather than left at their official place."""
    files = find_files(models)
    named: list[Path] = []
    if models.unet_config is not None:
        named.append(files.unet_config)
    if models.unet_model_path is not None:
        named.append(files.unet_weights)
    if models.vae_type != ModelPaths.vae_type:
        named += [files.vae_config, files.vae_weights]
    if models.whisper_dir is not None:
        named += [files.whisper_config, files.whisper_weights]
    return [path for path in named if not path.is_file()]


def _official(path: Path) -> OfficialFile | None:
    tail = "/".join(path.parts[-2:])
    return next((file for file in REGISTRY if file.path == tail), None)


def _described(path: Path) -> str:
    official = _official(path)
    size = official.source.size if official else None
    return f"{path} ({size / 1e6:,.1f} MB)" if size else str(path)


def missing_weights_error(missing: list[Path], selection: str = "") -> WeightsError:
    """The error that names each missing file, its size and the command that gets it.

    Args:
        missing: the files.
        selection: what the command needs to get them, where it doesn't by itself.
    """
    command = f"{DOWNLOAD_COMMAND} {selection}".rstrip()
    names = ", ".join(_described(path) for path in missing)
    return WeightsError(
        f"model weights are missing 缺少模型权重: {names}",
        f"run {command}, or correct the path 请下载权重或修正路径",
    )


def require_files(models: ModelPaths) -> MuseTalkFiles:
    """All files of the MuseTalk engine.

    Raises:
        WeightsError: some are missing; the message names each.
    """
    missing = missing_files(models)
    if missing:
        raise missing_weights_error(missing)
    return find_files(models)


def sampled_digest(paths: Iterable[Path]) -> str:
    """Hex digest of files by their sizes and 64 evenly spaced samples each.

    Another training differs in all of them, and gigabytes need not be read at every request.

    Raises:
        WeightsError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb") as stream:
                for sample in range(FINGERPRINT_SAMPLES):
                    stream.seek(size * sample // FINGERPRINT_SAMPLES)
                    digest.update(stream.read(FINGERPRINT_SAMPLE_BYTES))
        except FileNotFoundError as e:
            raise missing_weights_error([path]) from e
    return digest.hexdigest()


def latents_fingerprint(files: MuseTalkFiles) -> str:
    """Identity of the latents that templates hold: the MuseTalk version and the VAE that encodes.

    Raises:
        WeightsError: the VAE's files are missing.
    """
    return f"musetalk-{files.version}-{sampled_digest([files.vae_config, files.vae_weights])[:16]}"
