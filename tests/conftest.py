"""Pictures, sounds and templates that many tests need, made small and without a network."""

from __future__ import annotations

import importlib.util
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from musetalk.device import cuda_device_count, usable_by_torch
from musetalk.geometry import Box, crop_box
from musetalk.templates.template import Template
from musetalk.tools.demo import PORTRAIT, SPEECH
from tests.served import furnished, served  # noqa: F401 - fixtures for all


def _why_not_cuda() -> str:
    """What keeps tests marked `cuda` from running here; empty when nothing does."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if not cuda_device_count():
        return "this machine shows no NVIDIA card"
    return "torch can't use the card here" if usable_by_torch("cuda:0") == "cpu" else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a card where there is none, saying why."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    why = _why_not_cuda() if marked else ""
    for item in marked if why else ():
        item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {why}"))


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs of this machine downloaded is not there."""
    monkeypatch.setenv("HF_HUB_CACHE", str(Path(__file__).parent / "no hub cache"))


@pytest.fixture
def portrait() -> Path:
    """A real face, 512²."""
    return PORTRAIT


@pytest.fixture
def speech() -> Path:
    """Eight seconds of synthetic English."""
    return SPEECH


@pytest.fixture
def write_tone(tmp_path: Path) -> Callable[..., Path]:
    """Writes a 16-bit mono wav of a sine; returns its path."""

    def write(n_samples: int, rate: int = 16_000, name: str = "tone.wav", amplitude: int = 8000) -> Path:
        path = tmp_path / name
        samples = amplitude * np.sin(2 * np.pi * 220 * np.arange(n_samples) / rate)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.astype("<i2").tobytes())
        return path

    return write


def make_template(
    n_frames: int = 3, size: tuple[int, int] = (64, 48), faceless: tuple[int, ...] = ()
) -> Template:
    """A template of noise, (width, height) `size`, with a soft mask and small float latents."""
    random = np.random.default_rng(7)
    width, height = size
    bbox: Box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    crop = crop_box(bbox)
    side = crop[2] - crop[0]
    frames, bboxes, latents, masks, crops = [], [], [], [], []
    for i in range(n_frames):
        missing = i in faceless
        frames.append(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        bboxes.append((0, 0, 0, 0) if missing else bbox)
        crops.append((0, 0, 0, 0) if missing else crop)
        latents.append(None if missing else random.standard_normal((4, 3)).astype(np.float32))
        masks.append(
            np.zeros((0, 0), np.uint8) if missing else random.integers(0, 256, (side, side), dtype=np.uint8)
        )
    return Template.from_frames(frames, bboxes, latents, masks, crops)
