"""A template's pickle: written small, read without trusting it.

A frame that shares most of its bytes with the first one, as those of a still portrait brought to life do,
is written as a compressed difference that plain `pickle.load` adds up again, without this package.

The decisions a reader would question: pickle's own opcodes may call whatever `find_class` returns and set
state on it, so numpy's constructors are never handed out. Each allowed name becomes a small sealed object
that takes plain values and builds a plain numeric array, and nothing else can be called. And since a few
opcodes make room for as much as they state before they look for it, `opcodes` reads all of them beforehand.

A large file isn't read into memory but mapped, and its arrays are parts of the map, not to be written to: two
processes with one template hold it once. Pickle's C reader can't do that, its Python one can.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import operator
import os
import pickle
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from musetalk.config import MAX_SIDE, MAX_TEMPLATE_BYTES
from musetalk.errors import CacheError, MuseTalkError
from musetalk.templates.opcodes import check_opcodes

if TYPE_CHECKING:
    from musetalk.templates.template import Template

SHARED_BYTES = 0.5  # of a frame, equal to the first one's, from which a difference pays
DEFLATE_LEVEL = 1
MAX_FRAME_BYTES = 3 * MAX_SIDE * MAX_SIDE
MAX_DEFLATE_RATIO = 1032  # bytes out of one byte in, zlib's technical notes
MAPPED_FILE = 1 << 30  # bytes from which a file is mapped where the system can
MAPPED_VALUE = 1 << 16  # bytes from which a value lies in the file on its own, outside of pickle's frames
COPIES = 2  # of a byte of the file, on its way into an array: as text or bytes, and numpy's own

# what opcodes, numpy and torch's loader raise on bytes that no pickler wrote
_DAMAGE = (
    *(pickle.UnpicklingError, zlib.error, ArithmeticError, AssertionError, AttributeError, BufferError),
    *(EOFError, ImportError, LookupError, MemoryError, RuntimeError, SystemError, TypeError, ValueError),
)
_NUMERIC_KINDS = "biuf"
_NUMPY_MODULES = (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)


class _Sealed:
    """Something a pickle may call, but not change, subclass or look into."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a constructor")


