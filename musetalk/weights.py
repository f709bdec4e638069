"""The official weights: where their files are looked for, what is missing, how to get and check them.

The decision a reader would question: sizes and sha256 sums are pinned here, for files that live in other
people's repositories. They were published by those repositories (Git LFS ids) and agree in several
independent public listings; a file without a pinned sum is recorded at its first download and held to that
record from then on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from musetalk import config
from musetalk.config import ModelPaths, Version
from musetalk.errors import WeightsError

DOWNLOAD_COMMAND = "python -m musetalk.weights download"
UNET_FILES: dict[Version, tuple[str, str]] = {
    "v1": ("models/musetalk/musetalk.json", "models/musetalk/pytorch_model.bin"),
    "v15": ("models/musetalkV15/musetalk.json", "models/musetalkV15/unet.pth"),
}
VAE_WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WHISPER_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
WHISPER_FOLDER = "models/whisper"


@dataclass(frozen=True)
class MuseTalkFiles:
    """The files that the MuseTalk engine reads; `missing_files` says which are not there."""

    version: Version
    unet_config: Path
    unet_weights: Path
    vae_config: Path
    vae_weights: Path
    whisper_config: Path
    whisper_weights: Path

    def paths(self) -> tuple[Path, ...]:
        """All six files."""
        return (
            self.unet_config,
            self.unet_weights,
            self.vae_config,
            self.vae_weights,
            self.whisper_config,
            self.whisper_weights,
        )


@dataclass(frozen=True)
class OfficialFile:
    """One published file and the place under models/ where the engine looks for it.

    Attributes:
        path: below models/, with forward slashes.
        size: bytes; None where nobody publishes it.
        sha256: hex digest; None where it is recorded at the first download.
        repository: on the model hub, "owner/name"; empty for a plain address.
        source: path inside the repository, or the address.
        revision: the repository's commit that the sums belong to.
        group: what `--only` calls it.
    """

    path: str
    size: int | None
    sha256: str | None
    repository: str
    source: str
    revision: str
    group: str


def _on_hub(
    repository: str, revision: str, group: str, *files: tuple[str, str, int, str]
) -> tuple[OfficialFile, ...]:
    return tuple(
        OfficialFile(path, size, sha256, repository, source, revision, group)
        for path, source, size, sha256 in files
    )


REGISTRY: tuple[OfficialFile, ...] = (
    *_on_hub(
        "TMElyralab/MuseTalk",
        "3ef28bc5cff08c90ad8178a25f1b570cd800170f",
        "v15",
        (
            "musetalkV15/musetalk.json",
            "musetalkV15/musetalk.json",
            748,
            "5b6923aee04d71692e0e9846c471e0a4ea07a4f686d39545e472bd4ba17e1b47",
        ),
        (
            "musetalkV15/unet.pth",
            "musetalkV15/unet.pth",
            3_400_074_924,
            "7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007",
        ),
    ),
    *_on_hub(
        "stabilityai/sd-vae-ft-mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "vae",
        (
            "sd-vae/config.json",
            "config.json",
            547,
            "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e",
        ),
        (
            "sd-vae/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors",
            334_643_276,
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        ),
    ),
    *_on_hub(
        "openai/whisper-tiny",
        "169d4a4341b33bc18d8881c4b69c2e104e1cc0af",
        "whisper",
        (
            "whisper/config.json",
            "config.json",
            1_983,
            "ffdccec4f3211f4c63310f2b7098f309fe70f3952cedc5e4d11e43f5b2379b98",
        ),
        (
            "whisper/model.safetensors",
            "model.safetensors",
            151_061_672,
            "7ebd0e69e78190ffe1438491fa05cc1f5c1aa3a4c4db3bc1723adbb551ea2395",
        ),
        (
            "whisper/preprocessor_config.json",
            "preprocessor_config.json",
            184_990,
            "9b5cd03a36fbb8a627c64d98a5b5b126ead95a77720723944487311f0110b666",
        ),
    ),
    *_on_hub(
        "yzd-v/DWPose",
        "1a7144101628d69ee7a3768d1ee3a094070dc388",
        "dwpose",
        (
            "dwpose/dw-ll_ucoco_384.pth",
            "dw-ll_ucoco_384.pth",
            406_878_486,
            "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07",
        ),
    ),
    *_on_hub(
        "ManyOtherFunctions/face-parse-bisent",
        "0073b233a5a3c4b1377d4dbf49245017938a72b5",
        "bisenet",
        (
            "face-parse-bisent/79999_iter.pth",
            "79999_iter.pth",
            53_289_463,
            "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        ),
    ),
)


def look_up(path: Path) -> Path:
    """`path` itself when absolute; else below the working directory, else below the repository's folder."""
    path = path.expanduser()
    here = Path.cwd() / path
    return here if path.is_absolute() or here.exists() else config.REPOSITORY / path


def _vae_folder(vae_type: str) -> Path:
    named = Path(vae_type)
    candidates = [look_up(named), look_up(Path("models") / named)]
    if len(named.parts) == 1:
        candidates.reverse()
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def _first_present(folder: Path, names: tuple[str, ...]) -> Path:
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def find_files(models: ModelPaths) -> MuseTalkFiles:
    """Where each file of the MuseTalk engine is, or would be."""
    unet_config, unet_weights = (Path(name) for name in UNET_FILES[models.version])
    vae = _vae_folder(models.vae_type)
    whisper = look_up(models.whisper_dir or Path(WHISPER_FOLDER))
    return MuseTalkFiles(
        version=models.version,
        unet_config=look_up(models.unet_config or unet_config),
        unet_weights=look_up(models.unet_model_path or unet_weights),
        vae_config=vae / "config.json",
        vae_weights=_first_present(vae, VAE_WEIGHT_NAMES),
        whisper_config=whisper / "config.json",
        whisper_weights=_first_present(whisper, WHISPER_WEIGHT_NAMES),
    )


def missing_files(models: ModelPaths) -> list[Path]:
    """The engine's files that are not there."""
    return [path for path in find_files(models).paths() if not path.is_file()]


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
    size = f" ({official.size / 1e6:,.0f} MB)" if official and official.size and official.size > 1e6 else ""
    return f"{path}{size}"


def missing_weights_error(missing: list[Path]) -> WeightsError:
    """The error that names each missing file, its size and the command that gets it."""
    names = ", ".join(_described(path) for path in missing)
    return WeightsError(
        f"model weights are missing 缺少模型权重: {names}",
        f"run {DOWNLOAD_COMMAND}, or correct the path 请下载权重或修正路径",
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


FINGERPRINT_SAMPLES = 64
FINGERPRINT_SAMPLE_BYTES = 4096


def latents_fingerprint(files: MuseTalkFiles) -> str:
    """Identity of the latents that templates hold: the MuseTalk version and the VAE that encodes.

    The configuration is hashed whole, the weights by their size and 64 evenly spaced samples: any other
    training differs in all of them, and 335 MB need not be read at every request.

    Raises:
        WeightsError: the VAE's files are missing.
    """
    try:
        digest = hashlib.sha256(files.vae_config.read_bytes())
        size = files.vae_weights.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with files.vae_weights.open("rb") as stream:
            for sample in range(FINGERPRINT_SAMPLES):
                stream.seek(size * sample // FINGERPRINT_SAMPLES)
                digest.update(stream.read(FINGERPRINT_SAMPLE_BYTES))
    except FileNotFoundError as e:
        raise missing_weights_error([Path(e.filename)]) from e
    return f"musetalk-{files.version}-{digest.hexdigest()[:16]}"
