"""Tensors in caches of the original system, as numpy arrays.

The decision a reader would question: the pickled tensor's own constructors are never called. A storage's
bytes go through torch's weights-only loader, and its view is rebuilt in numpy with every bound checked,
because torch would enlarge a storage to whatever a hostile file asks for.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from musetalk.errors import EngineError

ZIP_START = b"PK"


def _load_storage(count: Callable[[int], None], data: Any) -> np.ndarray:
    """The (n,) values of a pickled storage: the bytes of a nested torch.save."""
    try:
        import torch
    except ImportError as e:
        raise EngineError(
            "the cache of the original system holds torch tensors, but torch is not installed 未安装torch",
            "run make install-full, or preprocess the template again 请安装完整环境或重新预处理",
        ) from e
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a tensor storage that is no bytes")
    if data.startswith(ZIP_START):  # which may be compressed a thousandfold; a pickled tensor never is one
        raise pickle.UnpicklingError("a tensor storage in an archive")
    count(len(data))
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage) or not storage.dtype.is_floating_point:
        raise pickle.UnpicklingError("a tensor storage that holds no floats")
    values = torch.tensor([], dtype=storage.dtype).set_(storage)
    return (values.float() if storage.dtype == torch.bfloat16 else values).numpy()


def _rebuild_tensor(
    count: Callable[[int], None],
    values: Any,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    *_grad_and_hooks: Any,
) -> np.ndarray:
    """The strided view that torch._utils._rebuild_tensor_v2 makes, copied."""
    if not isinstance(values, np.ndarray) or values.ndim != 1 or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if any(int(number) < 0 for number in (offset, *size, *stride)) or math.prod(size) > len(values):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 in size or last >= len(values):
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    count(math.prod(size) * values.itemsize)
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], tuple(size), steps).copy()


def _no_hooks(_count: Callable[[int], None], *_items: Any) -> None:
    """The empty ordered dict of backward hooks that every pickled tensor carries."""


_CONSTRUCTORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): _no_hooks,
}


def tensor_constructor(module: str, name: str, count: Callable[[int], None]) -> Callable[..., Any]:
    """What stands in for a name that a pickled torch tensor refers to.

    Args:
        module, name: as the pickle has them.
        count: is told of the bytes that are about to be copied; may refuse them.

    Raises:
        pickle.UnpicklingError: no tensor needs that name.
    """
    try:
        return partial(_CONSTRUCTORS[module, name], count)
    except KeyError:
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no template needs") from None
