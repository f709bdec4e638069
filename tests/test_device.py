"""Devices that are there, that aren't, and what the request says."""

from __future__ import annotations

import logging

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


@pytest.mark.parametrize("bad", ["gpu", "cuda:x", "", "cuda:-1"])
def test_unknown_device_is_bad_input(bad):
    with pytest.raises(InputError):
        device.resolve_device(bad)


def test_usable_cores_respects_the_quota(monkeypatch):
    monkeypatch.setattr(device, "_cgroup_cores", lambda: 0.5)
    assert device.usable_cores() == 1
