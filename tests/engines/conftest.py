"""Tiny MuseTalk networks, made from seeds: the ones that the goldens were computed with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musetalk.config import ModelPaths
from musetalk.templates.template import Template
from tests.conftest import make_template

NEEDS_FULL = "needs the full environment (make install-full)"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in the official layout; read only."""
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package, reason=NEEDS_FULL)
    import torch

    from musetalk.tools.random_weights import write_random_weights

    torch.set_num_threads(1)  # networks this small lose more to waiting threads than they gain

    folder = tmp_path_factory.mktemp("models")
    write_random_weights(folder, "tiny")
    return folder


def model_paths(folder: Path) -> ModelPaths:
    """All paths named, as the callers do."""
    return ModelPaths(
        unet_config=folder / "musetalkV15/musetalk.json",
        unet_model_path=folder / "musetalkV15/unet.pth",
        vae_type=str(folder / "sd-vae"),
        whisper_dir=folder / "whisper",
        taesd_dir=folder / "taesd",
    )


def latent_template() -> Template:
    """Two noisy frames with masks that use the lower half of the face."""
    template = make_template(2)
    random = np.random.RandomState(2)
    latents = [random.randn(1, 8, 32, 32).astype(np.float32) / 5 for _ in range(2)]
    masks = [mask.copy() for mask in template.masks[:2]]
    for mask in masks:
        mask[: mask.shape[0] // 2] = 0
    return Template.from_frames(
        template.frames[:2], template.bboxes[:2], latents, masks, template.crop_boxes[:2]
    )
