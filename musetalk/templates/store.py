"""Template caches on disk: one pickle and one metadata file per template, published as a pair.

The decision a reader would question: a writer removes the old metadata, moves the new pickle in place,
then the new metadata. A reader trusts a pickle only through metadata that names its sha256, so a kill
between the steps leaves no template rather than half of one. A reader that meets a writer half-way waits
for the template's lock and looks once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

from musetalk.errors import CacheError, CacheMissingError, InputError, OutputError
from musetalk.files import HASH_BLOCK, atomic_file, file_sha256, remove_file, sweep, unfinished_pattern

if TYPE_CHECKING:
    from musetalk.templates.template import Template

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
LEGACY_VERSION = "1.0"
MAX_ID_LENGTH = 120  # characters
MAX_NAME_BYTES = 255  # of a file name, on the common file systems
LOCK_TIMEOUT = 280.0  # seconds; callers give up after 300
CHECK_TIMEOUT = 2.0  # seconds; a publication takes less, and who asks for a state wants it now
MEGABYTE = 1 << 20  # bytes
_RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10))}
_PICKLE_SUFFIX = "_preprocessed.pkl"
_METADATA_SUFFIX = "_metadata.json"
_PREVIEW_SUFFIX = "_preview.jpg"


class TemplateMetadata(TypedDict, total=False):
    """The metadata file: the first eleven keys are the original system's, the rest ours."""

    template_id: str
    template_image_path: str
    bbox_shift: int
    bbox_shift_range: list[int]
    parsing_mode: str
    bbox: list[int]
    processing_time: float
    processed_at: float
    cache_path: str
    frame_count: int
    input_latent_shape: list[int]
    version: str
    schema_version: int
    engine: str
    engine_fingerprint: str
    pkl_sha256: str
    pkl_size: int
    pkl_mtime_ns: int
    source_sha256: str
    frame_size: list[int]
    background_sha256: str
    turned: int
    covered_mouth: float | None
    source_fps: float
    source_duration: float
    variable_frame_rate: bool
    frame_times: list[float]
    unique_frames: int
    faceless_frames: int
    parameters: dict[str, Any]
    stages: dict[str, float]
    vae_region: dict[str, Any]


class CacheInfo(TypedDict):
    """What a cache folder holds."""

    cache_dir: str
    template_count: int
    total_size_mb: float
    templates: list[str]


@dataclass(frozen=True)
class CacheCheck:
    """What `TemplateStore.check` found of one template."""

    exists: bool
    valid: bool
    message: str
    metadata: TemplateMetadata | None = None
    size: int = 0  # bytes
    hint: str = field(default="", kw_only=True)


def check_template_id(template_id: str) -> str:
    """`template_id`, when it is one safe path component on every system.

    Raises:
        InputError: empty, too long, a reserved name, or with a character outside letters of any
            script, digits, space and ``-_.()[]``.
    """
    allowed = all(c in " -_.()[]" or unicodedata.category(c)[0] in "LMN" for c in template_id)
    stem = template_id.split(".")[0].strip().upper()
    too_long = (
        len(template_id) > MAX_ID_LENGTH
        or len(f".{template_id}{_PICKLE_SUFFIX}.12345678.tmp".encode("utf-8", "replace")) > MAX_NAME_BYTES
    )
    bad = not template_id.strip() or not allowed or template_id[0] == "." or template_id[-1] in ". "
    if bad or too_long or stem in _RESERVED_NAMES:
        shown = template_id if len(template_id) <= 40 else template_id[:37] + "..."
        raise InputError(
            f"template_id {shown!r} can't be a file name 模板ID无效",
            f"use letters, digits, space and -_.()[], at most {MAX_ID_LENGTH} characters (fewer of those "
            "that take several bytes), no leading dot, no dot or space at the end",
        )
    return template_id


def _is_template_id(name: str) -> bool:
    try:
        return bool(check_template_id(name))
    except InputError:
        return False


