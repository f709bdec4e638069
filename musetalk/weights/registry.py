"""The official files: where each is published, how large it is, its checksum, and its place under models/.

The decision a reader would question: sizes and sha256 sums are pinned here, for files that live in other
people's repositories. They were published by those repositories (Git LFS ids) and agree in several
independent public listings.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where a file comes from and what it must be.

    Attributes:
        repository: "owner/name" on a model hub; empty when `location` is a plain address.
        location: path inside the repository, or the address.
        revision: the repository's commit.
        size: bytes; None when unknown.
        sha256: hex digest; None when unknown.
    """

    repository: str
    location: str
    revision: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class OfficialFile:
    """One published file and the place under models/ where it is looked for.

    Attributes:
        group: what `--only` calls it.
        path: below models/, with forward slashes.
        source: where it comes from, its size and checksum as published.
    """

    group: str
    path: str
    source: Source


def _hub(
    group: str, path: str, size: int | None, sha256: str | None, repository: str, revision: str
) -> OfficialFile:
    """A hub's file, which lies there under its last name, or under `path` in MuseTalk's own repository."""
    location = path if repository == MUSETALK_REPOSITORY else path.rpartition("/")[2]
    return OfficialFile(group, path, Source(repository, location, revision, size, sha256))


def _plain(group: str, path: str, size: int | None, sha256: str, address: str) -> OfficialFile:
    return OfficialFile(group, path, Source("", address, "", size, sha256))


MUSETALK_REPOSITORY = "TMElyralab/MuseTalk"
_MUSETALK = (MUSETALK_REPOSITORY, "3ef28bc5cff08c90ad8178a25f1b570cd800170f")
VAE_REPOSITORY = "stabilityai/sd-vae-ft-mse"
WHISPER_REPOSITORY = "openai/whisper-tiny"
TAESD_REPOSITORY = "madebyollin/taesd"
_VAE = (VAE_REPOSITORY, "31f26fdeee1355a5c34592e401dd41e45d25a493")
_WHISPER = (WHISPER_REPOSITORY, "169d4a4341b33bc18d8881c4b69c2e104e1cc0af")
_TAESD = (TAESD_REPOSITORY, "main")
_DWPOSE = ("yzd-v/DWPose", "1a7144101628d69ee7a3768d1ee3a094070dc388")
_BISENET = ("ManyOtherFunctions/face-parse-bisent", "0073b233a5a3c4b1377d4dbf49245017938a72b5")
_FACE_ALIGNMENT = "https://www.adrianbulat.com/downloads/python-fan/"
# fmt: off
REGISTRY: tuple[OfficialFile, ...] = (
    _hub("v15", "musetalkV15/musetalk.json", 748,
         "5b6923aee04d71692e0e9846c471e0a4ea07a4f686d39545e472bd4ba17e1b47", *_MUSETALK),
    _hub("v15", "musetalkV15/unet.pth", 3_400_074_924,
         "7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007", *_MUSETALK),
    _hub("v1", "musetalk/musetalk.json", None, None, *_MUSETALK),
    _hub("v1", "musetalk/pytorch_model.bin", None, None, *_MUSETALK),
    _hub("vae", "sd-vae/config.json", 547,
         "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e", *_VAE),
    _hub("vae", "sd-vae/diffusion_pytorch_model.safetensors", 334_643_276,
         "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", *_VAE),
    _hub("whisper", "whisper/config.json", 1_983,
         "ffdccec4f3211f4c63310f2b7098f309fe70f3952cedc5e4d11e43f5b2379b98", *_WHISPER),
    _hub("whisper", "whisper/model.safetensors", 151_061_672,
         "7ebd0e69e78190ffe1438491fa05cc1f5c1aa3a4c4db3bc1723adbb551ea2395", *_WHISPER),
    _hub("tiny", "taesd/config.json", None, None, *_TAESD),
    _hub("tiny", "taesd/diffusion_pytorch_model.safetensors", 9_793_292,
         "db169d69145ec4ff064e49d99c95fa05d3eb04ee453de35824a6d0f325513549", *_TAESD),
    _hub("dwpose", "dwpose/dw-ll_ucoco_384.pth", 406_878_486,
         "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07", *_DWPOSE),
    _hub("bisenet", "face-parse-bisent/79999_iter.pth", 53_289_463,
         "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567", *_BISENET),
    _plain("s3fd", "face-alignment/s3fd-619a316812.pth", 89_843_225,
           "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
           f"{_FACE_ALIGNMENT}s3fd-619a316812.pth"),
    _plain("s3fd", "face-alignment/2DFAN4-11f355bf06.pth.tar", None,
           "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
           f"{_FACE_ALIGNMENT}2DFAN4-11f355bf06.pth.tar"),
)
# fmt: on
DEFAULT_GROUPS = ("v15", "vae", "whisper", "dwpose", "bisenet", "s3fd")