class _PlainDtype:
    """A numeric dtype whose state may set its byte order only."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        dtype = np.dtype(str(name))
        if dtype.kind not in _NUMERIC_KINDS:
            raise pickle.UnpicklingError(f"dtype {name!r}")
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("dtype state")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class Allowance:
    """The bytes that may still be made of one file: what it could hold, each of its bytes used once.

    A memo lets a pickle use the same bytes again and again; who wrote a template never did so.

    Args:
        file_size: bytes.
    """

    def __init__(self, file_size: int) -> None:
        self._left = {
            "copied": COPIES * file_size,
            "inflated": min(file_size * MAX_DEFLATE_RATIO, MAX_TEMPLATE_BYTES),
            "added": 0,
        }

    def copy(self, size: int) -> None:
        """Counts `size` bytes of the file that are about to be copied; raises as `inflate`."""
        self._take("copied", size)

    def inflate(self, size: int) -> None:
        """Counts `size` bytes of a difference between frames.

        Raises:
            pickle.UnpicklingError: more than the file could hold.
        """
        self._take("inflated", size)
        self._left["added"] += size

    def add(self, size: int) -> None:
        """Counts `size` bytes of a frame that is about to be made with a difference; raises as `inflate`."""
        self._take("added", size)

    def _take(self, kind: str, size: int) -> None:
        self._left[kind] -= size
        if self._left[kind] < 0:
            raise pickle.UnpicklingError(f"more {kind} bytes than the file could hold")


class _PlainArray(np.ndarray):
    """An array whose pickled state is checked before numpy sees it."""

    allowance: Allowance

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        array = _from_bytes(data, dtype, shape, "F" if fortran else "C")
        self.allowance.copy(array.nbytes)
        state = (1, array.shape, array.dtype, bool(fortran), array.tobytes("A"))
        super().__setstate__(state)  # type: ignore[arg-type]


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if (
        not isinstance(dtype, _PlainDtype)
        or not isinstance(data, (bytes, bytearray, memoryview))
        or order not in ("C", "F")
    ):
        raise pickle.UnpicklingError("array state")
    sides = tuple(int(side) for side in shape)
    return np.frombuffer(data, dtype.dtype).reshape(sides, order=order)  # type: ignore[call-overload]


def _scalar(dtype: Any, data: Any) -> int | float:
    return _from_bytes(data, dtype, (1,), "C")[0].item()


def _check_frames(first: Any, difference: Any) -> None:
    for array in (first, difference):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != first.shape:
            raise pickle.UnpicklingError("a difference of something else than frames")


def _refuse(*_arguments: Any) -> Any:
    raise pickle.UnpicklingError("an array outside its own pickling")


class _Sealing:
    """The names that a template's file may ask for; what they stand for is built within an allowance."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._numpy_names: dict[str, Callable[..., Any]] = {
            "_reconstruct": self._reconstruct,
            "ndarray": _refuse,
            "dtype": lambda name, *_: _PlainDtype(name),
            "_frombuffer": _from_bytes,
            "scalar": _scalar,
        }
        self._other_names: dict[tuple[str, str], Callable[..., Any]] = {
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytearray"): self._bytearray,
            ("zlib", "decompress"): self._inflate,
            ("_operator", "add"): self._add,
        }

    def find_class(self, module: str, name: str) -> Any:
        """The sealed stand-in for a name that the file asks for."""
        if module in _NUMPY_MODULES and name in self._numpy_names:
            return _Sealed(self._numpy_names[name])
        if (module, name) in self._other_names:
            return _Sealed(self._other_names[module, name])
        if module.split(".")[0] == "torch" or (module, name) == ("collections", "OrderedDict"):
            from musetalk.templates.legacy_tensors import tensor_constructor

            return _Sealed(tensor_constructor(module, name, self._allowance.copy))
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no template needs")

    def _reconstruct(self, *_ndarray_and_shape: Any) -> np.ndarray:
        array = np.empty(0, np.uint8).view(_PlainArray)
        array.allowance = self._allowance
        return array

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise pickle.UnpicklingError("text encoding")
        self._allowance.copy(len(text))
        return text.encode("latin1")

    def _bytearray(self, content: Any = b"", encoding: Any = "latin1") -> bytearray:
        """As protocols before 5 write them; of a number, bytearray would make that many bytes."""
        if isinstance(content, str):
            content = self._encode(content, encoding)
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("a bytearray of something else than bytes")
        self._allowance.copy(len(content))
        return bytearray(content)

    def _inflate(self, data: Any) -> bytes:
        inflater = zlib.decompressobj()
        content = inflater.decompress(bytes(memoryview(data)), MAX_FRAME_BYTES)
        if not inflater.eof:
            raise pickle.UnpicklingError("a compressed frame that is cut or too large")
        self._allowance.inflate(len(content))
        return content

    def _add(self, first: Any, difference: Any) -> np.ndarray:
        _check_frames(first, difference)
        self._allowance.add(first.nbytes)
        return np.add(first, difference)


class _TemplateUnpickler(pickle.Unpickler):
    """Builds what a template's file may hold."""

    def __init__(self, stream: IO[bytes], allowance: Allowance) -> None:
        super().__init__(stream)
        self._sealing = _Sealing(allowance)

    def find_class(self, module: str, name: str) -> Any:
        """The sealed stand-in for a name that the file asks for."""
        return self._sealing.find_class(module, name)


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _MappedUnpickler(_PythonUnpickler):
    """As `_TemplateUnpickler`, with large values as read-only views of a mapped file."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, content: mmap.mmap, allowance: Allowance) -> None:
        super().__init__(_MappedStream(content))
        self._sealing = _Sealing(allowance)

    def find_class(self, module: str, name: str) -> Any:
        """The sealed stand-in for a name that the file asks for."""
        return self._sealing.find_class(module, name)

    def load_bytearray8(self) -> None:
        """What the pickler writes of an array's bytes."""
        size = int.from_bytes(self.read(8), "little")
        value = self.read(size)
        self.append(value if isinstance(value, memoryview) else bytearray(value))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _MappedStream:
    """A mapped file read from its start, large parts of it without copying them."""

    def __init__(self, content: mmap.mmap) -> None:
        self._view = memoryview(content)
        self._content = content
        self._position = 0

    def read(self, size: int) -> bytes | memoryview:
        """The next `size` bytes; a view of them where they are many."""
        part = self._view[self._position : self._position + size]
        self._position += len(part)
        return part if size >= MAPPED_VALUE else bytes(part)

    def readline(self) -> bytes:
        """The bytes up to the next line's end."""
        end = self._content.find(b"\n", self._position) + 1 or len(self._view)
        return bytes(self.read(end - self._position))


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """`value` with plain arrays in place of checked ones; shared objects stay shared."""
    if isinstance(value, _PlainArray):
        return seen.setdefault(id(value), value.view(np.ndarray))
    if isinstance(value, (list, tuple)) and id(value) not in seen:
        items = [_plain(item, seen) for item in value]
        seen[id(value)] = tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict) and id(value) not in seen:
        seen[id(value)] = {key: _plain(item, seen) for key, item in value.items()}
    return seen.get(id(value), value)


