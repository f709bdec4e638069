"""What this machine offers: CUDA devices, cores, memory; asked without importing a framework.

The decision a reader would question: devices are counted by the driver's management library, because
importing torch to learn that there is no GPU costs seconds, and initialising CUDA here would break processes
forked later. Whether torch can use a device is another question, asked once an engine needs torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from musetalk.errors import DeviceError, InputError, MuseTalkError

log = logging.getLogger(__name__)

MANAGEMENT_LIBRARIES = ("nvml.dll",) if os.name == "nt" else ("libnvidia-ml.so.1", "libnvidia-ml.so")
DRIVER_LIBRARIES = ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so")
DRIVER_DEVICES = Path("/proc/driver/nvidia/gpus")
CORES_VARIABLE = "MUSETALK_CORES"  # of the environment: a process's share where many run side by side
TEGRA_DEVICE = Path("/dev/nvhost-gpu")  # of boards whose driver has no management library
_REQUEST = re.compile(r"auto|cpu|cuda(:\d+)?")
OUT_OF_MEMORY_WORDS = (
    *("out of memory", "out_of_memory", "outofmemory", "not enough memory", "bad allocation", "bad_alloc"),
    *("can't allocate memory", "cannot allocate memory", "failed to allocate", "alloc_failed"),
    *(
        "cudaerrormemoryallocation",
        "hiperrormemoryallocation",
        "allocation_failure",
        "host_allocation_failed",
    ),
    *("exceeded max size of memory object allocation", "paging file is too small"),
)
"""What allocators of CUDA, cuBLAS, cuDNN, HIP, OpenCL, OpenVINO, torch and the systems say, in lower case."""
NO_MEMORY_WINDOWS = (8, 14, 1455)  # of the system's error codes: not enough memory, out of it, paging file


@dataclass(frozen=True)
class Device:
    """Where an engine runs and where it was asked to run."""

    name: str
    requested: str


def cuda_device_count() -> int:
    """CUDA devices that the driver shows to this process; 0 without a driver. CUDA stays uninitialised."""
    return _visible(_managed_devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _managed_devices() -> int:
    """The machine's NVIDIA devices as the management library, or else the driver's files, count them."""
    for library in MANAGEMENT_LIBRARIES:
        try:
            management = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_uint(0)
        if management.nvmlInit_v2() == 0:
            answered = management.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
            management.nvmlShutdown()
            return count.value if answered else 0
    if DRIVER_DEVICES.is_dir():
        return sum(1 for _ in DRIVER_DEVICES.iterdir())
    return 1 if (os.name == "nt" or TEGRA_DEVICE.exists()) and _has_driver() else 0


class _CardMemory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def card_memory() -> list[int]:
    """Bytes of memory of each NVIDIA card that this process sees; none where the driver doesn't tell."""
    for library in MANAGEMENT_LIBRARIES:
        try:
            management = ctypes.CDLL(library)
        except OSError:
            continue
        if management.nvmlInit_v2() == 0:
            sizes = [_memory_of(management, index) for index in range(cuda_device_count())]
            management.nvmlShutdown()
            return [size for size in sizes if size]
    return []


def _memory_of(management: ctypes.CDLL, index: int) -> int:
    card, memory = ctypes.c_void_p(), _CardMemory()
    if management.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(card)) != 0:
        return 0
    return memory.total if management.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)) == 0 else 0


def _has_driver() -> bool:
    for library in DRIVER_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def _visible(count: int, selection: str | None) -> int:
    """How many of `count` devices CUDA_VISIBLE_DEVICES leaves: those before the first that is not there."""
    if selection is None:
        return count
    left = 0
    for name in (part.strip() for part in selection.split(",")):
        known = name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < count)
        if not known or not count:
            break
        left += 1
    return left


def resolve_device(request: str, *, strict: bool = False) -> Device:
    """The device to use for a request such as "auto", "cpu", "cuda", "cuda:0".

    A CUDA device that is not there becomes the CPU, with one warning.

    Raises:
        InputError: the request names no kind of device.
        DeviceError: the device is not there and `strict` is set.
    """
    if not _REQUEST.fullmatch(request):
        raise InputError(f"device is {request!r}", "choose auto, cpu or cuda:0")
    if request == "cpu":
        return Device("cpu", request)
    count = cuda_device_count()
    if request == "auto":
        return Device("cuda:0" if count else "cpu", request)
    index = int(request.partition(":")[2] or 0)
    if index < count:
        return Device(f"cuda:{index}", request)
    if strict:
        raise DeviceError(
            f"device {request} is not there 设备不可用 ({count} CUDA devices)", "use --device auto or cpu"
        )
    warn_of_missing(request)
    return Device("cpu", request)


