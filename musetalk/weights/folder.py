"""A models folder: which official files are in it, whether they are right, and how they get there.

The decision a reader would question: a file without a published checksum is recorded at its first download
and held to that record from then on.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from musetalk.errors import OutputError, UsageError
from musetalk.files import atomic_file, file_sha256, replace_file
from musetalk.weights.download import PAUSE, STAGING_FOLDER, fetch
from musetalk.weights.registry import REGISTRY, OfficialFile, Source

log = logging.getLogger(__name__)

RECORD_NAME = ".checksums.json"  # beside the models: what files without a published checksum were at first


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
            with atomic_file(self.folder / RECORD_NAME) as stream:
                stream.write(json.dumps(records, indent=1, sort_keys=True).encode())

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
            replace_file(path, path.with_name(path.name + ".bad"))
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
