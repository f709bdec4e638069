"""The networks against those of diffusers and transformers: every key, every shape, every value."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from musetalk.engines.musetalk.architectures.shapes import (
    AutoencoderShape,
    TinyDecoderShape,
    UNetShape,
    WhisperShape,
)
from musetalk.tools.random_weights import SIZES
from tests.engines.conftest import NEEDS_FULL

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
diffusers = pytest.importorskip("diffusers", reason=NEEDS_FULL)
transformers = pytest.importorskip("transformers", reason=NEEDS_FULL)

from musetalk.engines.musetalk.architectures.unet import UNet, fold_time_embedding  # noqa: E402
from musetalk.engines.musetalk.architectures.vae import Autoencoder, TinyDecoder  # noqa: E402
from musetalk.engines.musetalk.architectures.whisper import WhisperEncoder  # noqa: E402
from musetalk.engines.musetalk.region import (  # noqa: E402
    Rectangle,
    decoder_of_cuts,
    measure_norms,
    plan_cuts,
)
from musetalk.engines.musetalk.tiny import decode_tiny_cuts, plan_tiny_cuts  # noqa: E402

JAW = Rectangle(118, 250, 40, 230)
NETWORKS = ("unet", "vae", "whisper", "tiny decoder")


def ours_and_theirs(network: str, size: str) -> tuple[Any, Any]:
    """The same network twice, ours and the library's, each with weights of its own."""
    sizes = SIZES[size]
    if network == "unet":
        return UNet(UNetShape.read(sizes.unet)), diffusers.UNet2DConditionModel.from_config(sizes.unet)
    if network == "vae":
        return Autoencoder(AutoencoderShape.read(sizes.vae)), diffusers.AutoencoderKL.from_config(sizes.vae)
    if network == "tiny decoder":
        decoder = diffusers.AutoencoderTiny.from_config(sizes.taesd).decoder
        return TinyDecoder(TinyDecoderShape.read(sizes.taesd)), torch.nn.ModuleDict({"decoder": decoder})
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

    settings = transformers.WhisperConfig(**sizes.whisper)
    return WhisperEncoder(WhisperShape.read(sizes.whisper)), Theirs(settings)


@pytest.mark.parametrize("network", NETWORKS)
def test_full_networks_have_the_libraries_keys_and_shapes(network: str) -> None:
    with torch.device("meta"):
        ours, theirs = ours_and_theirs(network, "full")
    found, expected = (
        {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} for module in (ours, theirs)
    )
    assert found == expected


def _alike(network: str) -> tuple[Any, Any]:
    torch.manual_seed(7)
    ours, theirs = (module.eval() for module in ours_and_theirs(network, "tiny"))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_the_unet_at_timestep_0_gives_diffusers_latents() -> None:
    ours, theirs = _alike("unet")
    fold_time_embedding(ours)
    latents, prompts = torch.randn(2, 8, 32, 32), torch.randn(2, 50, 384)
    _close(ours(latents, prompts), theirs(latents, 0, encoder_hidden_states=prompts).sample)


@torch.inference_mode()
def test_the_autoencoder_gives_diffusers_means_and_images() -> None:
    ours, theirs = _alike("vae")
    images, latents = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 8, 8)
    _close(ours.posterior_means(images), theirs.encode(images).latent_dist.mean)
    _close(ours.decode(latents), theirs.decode(latents).sample)


@torch.inference_mode()
def test_the_tiny_decoder_gives_diffusers_images() -> None:
    ours, theirs = _alike("tiny decoder")
    latents = 4 * torch.randn(2, 4, 8, 8)
    _close(ours(latents), theirs["decoder"](latents))


@torch.inference_mode()
def test_the_whisper_encoder_gives_transformers_hidden_states() -> None:
    ours, theirs = _alike("whisper")
    mel = torch.randn(1, 80, 3000)
    expected = theirs(mel, output_hidden_states=True).hidden_states
    found = ours(mel)
    assert len(found) == len(expected)
    for state, other in zip(found, expected, strict=True):
        _close(state, other)


@pytest.mark.parametrize(
    ("read", "settings", "change"),
    [
        *[(UNetShape, "unet", change) for change in ({"use_linear_projection": True}, {"act_fn": "gelu"})],
        (UNetShape, "unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}),
        (UNetShape, "unet", {"block_out_channels": "wide"}),
        (AutoencoderShape, "vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}),
        (AutoencoderShape, "vae", {"act_fn": "relu"}),
        (TinyDecoderShape, "taesd", {"num_decoder_blocks": [3, 3, 1]}),
        (WhisperShape, "whisper", {"encoder_layers": 0}),
    ],
)
def test_a_network_of_another_kind_is_refused(read: Any, settings: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        read.read({**getattr(SIZES["full"], settings), **change})


def test_published_configurations_name_nothing_that_is_refused(tmp_path: Path) -> None:
    """Keys that diffusers writes beside those that tell, at the values the published files have."""
    unet = {"center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
    unet |= {"mid_block_scale_factor": 1, "norm_eps": 1e-05, "act_fn": "silu", "_diffusers_version": "0.6.0"}
    assert UNetShape.read({**SIZES["full"].unet, **unet}) == UNetShape.read(SIZES["full"].unet)
    theirs = diffusers.AutoencoderTiny.from_config(SIZES["full"].taesd)
    theirs.save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    published = {**written, "block_out_channels": [64, 64, 64, 64]}
    assert TinyDecoderShape.read(published) == TinyDecoderShape.read(SIZES["full"].taesd)


def _region() -> tuple[Callable[..., Any], list[Any]]:
    vae = Autoencoder(AutoencoderShape.read(SIZES["tiny"].vae)).eval()
    latents, counts = torch.randn(1, 4, 32, 32), [len(block.resnets) for block in vae.decoder.up_blocks]
    norms = measure_norms(vae, latents)
    return decoder_of_cuts(vae, plan_cuts(JAW, counts, 32), norms), [latents]


def _tiny_region() -> tuple[Callable[..., Any], list[Any]]:
    decoder = TinyDecoder(TinyDecoderShape.read(SIZES["tiny"].taesd)).eval()
    cuts = plan_tiny_cuts(JAW, decoder.shape.counts, 32).tolist()
    return functools.partial(decode_tiny_cuts, decoder, cuts=cuts), [torch.randn(1, 4, 32, 32)]


def _unet() -> tuple[Callable[..., Any], list[Any]]:
    unet = UNet(UNetShape.read(SIZES["tiny"].unet)).eval()
    fold_time_embedding(unet)
    return unet, [torch.randn(1, 8, 32, 32), torch.randn(1, 50, 384)]


@pytest.mark.parametrize("make", [_unet, _region, _tiny_region], ids=["unet", "region", "tiny region"])
@torch.inference_mode()
def test_what_is_compiled_is_one_graph(make: Callable[[], tuple[Callable[..., Any], list[Any]]]) -> None:
    function, inputs = make()
    whole = torch.compile(function, backend="eager", fullgraph=True)
    _close(whole(*inputs), function(*inputs))