class _HashingStream:
    """A file that takes the sha256 of what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.size += memoryview(data).nbytes
        return self._stream.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class TemplateStore:
    """The templates of one cache folder.

    Args:
        cache_dir: made when the first template is published.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self.cache_dir = Path(cache_dir)

    def pickle_path(self, template_id: str) -> Path:
        """Where the template's arrays are."""
        return self.cache_dir / (check_template_id(template_id) + _PICKLE_SUFFIX)

    def metadata_path(self, template_id: str) -> Path:
        """Where the template's metadata is."""
        return self.cache_dir / (check_template_id(template_id) + _METADATA_SUFFIX)

    def preview_path(self, template_id: str) -> Path:
        """Where the picture for operators is: box, landmarks and mask drawn on the first face."""
        return self.cache_dir / (check_template_id(template_id) + _PREVIEW_SUFFIX)

    def found_pickle(self, template_id: str) -> Path:
        """Where the template's arrays are to be read: here, or in a folder of its own that a caller made."""
        return self._found(self.pickle_path(template_id), template_id)

    def found_metadata(self, template_id: str) -> Path:
        """Where the template's metadata is to be read."""
        return self._found(self.metadata_path(template_id), template_id)

    def _found(self, path: Path, template_id: str) -> Path:
        nested = self.cache_dir / template_id / path.name
        return nested if not path.exists() and nested.exists() else path

    @contextlib.contextmanager
    def lock(self, template_id: str, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
        """Holds the template's lock, across threads and processes; what a killed holder left is removed.

        Raises:
            CacheError: another process held it for `timeout` seconds.
            OutputError: the cache folder can't be written.
        """
        from filelock import FileLock, Timeout

        check_template_id(template_id)
        folder = self.cache_dir / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{template_id}.lock", timeout=timeout)
            lock.acquire()
        except Timeout as e:
            raise CacheError(
                f"template {template_id} is being written by another process 模板正被其他进程处理",
                "try again later",
            ) from e
        except OSError as e:
            raise OutputError(
                f"the cache folder {self.cache_dir} can't be written: {e.strerror or e}",
                "choose another --cache_dir",
            ) from e
        try:
            self._remove_leftovers(template_id)
            yield
        finally:
            lock.release()

    def publish(
        self, template_id: str, template: Template, metadata: TemplateMetadata, preview: bytes | None = None
    ) -> TemplateMetadata:
        """Writes the pair; the caller holds `lock`. Returns the metadata with path, size and sha256.

        Args:
            preview: an encoded JPEG for operators.
        """
        from musetalk.templates.pickle import dump_template

        pickle_path, metadata_path = self.pickle_path(template_id), self.metadata_path(template_id)
        if preview is not None:
            with atomic_file(self.preview_path(template_id)) as stream:
                stream.write(preview)
        # both are whole before one of them is seen: what fails until then leaves the old pair
        with atomic_file(metadata_path) as described, atomic_file(pickle_path) as stream:
            hashing = _HashingStream(stream)
            dump_template(template, hashing)
            stream.flush()
            os.fsync(stream.fileno())
            complete: TemplateMetadata = {
                **metadata,
                "cache_path": str(pickle_path),
                "schema_version": SCHEMA_VERSION,
                "pkl_sha256": hashing.sha256,
                "pkl_size": hashing.size,
                "pkl_mtime_ns": os.fstat(stream.fileno()).st_mtime_ns,
            }
            described.write(_json_bytes(complete))
            described.flush()
            remove_file(metadata_path)
        return complete

    def _remove_leftovers(self, template_id: str) -> None:
        suffixes = (_PICKLE_SUFFIX, _METADATA_SUFFIX, _PREVIEW_SUFFIX)
        patterns = (unfinished_pattern(template_id + suffix) for suffix in suffixes)
        sweep(self.cache_dir, "|".join(patterns))

    def read_metadata(self, template_id: str) -> TemplateMetadata:
        """The metadata file's content; waits for a writer of it.

        Raises:
            CacheMissingError: no template of that id.
            CacheError: the file is not the metadata of this template.
        """
        return self._retry_locked(template_id, lambda: self._read_metadata(template_id), LOCK_TIMEOUT)

    def _read_metadata(self, template_id: str) -> TemplateMetadata:
        path = self.found_metadata(template_id)
        try:
            content = path.read_bytes()
        except FileNotFoundError as e:
            raise missing_cache(template_id, self.cache_dir) from e
        except OSError as e:
            raise damaged_cache(template_id, f"{path.name} can't be read: {e.strerror or e}") from e
        try:
            metadata = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise damaged_cache(template_id, f"{path.name} is not JSON") from e
        if not isinstance(metadata, dict) or metadata.get("template_id") != template_id:
            raise damaged_cache(template_id, f"{path.name} is not this template's metadata")
        if metadata.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise damaged_cache(template_id, "it was written by another version")
        return metadata  # type: ignore[return-value]

    def identity(self, template_id: str, metadata: TemplateMetadata) -> tuple[Any, ...]:
        """What tells this state of a template's cache from any other, legacy caches' too; equality counts."""
        if (checksum := metadata.get("pkl_sha256")) is not None:
            return (checksum,)
        try:
            status = self.found_pickle(template_id).stat()
        except OSError as e:
            raise missing_cache(template_id, self.cache_dir) from e
        return status.st_size, status.st_mtime_ns

    def load(self, template_id: str) -> tuple[Template, TemplateMetadata]:
        """The template and its metadata, checked.

        Raises:
            CacheMissingError: no template of that id.
            CacheError: damaged, unsafe or of an unknown format.
        """
        return self._retry_locked(template_id, lambda: self._load(template_id), LOCK_TIMEOUT)

    def _load(self, template_id: str) -> tuple[Template, TemplateMetadata]:
        from musetalk.templates.pickle import load_template_dict
        from musetalk.templates.template import Template

        metadata = self._read_metadata(template_id)
        path = self.found_pickle(template_id)
        try:
            with path.open("rb") as stream:
                data = load_template_dict(stream, metadata.get("pkl_sha256"))
        except FileNotFoundError as e:
            raise self._incomplete(template_id, path) from e
        except OSError as e:
            raise damaged_cache(template_id, f"{path.name} can't be read: {e.strerror or e}") from e
        if is_legacy(metadata):
            log.warning("⚠️ %s is a cache of the original system, without checksum 旧版缓存", path.name)
        return Template.from_dict(data), metadata

    def _retry_locked(self, template_id: str, read: Callable[[], Any], timeout: float) -> Any:
        """`read()`, once more under the lock when it meets a writer half-way."""
        try:
            return read()
        except CacheError:
            if not (self.cache_dir / ".locks" / f"{template_id}.lock").exists():
                raise
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OutputError):  # nobody writes in a folder that can't be written
                stack.enter_context(self.lock(template_id, timeout))
            return read()

    def check(self, template_id: str, *, full: bool = True) -> CacheCheck:
        """Whether the template can be used, without unpickling it; waits for a publication, not for more.

        Args:
            full: also compare the pickle's sha256 unless nobody wrote to it since its publication; else
                its size only.
        """
        check_template_id(template_id)
        try:
            return self._retry_locked(template_id, lambda: self._check(template_id, full), CHECK_TIMEOUT)
        except CacheError as e:
            return self._failed_check(template_id, e)

    def check_held(self, template_id: str) -> CacheCheck:
        """As `check`, for a caller that holds the template's lock."""
        try:
            return self._check(template_id, full=True)
        except CacheError as e:
            return self._failed_check(template_id, e)

    def _failed_check(self, template_id: str, error: CacheError) -> CacheCheck:
        found = self.found_pickle(template_id).exists() or self.found_metadata(template_id).exists()
        exists = found and not isinstance(error, CacheMissingError)
        return CacheCheck(exists=exists, valid=False, message=error.message, hint=error.hint)

    def _incomplete(self, template_id: str, pickle_path: Path) -> CacheError:
        """Why there is no pickle beside metadata that were read a moment ago."""
        if self.found_metadata(template_id).exists():
            return damaged_cache(template_id, f"{pickle_path.name} is missing")
        return missing_cache(template_id, self.cache_dir)

    def _check(self, template_id: str, full: bool) -> CacheCheck:
        metadata = self._read_metadata(template_id)
        path = self.found_pickle(template_id)
        try:
            status = path.stat()
            size = status.st_size
            expected_hash, expected_size = metadata.get("pkl_sha256"), metadata.get("pkl_size", size)
            intact = size == expected_size and size > 0
            # the metadata is the later file, so whoever writes to the pickle afterwards makes it as late
            published = self.found_metadata(template_id).stat().st_mtime_ns
            untouched = metadata.get("pkl_mtime_ns") == status.st_mtime_ns < published
            if intact and full and expected_hash is not None and not untouched:
                intact = file_sha256(path) == expected_hash
        except FileNotFoundError as e:
            raise self._incomplete(template_id, path) from e
        except OSError as e:
            raise damaged_cache(template_id, f"{path.name} can't be read: {e.strerror or e}") from e
        if not intact:
            raise damaged_cache(template_id, f"{path.name} differs from its checksum")
        if is_legacy(metadata):
            message = f"✅ 模板缓存可用(旧版格式) legacy cache without checksum: {template_id}"
        else:
            message = f"✅ 模板缓存可用 cache is valid: {template_id}"
        return CacheCheck(exists=True, valid=True, message=message, metadata=metadata, size=size)

    def template_ids(self) -> list[str]:
        """Ids that have metadata, in name order; files whose names are no ids are left out."""
        if not self.cache_dir.is_dir():
            return []
        names = (p.name for p in self.cache_dir.iterdir() if p.name.endswith(_METADATA_SUFFIX))
        return sorted(filter(_is_template_id, (name[: -len(_METADATA_SUFFIX)] for name in names)))

    def size(self, template_id: str) -> int:
        """Bytes of the template's pickle; 0 when there is none."""
        try:
            return self.found_pickle(template_id).stat().st_size
        except OSError:
            return 0

    def info(self) -> CacheInfo:
        """The folder, its templates and their total size."""
        ids = self.template_ids()
        return {
            "cache_dir": str(self.cache_dir),
            "template_count": len(ids),
            "total_size_mb": round(sum(map(self.size, ids)) / MEGABYTE, 2),
            "templates": ids,
        }

    def export(self, template_id: str, target: Path) -> None:
        """Copies the template's pickle to `target`, atomically."""
        import shutil

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(
                f"{target.parent} can't be made: {e.strerror or e}", "choose another path"
            ) from e
        with self.pickle_path(template_id).open("rb") as source, atomic_file(target) as stream:
            shutil.copyfileobj(source, stream, HASH_BLOCK)

    def clean(self, template_id: str) -> int:
        """Removes the template's files, those in a folder of its own too; returns how many there were."""
        paths = (
            self.metadata_path(template_id),
            self.pickle_path(template_id),
            self.preview_path(template_id),
        )
        nested = (self.cache_dir / template_id / path.name for path in paths)
        with self.lock(template_id):
            present = [path for path in (*paths, *nested) if path.exists()]
            for path in present:
                remove_file(path)
        return len(present)


def _json_bytes(metadata: TemplateMetadata) -> bytes:
    """UTF-8; a name that isn't UTF-8 keeps its bytes as lone surrogates, which JSON escapes as \\udcXX."""
    return json.dumps(metadata, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")


def is_legacy(metadata: TemplateMetadata) -> bool:
    """Whether the original system wrote the cache: it knew no checksums."""
    return metadata.get("version") == LEGACY_VERSION and metadata.get("pkl_sha256") is None


def missing_cache(template_id: str, cache_dir: Path) -> CacheMissingError:
    """The documented error of a template that was never preprocessed."""
    return CacheMissingError(
        f"❌ 模板缓存不存在: {template_id}",
        f"💡 请先运行预处理创建缓存 (run --preprocess first; looked in {cache_dir.absolute()})",
    )


def damaged_cache(template_id: str, reason: str) -> CacheError:
    """The error of a cache that is there but can't be used."""
    return CacheError(
        f"❌ 模板缓存已损坏 template cache {template_id} can't be used: {reason}",
        "💡 请重新运行预处理 (run --preprocess --force_refresh again)",
    )
