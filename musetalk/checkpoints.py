"""Checkpoints of the face networks: read without running code, and fitted key by key.

The decision a reader would question: training frameworks leave their own objects beside the tensors
(mmengine's log buffers, say), which torch's weights-only loader refuses. Whatever a file names beyond
tensors is replaced by an inert placeholder while it is read, so nothing of it is imported or called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musetalk.errors import WeightsError
from musetalk.weights.files import DOWNLOAD_COMMAND, missing_weights_error

if TYPE_CHECKING:
    from torch import Tensor, nn

_NAMED_KEYS = 3  # of a mismatch, the rest is counted


class _Inert:
    """Takes the place of any object a checkpoint names that is no tensor; does nothing."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, on the CPU; of a training checkpoint its `state_dict`.

    Raises:
        WeightsError: the file is missing, damaged or no checkpoint.
    """
    import torch

    if not path.is_file():
        raise missing_weights_error([path])
    try:
        with torch.serialization.safe_globals(_inert_globals(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError),
        *(EOFError, IndexError, OSError),
    ) as e:
        raise _unreadable(path) from e
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _unreadable(path)
    return state


def _inert_globals(path: Path) -> list[Any]:
    import zipfile

    from torch.serialization import get_unsafe_globals_in_checkpoint

    if not zipfile.is_zipfile(path):  # the older format, whose official files hold tensors only
        return []
    return [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]


def _unreadable(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} is no checkpoint, or a damaged one 权重文件损坏",
        f"delete it and run {DOWNLOAD_COMMAND}, it is downloaded again 请删除后重新下载",
    )


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Gives `module` the tensors of `state`, read from `path`.

    Raises:
        WeightsError: a key is missing, extra or of another shape; the message names keys.
    """
    expected = module.state_dict()
    misshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if misshaped:
        raise _misfit(path, [("misshaped", misshaped)])
    outcome = module.load_state_dict(state, strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise _misfit(path, [("missing", outcome.missing_keys), ("extra", outcome.unexpected_keys)])


def _misfit(path: Path, kinds: list[tuple[str, list[str]]]) -> WeightsError:
    found = "; ".join(f"{kind} {_named(keys)}" for kind, keys in kinds if keys)
    return WeightsError(
        f"{path} belongs to another network 权重与网络不符: {found}",
        f"delete it and run {DOWNLOAD_COMMAND} 请删除后重新下载",
    )


def _named(keys: list[str]) -> str:
    rest = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return ", ".join(keys[:_NAMED_KEYS]) + rest
