"""Devices that are there, that aren't, and what the request says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from musetalk import device
from musetalk.errors import DeviceError, InputError


@pytest.mark.parametrize(
    ("request_", "count", "name"),
    [
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_request_becomes_a_device(monkeypatch, request_, count, name):
    monkeypatch.setattr(device, "cuda_device_count", lambda: count)
    assert device.resolve_device(request_) == device.Device(name, request_)


def test_missing_gpu_falls_back_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(device, "cuda_device_count", lambda: 1)
    device.warn_of_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "musetalk"):
        assert [device.resolve_device("cuda:1").name for _ in range(3)] == ["cpu"] * 3
    assert len(caplog.records) == 1


def test_missing_gpu_is_an_error_when_strict(monkeypatch):
    monkeypatch.setattr(device, "cuda_device_count", lambda: 0)
    with pytest.raises(DeviceError):
        device.resolve_device("cuda:0", strict=True)


class Management:
    """The driver's management library with two devices, as ctypes would load it."""

    def __init__(self, asked: list[str], name: str, present: tuple[str, ...]) -> None:
        if name not in present:
            raise OSError(name)
        self._asked = asked

    def __getattr__(self, function: str) -> Callable[..., int]:
        self._asked.append(function)

        def call(*arguments: Any) -> int:
            if function.startswith("nvmlDeviceGetCount"):
                arguments[0]._obj.value = 2
            return 0

        return call


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """Functions called of the driver's libraries, of which the management library is there."""
    calls: list[str] = []
    libraries = device.MANAGEMENT_LIBRARIES + device.DRIVER_LIBRARIES
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Management(calls, name, libraries))
    monkeypatch.setattr(device, "DRIVER_DEVICES", tmp_path / "gpus")
    monkeypatch.setattr(device, "TEGRA_DEVICE", tmp_path / "nvhost-gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return calls


def test_devices_are_counted_without_initialising_cuda(asked):
    assert device.cuda_device_count() == 2
    assert asked and not [name for name in asked if name.startswith("cu")]
    assert asked[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        *[("", 0), ("-1", 0), ("0", 1), ("1", 1), ("1,0", 2), ("0, 1", 2), ("0,7,1", 1), ("NoDevFiles", 0)],
        *[("GPU-8932f937", 1), ("MIG-GPU-1/2/3", 1)],
    ],
)
def test_hidden_devices_are_not_counted(asked, monkeypatch, selection, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    assert device.cuda_device_count() == count


def test_without_the_management_library_the_drivers_files_are_counted(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "MANAGEMENT_LIBRARIES", ())
    monkeypatch.setattr(device.os, "name", "posix")
    assert device.cuda_device_count() == 0
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:02:00.0").mkdir()
    assert device.cuda_device_count() == 2


def test_a_board_without_management_has_one_device(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "MANAGEMENT_LIBRARIES", ())
    (tmp_path / "nvhost-gpu").touch()
    assert device.cuda_device_count() == 1
    assert not asked  # loaded, never called


COMPLAINTS = (
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"),
)


@pytest.fixture
def unusable(monkeypatch):
    """Makes torch fail with an error on any device but the CPU."""
    torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")

    def make(error: Exception) -> None:
        def ones(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "ones", ones)
        device.warn_of_missing.cache_clear()
        device._torchs_complaint.cache_clear()

    yield make
    device._torchs_complaint.cache_clear()


@pytest.mark.parametrize("error", COMPLAINTS, ids=["built for CPUs", "old driver", "no kernels"])
def test_a_device_that_torch_cannot_use_becomes_the_cpu_with_one_line(unusable, caplog, error):
    unusable(error)
    with caplog.at_level(logging.WARNING, "musetalk"):
        assert [device.usable_by_torch("cuda:0") for _ in range(3)] == ["cpu"] * 3
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("⚠️ device cuda:0 is not there, using cpu 未找到GPU，改用CPU")
    assert str(error).partition("\n")[0] in line and "\n" not in line
    with pytest.raises(DeviceError) as raised:
        device.usable_by_torch("cuda:0", strict=True)
    assert raised.value.exit_code == 5
    assert device.usable_by_torch("cpu", strict=True) == "cpu"


def test_a_device_whose_memory_is_full_is_not_taken_for_missing(unusable):
    unusable(RuntimeError("CUDA error: out of memory"))
    with pytest.raises(DeviceError, match="out of memory on cuda:0"):
        device.usable_by_torch("cuda:0")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("hipErrorOutOfMemory"),
        RuntimeError("hipErrorMemoryAllocation"),
        RuntimeError("HIPBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("[GPU] Exceeded max size of memory object allocation: requested 8589934592 bytes"),
        RuntimeError("[CPU] Failed to allocate 1073741824 bytes of memory"),
        RuntimeError("Exception from src/inference: std::bad_alloc"),
        RuntimeError("clEnqueueMapBuffer: CL_MEM_OBJECT_ALLOCATION_FAILURE"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 3400 bytes from file <unet.pth>: Cannot allocate memory (12)"),
        RuntimeError("The paging file is too small for this operation to complete. (os error 1455)"),
    ],
    ids=lambda error: str(error)[:30] or type(error).__name__,
)
def test_every_allocators_words_are_known(error):
    assert device.is_out_of_memory(error)
    with pytest.raises(DeviceError) as raised, device.memory_needed("cuda:0", "loading"):
        raise error
    assert raised.value.exit_code == 5 and "减少batch_size或启用fp16" in raised.value.hint


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), OSError(28, "No space left"), KeyError("memory")]
)
def test_other_failures_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, device.memory_needed("cpu", "loading"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("bad", ["gpu", "cuda:x", "", "cuda:-1"])
def test_unknown_device_is_bad_input(bad):
    with pytest.raises(InputError):
        device.resolve_device(bad)


def test_usable_cores_respects_the_quota(monkeypatch):
    monkeypatch.setattr(device, "_cgroup_cores", lambda: 0.5)
    assert device.usable_cores() == 1
