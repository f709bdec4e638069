"""A template's pickle: written small, read without trusting it.

A frame that shares most of its bytes with the first one, as those of a still portrait brought to life do,
is written as a compressed difference that plain `pickle.load` adds up again, without this package.

The decision a reader would question: pickle's own opcodes may call whatever `find_class` returns and set
state on it, so numpy's constructors are never handed out. Each allowed name becomes a small sealed object
that takes plain values and builds a plain numeric array, and nothing else can be called.
"""

from __future__ import annotations

import hashlib
import mmap
import operator
import pickle
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from musetalk.config import MAX_SIDE
from musetalk.errors import CacheError, MuseTalkError

if TYPE_CHECKING:
    from musetalk.templates.template import Template

SHARED_BYTES = 0.5  # of a frame, equal to the first one's, from which a difference pays
DEFLATE_LEVEL = 1
MAX_FRAME_BYTES = 3 * MAX_SIDE * MAX_SIDE

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


class _PlainArray(np.ndarray):
    """An array whose pickled state is checked before numpy sees it."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        array = _from_bytes(data, dtype, shape, "F" if fortran else "C")
        state = (1, array.shape, array.dtype, bool(fortran), array.tobytes("A"))
        super().__setstate__(state)  # type: ignore[arg-type]


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if (
        not isinstance(dtype, _PlainDtype)
        or not isinstance(data, (bytes, bytearray))
        or order not in ("C", "F")
    ):
        raise pickle.UnpicklingError("array state")
    sides = tuple(int(side) for side in shape)
    return np.frombuffer(data, dtype.dtype).reshape(sides, order=order)  # type: ignore[call-overload]


def _scalar(dtype: Any, data: Any) -> int | float:
    return _from_bytes(data, dtype, (1,), "C")[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("text encoding")
    return str(text).encode("latin1")


def _inflate(data: Any) -> bytes:
    inflater = zlib.decompressobj()
    content = inflater.decompress(bytes(data), MAX_FRAME_BYTES)
    if not inflater.eof:
        raise pickle.UnpicklingError("a compressed frame that is cut or too large")
    return content


def _add(first: Any, difference: Any) -> np.ndarray:
    for array in (first, difference):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != first.shape:
            raise pickle.UnpicklingError("a difference of something else than frames")
    return np.add(first, difference)


def _refuse(*_arguments: Any) -> Any:
    raise pickle.UnpicklingError("an array outside its own pickling")


_NUMPY_NAMES: dict[str, Callable[..., Any]] = {
    "_reconstruct": lambda *_: np.empty(0, np.uint8).view(_PlainArray),
    "ndarray": _refuse,
    "dtype": lambda name, *_: _PlainDtype(name),
    "_frombuffer": _from_bytes,
    "scalar": _scalar,
}


_OTHER_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytearray"): bytearray,
    ("zlib", "decompress"): _inflate,
    ("_operator", "add"): _add,
}


class _TemplateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name in _NUMPY_NAMES:
            return _Sealed(_NUMPY_NAMES[name])
        if (module, name) in _OTHER_NAMES:
            return _Sealed(_OTHER_NAMES[module, name])
        if module.split(".")[0] == "torch" or (module, name) == ("collections", "OrderedDict"):
            from musetalk.templates.legacy_tensors import tensor_constructor

            return _Sealed(tensor_constructor(module, name))
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no template needs")


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


def _unpickle(stream: IO[bytes]) -> dict[str, Any]:
    try:
        data = _plain(_TemplateUnpickler(stream).load(), {})
    except MuseTalkError:
        raise
    except _DAMAGE as e:
        raise _damaged(stream, str(e) or type(e).__name__) from e
    if not isinstance(data, dict):
        raise _damaged(stream, "it holds no dict")
    return data


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
    if sha256 is None:
        return _unpickle(stream)
    try:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as e:
        raise _damaged(stream, "it is empty") from e
    digests: list[str] = []
    hashing = threading.Thread(target=_sha256, args=(content, digests), daemon=True)
    hashing.start()
    try:
        data = _unpickle(stream)
    finally:
        hashing.join()
        content.close()
    if digests != [sha256]:
        raise _damaged(stream, "it differs from its checksum")
    return data
