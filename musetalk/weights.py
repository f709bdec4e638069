"""The official weights: where their files are looked for, what is missing, how to get and check them.

    python -m musetalk.weights list | download [--only v15 vae …] [--mirror URL] | verify

The decision a reader would question: sizes and sha256 sums are pinned here, for files that live in other
people's repositories. They were published by those repositories (Git LFS ids) and agree in several
independent public listings; a file without a pinned sum is recorded at its first download and held to that
record from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from musetalk import config
from musetalk.config import ModelPaths, Version
from musetalk.download import PAUSE, STAGING_FOLDER, Source, fetch
from musetalk.errors import MuseTalkError, OutputError, UsageError, WeightsError
from musetalk.files import file_sha256

log = logging.getLogger(__name__)

DOWNLOAD_COMMAND = "python -m musetalk.weights download"
UNET_FILES: dict[Version, tuple[str, str]] = {
    "v1": ("models/musetalk/musetalk.json", "models/musetalk/pytorch_model.bin"),
    "v15": ("models/musetalkV15/musetalk.json", "models/musetalkV15/unet.pth"),
}
VAE_WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WHISPER_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
WHISPER_FOLDER = "models/whisper"
FINGERPRINT_SAMPLES = 64
FINGERPRINT_SAMPLE_BYTES = 4096
RECORD_NAME = ".checksums.json"  # beside the models: what files without a published checksum were at first
PARALLEL_DOWNLOADS = 4


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
_VAE = ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493")
_WHISPER = ("openai/whisper-tiny", "169d4a4341b33bc18d8881c4b69c2e104e1cc0af")
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
    _hub("whisper", "whisper/preprocessor_config.json", 184_990,
         "9b5cd03a36fbb8a627c64d98a5b5b126ead95a77720723944487311f0110b666", *_WHISPER),
    _hub("dwpose", "dwpose/dw-ll_ucoco_384.pth", 406_878_486,
         "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07", *_DWPOSE),
    _hub("bisenet", "face-parse-bisent/79999_iter.pth", 53_289_463,
         "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567", *_BISENET),
    _plain("bisenet", "face-parse-bisent/resnet18-5c106cde.pth", 46_827_520,
           "5c106cde386e87d4033832f2996f5493238eda96ccf559d1d62760c4de0613f8",
           "https://download.pytorch.org/models/resnet18-5c106cde.pth"),
    _plain("s3fd", "face-alignment/s3fd-619a316812.pth", 89_843_225,
           "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
           f"{_FACE_ALIGNMENT}s3fd-619a316812.pth"),
    _plain("s3fd", "face-alignment/2DFAN4-11f355bf06.pth.tar", None,
           "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
           f"{_FACE_ALIGNMENT}2DFAN4-11f355bf06.pth.tar"),
)
# fmt: on
DEFAULT_GROUPS = ("v15", "vae", "whisper", "dwpose", "bisenet", "s3fd")


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
    size = official.source.size if official else None
    return f"{path} ({size / 1e6:,.1f} MB)" if size else str(path)


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


class WeightsFolder:
    """A models folder and the official files in it.

    Args:
        folder: where files are put and looked for; made at the first download.
        registry: the official files.
    """

    def __init__(self, folder: Path, registry: Sequence[OfficialFile] = REGISTRY) -> None:
        self.folder = folder
        self.registry = tuple(registry)
        self._record_lock = threading.Lock()

    def select(self, names: Sequence[str]) -> list[OfficialFile]:
        """The files of the groups or paths named.

        Raises:
            UsageError: a name is neither.
        """
        known = {file.group for file in self.registry} | {file.path for file in self.registry}
        unknown = [name for name in names if name not in known]
        if unknown:
            groups = ", ".join(dict.fromkeys(file.group for file in self.registry))
            raise UsageError(f"no weights are called {', '.join(unknown)}", f"--only takes {groups}")
        return [file for file in self.registry if file.group in names or file.path in names]

    def path(self, file: OfficialFile) -> Path:
        """Where a file belongs."""
        return self.folder / file.path

    def _records(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / RECORD_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _record(self, file: OfficialFile, sha256: str) -> None:
        with self._record_lock:
            records = self._records() | {file.path: sha256}
            temporary = self.folder / (RECORD_NAME + ".tmp")
            temporary.write_text(json.dumps(records, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(self.folder / RECORD_NAME)

    def expected(self, file: OfficialFile) -> Source:
        """A file's source, with the checksum recorded at its first download where none is published."""
        if file.source.sha256 is not None:
            return file.source
        return replace(file.source, sha256=self._records().get(file.path))

    def state(self, file: OfficialFile) -> str:
        """ "missing", "ok", "wrong" (not the official file) or "unrecorded" (nothing to compare with)."""
        path, expected = self.path(file), self.expected(file)
        if not path.is_file():
            return "missing"
        if expected.size is not None and path.stat().st_size != expected.size:
            return "wrong"
        if expected.sha256 is None:
            return "unrecorded"
        return "ok" if file_sha256(path) == expected.sha256 else "wrong"

    def download(self, file: OfficialFile, mirror: str | None = None, *, pause: float = PAUSE) -> str:
        """Brings one file to its place: "present" when it was there and right, else "downloaded".

        A file that is there and wrong is kept aside as `.bad`.

        Raises:
            WeightsError: the file can't be got, or what arrived is another one.
        """
        state = self.state(file)
        if state in ("ok", "unrecorded"):
            return "present"
        path = self.path(file)
        if state == "wrong":
            log.warning("%s is not the official file, kept as %s.bad", path, path.name)
            path.replace(path.with_name(path.name + ".bad"))
        expected = self.expected(file)
        sha256 = fetch(expected, path, self.folder / STAGING_FOLDER, mirror, pause=pause)
        if expected.sha256 is None:
            self._record(file, sha256)
        log.info("%s is complete", path)
        return "downloaded"

    def check_space(self, files: Iterable[OfficialFile]) -> None:
        """Raises OutputError when the disk has no room for what is missing."""
        wanted = sum(file.source.size or 0 for file in files if not self.path(file).exists())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            raise OutputError(
                f"{self.folder} has {free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB are needed 磁盘空间不足",
                "free some space, or use --models_dir on another disk",
            )


