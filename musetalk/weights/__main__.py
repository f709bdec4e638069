"""The official weights on the command line: one JSON object on stdout, a table on stderr.

python -m musetalk.weights list | download [--only v15 vae …] [--mirror URL] | verify
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from musetalk.errors import EngineError, MuseTalkError, OutputError, WeightsError
from musetalk.files import remove_folder
from musetalk.weights.download import PAUSE, STAGING_FOLDER
from musetalk.weights.files import models_folder
from musetalk.weights.folder import WeightsFolder
from musetalk.weights.registry import DEFAULT_GROUPS, REGISTRY, OfficialFile

log = logging.getLogger(__name__)

PARALLEL_DOWNLOADS = 4
LOADS = {True: "loads       ", False: "doesn't load  ", None: ""}


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
        loads = LOADS.get(answer.get("loads"), "") if "loads" in answer else ""
        yield f"{answer['state']:<11}{size}  {answer['group']:<8} {loads}{answer['path']}"
        if answer.get("found_size") not in (None, answer["size"]) and answer["size"]:
            yield f"{'':<11}{answer['found_size'] / 1e6:10,.1f} MB  are there, not the published size"
    for problem in dict.fromkeys(answer.get("problem") or "" for answer in answers):
        if problem:
            yield f"⚠️ {problem}"


def list_command(weights: WeightsFolder, files: Sequence[OfficialFile]) -> tuple[list[dict[str, Any]], bool]:
    """Which files are there; nothing is read."""
    states = ("present" if weights.path(file).is_file() else "missing" for file in files)
    return [_file_answer(weights, file, state) for file, state in zip(files, states, strict=True)], True


def verify_command(
    weights: WeightsFolder, files: Sequence[OfficialFile]
) -> tuple[list[dict[str, Any]], bool]:
    """Which files are the official ones, and which would load; every file is read.

    Wrong files fail, and so do none at all. A file may be wrong and load all the same: another precision or
    format of the same network.
    """
    there = {file.group for file in files if weights.path(file).is_file()}
    problems = {group: _loading_problem(weights.folder, group) for group in there}
    answers = []
    for file in files:
        answer = _file_answer(weights, file, weights.state(file))
        answers.append({**answer, **_found(weights.path(file), problems.get(file.group))})
    states = {answer["state"] for answer in answers}
    return answers, "wrong" not in states and states != {"missing"}


def _found(path: Path, problem: str | None) -> dict[str, Any]:
    size = path.stat().st_size if path.is_file() else None
    return {"found_size": size, "loads": problem == "" if problem is not None else None, "problem": problem}


def _loading_problem(folder: Path, group: str) -> str | None:
    """Why the network of a group wouldn't load, in words; "" where it would, None where it can't be told."""
    try:
        _open(folder, group)
    except WeightsError as e:
        return e.message
    except (EngineError, ImportError) as e:
        log.info("%s: %s", group, e)
        return None
    return ""


def _open(folder: Path, group: str) -> None:
    """Opens a group's network as the engine and the face finders do.

    Raises:
        WeightsError: its files are missing, damaged or of another network.
        EngineError, ImportError: a package isn't installed.
    """
    from musetalk.engines.loading import GROUPS, try_network
    from musetalk.faces.choice import BISENET_WEIGHTS, DWPOSE_WEIGHTS, LANDMARK_WEIGHTS, S3FD_WEIGHTS

    if group in GROUPS:
        try_network(folder, group)
    elif group == "bisenet":
        from musetalk.faces.bisenet import load_bisenet

        load_bisenet(folder / BISENET_WEIGHTS, "cpu")
    elif group == "s3fd":
        from musetalk.faces.s3fd import S3fdDetector

        S3fdDetector(folder / S3FD_WEIGHTS, folder / LANDMARK_WEIGHTS, "cpu")
    elif group == "dwpose":
        from musetalk.faces.dwpose import load_estimator

        load_estimator(folder / DWPOSE_WEIGHTS, "cpu")
    else:
        raise EngineError(f"nothing is known that loads {group}")


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
    with contextlib.suppress(OSError):  # nothing in it is needed any more
        remove_folder(weights.folder / STAGING_FOLDER)
    return [_file_answer(weights, file, job.result()) for file, job in zip(files, jobs, strict=True)], True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m musetalk.weights", description="The official weights.")
    parser.add_argument("command", choices=("list", "download", "verify"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups (v15 v1 vae …) or paths of files")
    parser.add_argument("--mirror", metavar="URL", help="another model hub, https://hf-mirror.com say")
    parser.add_argument("--models_dir", type=Path, default=models_folder(), help="(default %(default)s)")
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
