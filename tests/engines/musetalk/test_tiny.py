"""The tiny decoder: exact in part, honest about what it costs, and good for a real picture once trained."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.config import EngineConfig, ModelPaths
from musetalk.engines.base import TemplateJudge
from musetalk.engines.choice import choose_engine, create_engine
from musetalk.engines.musetalk.architectures.shapes import TinyDecoderShape
from musetalk.errors import WeightsError
from tests.conftest import PORTRAIT
from tests.engines.conftest import NEEDS_FULL, latent_template, model_paths

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("diffusers", reason=NEEDS_FULL)

from musetalk.engines.musetalk.architectures.vae import TinyDecoder  # noqa: E402
from musetalk.engines.musetalk.networks import open_vae  # noqa: E402
from musetalk.engines.musetalk.region import Rectangle, full  # noqa: E402
from musetalk.engines.musetalk.tiny import (  # noqa: E402
    TinyFaceDecoder,
    decode_tiny_cuts,
    sharpness,
    tiny_verdict,
)
from musetalk.tools.random_weights import SIZES, write_taesd  # noqa: E402
from musetalk.weights import files as weight_files  # noqa: E402

WHOLE = np.ones((256, 256), np.float32)
TRAINING_STEPS = 100


def tiny_config(models: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        engine="musetalk", models=model_paths(models), fp16=False, vae_decoder="tiny", **settings
    )


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 2, 1, 1)])
@pytest.mark.parametrize(
    "rectangle", [Rectangle(118, 250, 40, 230), Rectangle(0, 40, 0, 256), Rectangle(255, 256, 255, 256)]
)
@torch.inference_mode()
def test_a_part_comes_out_as_it_does_in_the_whole(rectangle: Rectangle, counts: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    decoder = TinyDecoder(TinyDecoderShape(3, 4, (8,) * 4, counts)).eval()
    latents, seen = torch.randn(2, 4, 32, 32), []

    def decode_cuts(cuts: np.ndarray) -> Any:
        seen.append(cuts)
        return lambda latents: decode_tiny_cuts(decoder, latents, cuts.tolist())

    found = TinyFaceDecoder(rectangle, decode_cuts, counts, 32).decode(latents)
    top, bottom, left, right = rectangle
    expected = torch.full((2, 3, 256, 256), -1.0)
    expected[..., top:bottom, left:right] = decoder(latents)[..., top:bottom, left:right]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if rectangle.area < 20_000:
        assert seen[0][0][1] - seen[0][0][0] < 32  # less than all of the latents is decoded


@torch.inference_mode()
def test_a_whole_face_is_the_decoder_itself() -> None:
    decoder = TinyDecoder(TinyDecoderShape(3, 4, (8,) * 4, (1, 1, 1, 1))).eval()
    latents = torch.randn(1, 4, 32, 32)
    whole = TinyFaceDecoder(
        full(256), lambda cuts: lambda x: decode_tiny_cuts(decoder, x, cuts.tolist()), (1, 1, 1, 1), 32
    )
    torch.testing.assert_close(whole.decode(latents), decoder(latents))


def rendered(models: Path, **settings: Any) -> np.ndarray:
    prompts = np.random.RandomState(3).randn(3, 20, 384).astype(np.float32)
    engine = create_engine("musetalk", tiny_config(models, **settings), "cpu")
    return np.stack(engine.open(latent_template()).generate(prompts, [0, 1, 0])).astype(int)


def test_the_engine_decodes_only_what_the_mask_uses_unless_told_not_to(tiny_models: Path) -> None:
    whole, part = rendered(tiny_models, vae_region="off"), rendered(tiny_models)
    assert whole[:, :100].any() and not part[:, :100].any()
    np.testing.assert_array_equal(part[:, 140:, 10:240], whole[:, 140:, 10:240])


def test_openvino_gives_torchs_faces(tiny_models: Path) -> None:
    pytest.importorskip("openvino", reason=NEEDS_FULL)
    for region in ("off", "on"):
        expected, found = (
            rendered(tiny_models, vae_region=region, runtime=runtime) for runtime in ("torch", "openvino")
        )
        assert (np.abs(found - expected) <= 1).mean() >= 0.999


def test_preprocessing_says_what_it_costs_in_looks(
    tiny_models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine("musetalk", tiny_config(tiny_models), "cpu")
    assert isinstance(engine, TemplateJudge)
    with caplog.at_level(logging.WARNING):
        found = engine.judge(latent_template())
    assert found.keys() == {"vae_decoder"}
    cost = found["vae_decoder"]
    assert cost.keys() == {"decoder", "mean", "tail", "largest", "sharpness", "networks"}
    assert cost["decoder"] == "tiny" and 0 < cost["mean"] < cost["tail"] <= cost["largest"]
    (record,) = caplog.records
    assert f"{cost['mean']:.1f} levels" in record.getMessage()


def test_sharpness_is_of_edges_where_the_face_is_blended() -> None:
    stripes = np.zeros((1, 3, 256, 256), np.float32)
    stripes[..., ::2, :] = 0.5
    half = WHOLE.copy()
    half[:128] = 0
    assert sharpness(np.zeros_like(stripes), WHOLE) == 0
    assert sharpness(stripes, WHOLE) == pytest.approx(127.5, rel=1e-4)  # 2 × 0.5 × 127.5
    flat_where_blended = stripes.copy()
    flat_where_blended[..., 126:, :] = 0
    assert sharpness(flat_where_blended, half) == 0
    assert tiny_verdict(stripes / 2, stripes, WHOLE)["sharpness"] == pytest.approx(0.5, abs=1e-3)


def test_missing_files_are_named_with_the_command_that_gets_them(tiny_models: Path, tmp_path: Path) -> None:
    models = dataclasses.replace(model_paths(tiny_models), taesd_dir=tmp_path / "taesd")
    config = EngineConfig(models=models, vae_decoder="tiny")
    for request in ("auto", "musetalk"):
        with pytest.raises(WeightsError, match="taesd") as error:
            choose_engine(dataclasses.replace(config, engine=request))
        assert "download --only tiny" in error.value.hint
    assert choose_engine(dataclasses.replace(config, vae_decoder="full")) == "musetalk"
    assert weight_files.missing_files(models) == []


def test_a_decoder_of_other_latents_or_another_kind_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    models = shutil.copytree(tiny_models, tmp_path / "models")
    write_taesd(models, {**SIZES["tiny"].taesd, "latent_channels": 16}, seed=0)
    engine = create_engine("musetalk", tiny_config(models), "cpu")
    with pytest.raises(WeightsError, match="another decoder"):
        engine.open(latent_template())
    settings = json.loads((models / "taesd/config.json").read_text())
    (models / "taesd/config.json").write_text(json.dumps({**settings, "act_fn": "gelu"}))
    with pytest.raises(WeightsError, match="act_fn"):
        create_engine("musetalk", tiny_config(models), "cpu").open(latent_template())


def latents_of_the_portrait(vae: Any) -> Any:
    """(16, 4, 8, 8) scaled latents of parts of a real picture, 64² each."""
    cv2 = pytest.importorskip("cv2")
    picture = cv2.imread(str(PORTRAIT))[:, :, ::-1].copy()
    corners = [(x, y) for x in range(128, 384, 64) for y in range(0, 256, 64)]
    crops = np.stack([picture[y : y + 64, x : x + 64] for x, y in corners])
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.posterior_means(images) * vae.shape.scaling_factor


def test_a_decoder_trained_on_a_real_picture_follows_the_full_one(tiny_models: Path) -> None:
    """Trained for seconds against the random full decoder, judged on a part of the picture left out."""
    vae = open_vae(weight_files.find_files(ModelPaths(vae_type=str(tiny_models / "sd-vae"))))
    full_vae = vae.load("cpu", "float32")
    with torch.no_grad():
        latents = latents_of_the_portrait(full_vae)
        exact = full_vae.decode(latents / full_vae.shape.scaling_factor).clamp(-1, 1)
    held = len(latents) // 2
    others = [i for i in range(len(latents)) if i != held]
    torch.manual_seed(1)
    tiny = TinyDecoder(TinyDecoderShape(3, 4, (16,) * 4, (1, 1, 1, 1)))

    def cost() -> dict[str, float]:
        with torch.no_grad():
            found = tiny(latents[held : held + 1]).numpy()
        return tiny_verdict(found, exact[held : held + 1].numpy(), WHOLE[:64, :64])

    before = cost()
    optimiser = torch.optim.Adam(tiny.parameters(), 3e-3)
    for step in range(TRAINING_STEPS):
        chosen = [others[(2 * step + i) % len(others)] for i in range(2)]
        loss = (tiny(latents[chosen]) - exact[chosen]).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert cost()["mean"] < before["mean"] / 3, (before, cost())