@lru_cache
def warn_of_missing(request: str, reason: str = "") -> None:
    """Says once per process that a device is not there, however many parts of it ask."""
    why = f" ({reason})" if reason else ""
    log.warning("⚠️ device %s is not there, using cpu 未找到GPU，改用CPU%s", request, why)


def usable_by_torch(device: str, *, strict: bool = False) -> str:
    """`device` if torch can compute on it, else "cpu", with one warning.

    A driver may be there while torch was built for CPUs, is newer than the driver, or has no kernels for the
    card. Initialises CUDA for a CUDA device.

    Raises:
        DeviceError: torch can't compute on the device and `strict` is set, or the device's memory is full.
    """
    complaint = "" if device == "cpu" else _torchs_complaint(device)
    if not complaint:
        return device
    if strict:
        raise DeviceError(
            f"torch can't use device {device} 设备不可用: {complaint}",
            "install the torch build for this driver and card (pytorch.org), or use --device cpu",
        )
    warn_of_missing(device, complaint)
    return "cpu"


@lru_cache
def _torchs_complaint(device: str) -> str:
    """Why torch can't compute on a CUDA device, in one line; empty when it can."""
    import torch

    try:
        (torch.ones(1, device=device) + 1).item()
    except (RuntimeError, AssertionError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(device) from e
        return str(e).strip().partition("\n")[0] or type(e).__name__
    return ""


@lru_cache
def limit_torch_threads() -> None:
    """Holds torch's thread pool to the control group's quota, which torch doesn't know of; once per process.

    The pool belongs to the process and so does the quota: however many engines live in it, they share both.
    A pool that the caller made smaller stays as it is.
    """
    import torch

    cores = usable_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator's failure, of a GPU or of the system, is behind `error`."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        no_memory = getattr(error, "winerror", None) in NO_MEMORY_WINDOWS
        return error.errno == errno.ENOMEM or no_memory
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in OUT_OF_MEMORY_WORDS)


def out_of_memory(device: str, doing: str = "") -> DeviceError:
    """The documented error for memory that is missing on `device`."""
    during = f" {doing}" if doing else ""
    return DeviceError(
        f"out of memory on {device}{during} 内存不足",
        "减少batch_size或启用fp16 (reduce --batch_size or use --fp16)",
    )


@contextlib.contextmanager
def memory_needed(device: str, doing: str) -> Iterator[None]:
    """Makes the documented error of an allocator's failure inside the block.

    Raises:
        DeviceError: the memory on `device` isn't enough.
    """
    try:
        yield
    except MuseTalkError:
        raise
    except (RuntimeError, MemoryError, OSError) as e:
        if not is_out_of_memory(e):
            raise
        raise out_of_memory(device, doing) from e


def _cgroup_cores() -> float:
    """The CPU quota of the control group, in cores; infinite where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def usable_cores() -> int:
    """Cores this process may really use, at least 1: affinity, control-group quota and MUSETALK_CORES."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get(CORES_VARIABLE, "")
    share = int(told) if told.isdecimal() else math.inf
    return max(1, math.ceil(min(affinity, _cgroup_cores(), share)))


@lru_cache
def computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16, AMX); torch is asked outside Linux."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())
    except OSError:
        import torch

        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def available_memory() -> int:
    """Bytes of memory that are free for more: the system's and the control group's; 0 where neither tells."""
    known = [size for size in (_free_memory(), _cgroup_room()) if size is not None]
    return min(known) if known else 0


def _free_memory() -> int | None:
    if os.name == "nt":
        return _free_memory_of_windows()
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    except OSError:  # macOS, which tells only how much there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_memory_of_windows() -> int | None:
    status = (ctypes.c_uint64 * 8)()  # MEMORYSTATUSEX: two 32-bit fields, then seven of 64 bits
    ctypes.memset(ctypes.byref(status), 0, 64)
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = 64
    told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status[2]) if told else None


def _cgroup_room() -> int | None:
    """What the control group's limit leaves; None where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        return max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MB; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
