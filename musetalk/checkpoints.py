"""Weight files of all networks: read without running code, compared with their network, and put into it.

The decision a reader would question: training frameworks leave their own objects beside the tensors
(mmengine's log buffers, say), which torch's weights-only loader refuses. Whatever a file names beyond
tensors is replaced by an inert placeholder while it is read, so nothing of it is imported or called; a file
that needs such an object to be tensors is refused.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musetalk.device import is_out_of_memory, out_of_memory
from musetalk.errors import WeightsError
from musetalk.weights.files import DOWNLOAD_COMMAND, missing_weights_error

if TYPE_CHECKING:
    from torch import Tensor, device, dtype, nn

_NAMED_KEYS = 3  # of a mismatch, the rest is counted
_WEB_PAGE_STARTS = (b"<!do", b"<htm", b"<?xm")
_CODE_REFUSED = ("GLOBAL ", "allowlisted", "reduce for unrecognized")  # torch's weights-only loader says so
_SAFETENSORS_LENGTH = 8  # bytes that tell the header's length, in front of it
_WRAPPERS = ("_orig_mod.", "module.")  # of a compiled network, and of one trained on several cards
_SHORTEST_RELEASE = 1 << 16  # bytes of a tensor whose pages are worth giving back
UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OSError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What libraries raise for a file, or a description of a network, that they can't make sense of."""


class _Inert:
    """Takes the place of any object a checkpoint names that is no tensor; does nothing."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, on the CPU, mapped from the file where its format allows.

    Of a training checkpoint those of its `state_dict`.

    Raises:
        WeightsError: the file is missing, damaged, no checkpoint, or asks for code (which is not run).
        DeviceError: the memory for it is missing.
    """
    import torch

    if not path.is_file():
        raise missing_weights_error([path])
    content = _safetensors(path) if _is_safetensors(path) else _pickled(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _unreadable(path, "holds something other than named tensors 不是权重文件")
    return _unwrapped(state)


def _is_safetensors(path: Path) -> bool:
    """By what it holds, a length and a JSON object, or else by its name."""
    with path.open("rb") as stream:
        start = stream.read(_SAFETENSORS_LENGTH + 1)
    return start[_SAFETENSORS_LENGTH:] == b"{" or path.suffix == ".safetensors"


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the network's own keys, where it was saved inside a wrapper of torch's."""
    for prefix in _WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: tensor for key, tensor in state.items()}
    return state


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (*UNREADABLE, SafetensorError) as e:
        raise _diagnosis(path, e) from e


def _pickled(path: Path) -> Any:
    """What torch.save wrote, inert objects in the place of those that are no tensors."""
    try:
        return _load(path, [])
    except UNREADABLE as e:
        cause = e
    if _asks_for_code(cause) and zipfile.is_zipfile(path):
        try:
            content = _load(path, _inert_globals(path))
        except UNREADABLE as e:
            raise _diagnosis(path, cause) from e
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            return content
    raise _diagnosis(path, cause) from cause


def _load(path: Path, allowed: list[Any]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore", UserWarning)  # what is wrong with the file is said by the errors
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _inert_globals(path: Path) -> list[Any]:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    return [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]


def _asks_for_code(error: BaseException) -> bool:
    return isinstance(error, pickle.UnpicklingError) and any(word in str(error) for word in _CODE_REFUSED)


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{path} {why}", f"delete it and run {DOWNLOAD_COMMAND}, it is downloaded again 请删除后重新下载"
    )


def _diagnosis(path: Path, error: BaseException) -> Exception:
    """The error that says what is wrong with a file that couldn't be read."""
    if is_out_of_memory(error):
        return out_of_memory("cpu")
    with path.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    if start.startswith(_WEB_PAGE_STARTS):
        return _unreadable(path, "is a web page saved under that name, no checkpoint 是网页而非权重文件")
    if path.stat().st_size == 0:
        return _unreadable(path, "is empty 是空文件")
    if _asks_for_code(error):
        return _unreadable(
            path,
            "asks to run code, which a checkpoint never needs; nothing of it was run 含可执行代码，已拒绝",
        )
    if isinstance(error, pickle.UnpicklingError):
        return _unreadable(
            path, "is no checkpoint of tensors; nothing in it was run 不是权重文件，未执行其中内容"
        )
    return _unreadable(path, "is damaged or was downloaded in part 已损坏或不完整")


def check_keys(
    module: nn.Module, tensors: Mapping[str, Tensor], weights: Path, settings: Path | None = None
) -> None:
    """Compares a checkpoint with the module that is to take it.

    Args:
        module: on any device, meta too.
        tensors: of `weights`, by the module's keys.
        weights: named in the error.
        settings: the configuration that describes the module, if a file does.

    Raises:
        WeightsError: a key is missing, extra or of another shape or kind; the message names keys.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} {_described(tensors[key])} instead of {_described(own)}"
        for key, own in expected.items()
        if key in tensors and _described(tensors[key]) != _described(own)
    ]
    if missing or extra or shapes:
        raise _misfit(weights, settings, [("missing", missing), ("extra", extra), ("shape", shapes)])


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' of whole numbers'}"


def _misfit(weights: Path, settings: Path | None, kinds: Sequence[tuple[str, list[str]]]) -> WeightsError:
    found = "; ".join(f"{kind} {_named(keys)}" for kind, keys in kinds if keys)
    if settings is None:
        return WeightsError(
            f"{weights} belongs to another network 权重与网络不符: {found}",
            f"delete it and run {DOWNLOAD_COMMAND} 请删除后重新下载",
        )
    return WeightsError(
        f"{weights} does not fit {settings} 权重与配置不符: {found}",
        "use the weights and the configuration of one version (--version v1|v15), and the official VAE",
    )


def _named(keys: list[str]) -> str:
    rest = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return ", ".join(keys[:_NAMED_KEYS]) + rest


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], weights: Path) -> None:
    """Copies the tensors of the file `weights` into `module`.

    Raises:
        WeightsError: as `check_keys`.
    """
    check_keys(module, tensors, weights)
    module.load_state_dict(tensors)


def materialise(module: nn.Module, tensors: Mapping[str, Tensor], device: device, dtype: dtype) -> None:
    """Makes tensors that fit the parameters of `module`, on `device` in `dtype`, ready for inference.

    A mapped tensor that needs neither a move nor a cast becomes the parameter itself.
    """
    mapped = _file_mappings()
    ready = {}
    for key in module.state_dict():
        ready[key] = tensors[key].to(device, dtype)
        if ready[key] is not tensors[key]:
            _release_pages(tensors[key], mapped)
    module.load_state_dict(ready, assign=True)
    module.requires_grad_(False).eval()


def _file_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that a file backs; Linux only, elsewhere none."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _access, _offset, _device, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _release_pages(tensor: Tensor, mapped: Sequence[tuple[int, int]]) -> None:
    """Lets the system drop the file pages behind a tensor that was copied; it can read them again.

    Memory that no file backs would come back as zeros, so it is left alone.
    """
    import ctypes
    import mmap

    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - start < _SHORTEST_RELEASE or not any(low <= start and end <= high for low, high in mapped):
        return
    advice: int = mmap.MADV_DONTNEED  # where there is /proc/self/maps there is this, too
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