def _unpickle(stream: IO[bytes], content: mmap.mmap) -> dict[str, Any]:
    try:
        check_opcodes(content)
        allowance = Allowance(len(content))
        mapped = _is_mapped(content)
        reader = _MappedUnpickler(content, allowance) if mapped else _TemplateUnpickler(stream, allowance)
        data = _plain(reader.load(), {})
    except MuseTalkError:
        raise
    except _DAMAGE as e:
        raise _damaged(stream, str(e) or type(e).__name__) from e
    if not isinstance(data, dict):
        raise _damaged(stream, "it holds no dict")
    return data


def _is_mapped(content: mmap.mmap) -> bool:
    """Whether arrays may stay parts of the file: on Windows nobody could replace it meanwhile."""
    return len(content) >= MAPPED_FILE and os.name != "nt"


def _damaged(stream: IO[bytes], reason: str) -> CacheError:
    return CacheError(
        f"❌ 模板缓存已损坏 {Path(stream.name).name} can't be used: {reason}",
        "💡 请重新运行预处理 (run --preprocess --force_refresh again)",
    )


@dataclass(frozen=True)
class _Deflated:
    """Bytes that a pickle holds compressed."""

    data: bytes

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return zlib.decompress, (zlib.compress(self.data, DEFLATE_LEVEL),)


class _TemplatePickler(pickle.Pickler):
    """Writes frames that hardly differ from the template's first as differences to it."""

    def __init__(self, stream: Any, template: Template) -> None:
        super().__init__(stream, protocol=5)
        self._first = template.frames[0]
        later = [template.frames[i] for i in set(template.unique) if i]
        self._similar = {id(frame) for frame in later if (frame == self._first).mean() >= SHARED_BYTES}

    def reducer_override(self, value: Any) -> Any:
        if id(value) not in self._similar:
            return NotImplemented
        difference = np.subtract(value, self._first)
        rebuild, (_, *layout) = difference.__reduce_ex__(5)[:2]
        return operator.add, (self._first, _Rebuilt(rebuild, (_Deflated(difference.tobytes()), *layout)))


@dataclass(frozen=True)
class _Rebuilt:
    """An object that a pickle makes by a call."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def dump_template(template: Template, stream: Any) -> None:
    """Pickles the template's documented dict into `stream`, anything with `write`."""
    _TemplatePickler(stream, template).dump(template.to_dict())


def _sha256(content: mmap.mmap, result: list[str]) -> None:
    result.append(hashlib.sha256(content).hexdigest())


def load_template_dict(stream: IO[bytes], sha256: str | None) -> dict[str, Any]:
    """The dict of a template's pickle; its checksum is taken on a second thread meanwhile.

    Args:
        stream: the open file.
        sha256: what the metadata says; None for caches of the original system, which have none.

    Raises:
        CacheError: the file differs from its checksum, is no pickle, or asks for anything but
            containers, numbers, numpy arrays and tensors.
    """
    try:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as e:
        raise _damaged(stream, "it is empty") from e
    with contextlib.nullcontext() if _is_mapped(content) else content:
        if sha256 is None:
            return _unpickle(stream, content)
        digests: list[str] = []
        hashing = threading.Thread(target=_sha256, args=(content, digests), daemon=True)
        hashing.start()
        try:
            data = _unpickle(stream, content)
        finally:
            hashing.join()
    if digests != [sha256]:
        raise _damaged(stream, "it differs from its checksum")
    return data
