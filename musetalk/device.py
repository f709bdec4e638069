"""What this machine offers: CUDA devices, cores, memory; asked without importing a framework.

The CUDA driver is asked directly, because importing torch to learn that there is no GPU costs seconds.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from musetalk.errors import DeviceError, InputError

log = logging.getLogger(__name__)

CUDA_LIBRARIES = ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so")
_REQUEST = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Device:
    """Where an engine runs and where it was asked to run."""

    name: str
    requested: str


def cuda_device_count() -> int:
    """CUDA devices that the driver shows to this process; 0 without a driver."""
    for library in CUDA_LIBRARIES:
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0


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
def warn_of_missing(request: str) -> None:
    """Says once per process that a device is not there, however many parts of it ask."""
    log.warning("⚠️ device %s is not there, using cpu 未找到GPU，改用CPU", request)


def _cgroup_cores() -> float:
    """The CPU quota of the control group, in cores; infinite where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def usable_cores() -> int:
    """Cores this process may really use: affinity and control-group quota considered, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cgroup_cores())))


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