def _file_answer(weights: WeightsFolder, file: OfficialFile, state: str) -> dict[str, Any]:
    return {
        "path": str(weights.path(file)),
        "group": file.group,
        "size": file.source.size,
        "sha256": weights.expected(file).sha256,
        "repository": file.source.repository or None,
        "state": state,
    }


def _table(answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    for answer in answers:
        size = f"{answer['size'] / 1e6:10,.1f} MB" if answer["size"] else " " * 13
        yield f"{answer['state']:<11}{size}  {answer['group']:<8} {answer['path']}"


def list_command(weights: WeightsFolder, files: Sequence[OfficialFile]) -> tuple[list[dict[str, Any]], bool]:
    """Which files are there; nothing is read."""
    states = ("present" if weights.path(file).is_file() else "missing" for file in files)
    return [_file_answer(weights, file, state) for file, state in zip(files, states, strict=True)], True


def verify_command(
    weights: WeightsFolder, files: Sequence[OfficialFile]
) -> tuple[list[dict[str, Any]], bool]:
    """Which files are the official ones; every file is read. Wrong files fail, and so do none at all."""
    answers = [_file_answer(weights, file, weights.state(file)) for file in files]
    states = {answer["state"] for answer in answers}
    return answers, "wrong" not in states and states != {"missing"}


def download_command(
    weights: WeightsFolder, files: Sequence[OfficialFile], mirror: str | None, *, pause: float = PAUSE
) -> tuple[list[dict[str, Any]], bool]:
    """Brings the missing files, several at a time.

    Raises:
        WeightsError: some can't be got; the others are complete.
        OutputError: the disk has no room.
    """
    from concurrent.futures import ThreadPoolExecutor

    weights.check_space(files)
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        jobs = [pool.submit(weights.download, file, mirror, pause=pause) for file in files]
    failures = [error for job in jobs if (error := job.exception()) is not None]
    if failures:
        for error in failures[1:]:
            log.error("%s", error)
        raise failures[0]
    staging = weights.folder / STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    return [_file_answer(weights, file, job.result()) for file, job in zip(files, jobs, strict=True)], True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m musetalk.weights", description="The official weights.")
    parser.add_argument("command", choices=("list", "download", "verify"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups (v15 v1 vae …) or paths of files")
    parser.add_argument("--mirror", metavar="URL", help="another model hub, https://hf-mirror.com say")
    parser.add_argument("--models_dir", type=Path, default=config.REPOSITORY / "models")
    return parser


def _answer(options: argparse.Namespace, registry: Sequence[OfficialFile]) -> tuple[dict[str, Any], int]:
    weights = WeightsFolder(options.models_dir, registry)
    try:
        groups = DEFAULT_GROUPS if options.command == "download" else {file.group for file in registry}
        files = weights.select(options.only or list(groups))
        if options.command == "list":
            answers, right = list_command(weights, files)
        elif options.command == "verify":
            answers, right = verify_command(weights, files)
        else:
            answers, right = download_command(weights, files, options.mirror)
    except (MuseTalkError, OSError) as cause:
        e = cause if isinstance(cause, MuseTalkError) else _unusable(options.models_dir, cause)
        sys.stderr.write(f"❌ {e.message}\n💡 {e.hint}\n")
        failure = {"success": False, "error_code": e.error_code, "error": e.message}
        return {**failure, "message": e.message, "hint": e.hint}, e.exit_code
    sys.stderr.write("\n".join(_table(answers)) + "\n")
    return {"success": right, "models_dir": str(options.models_dir), "files": answers}, 0 if right else 5


def _unusable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} can't be read or written 无法读写: {error.strerror or error}",
        "free some space, or name another folder with --models_dir 请检查磁盘空间和权限",
    )


def main(arguments: Sequence[str] | None = None, registry: Sequence[OfficialFile] = REGISTRY) -> int:
    """The command line: one JSON object on stdout, a table or an error on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    answer, code = _answer(_parser().parse_args(arguments), registry)
    sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=2) + "\n")
    return code


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    os._exit(status)  # the threads of downloads would hold back a Ctrl-C for hours
