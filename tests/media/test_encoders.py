"""Quality and speed in each encoder's words: what every encoder of the found ffmpeg makes of them."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import EncodingConfig
from musetalk.errors import InputError
from musetalk.media.encoders import PRESETS, shaping_options
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.video import VideoWriter

SOFTWARE = (
    *("libx264", "libx265", "libvpx", "libvpx-vp9", "libaom-av1", "libsvtav1", "librav1e", "libtheora"),
    *("mpeg4", "libxvid", "msmpeg4", "mpeg2video", "flv"),
)
WITHOUT_PRESETS = ("mpeg4", "libxvid", "mpeg2video", "libtheora", "h264_mf")
UNKNOWN = ("ffv1", "libopenh264", "prores_ks", "h264_vaapi")


@cache
def encoders() -> set[str]:
    """The video encoders that the found ffmpeg has."""
    listed = subprocess.run([ffmpeg_path(), "-hide_banner", "-encoders"], capture_output=True, check=True)
    lines = (line.split() for line in listed.stdout.decode().splitlines() if line.startswith(" V"))
    return {words[1] for words in lines}


def encoded_size(path: Path, encoding: EncodingConfig) -> int:
    """Bytes of a few frames of a soft pattern under fine noise."""
    random = np.random.default_rng(3)
    wave = 90 + 60 * np.sin(np.arange(128) / 9)[None, :, None]
    with VideoWriter(path, 128, 96, Fraction(25), None, encoding, "bgr24") as writer:
        for _ in range(4):
            writer.write((wave + random.normal(0, 12, (96, 128, 3))).clip(0, 255).astype(np.uint8))
    return path.stat().st_size


@pytest.mark.parametrize("encoder", SOFTWARE)
def test_crf_shapes_what_the_encoder_makes(tmp_path: Path, encoder: str) -> None:
    if encoder not in encoders():
        pytest.skip(f"this ffmpeg has no {encoder}")
    fine = encoded_size(tmp_path / "fine.mkv", EncodingConfig(encoder=encoder, crf=8))
    coarse = encoded_size(tmp_path / "coarse.mkv", EncodingConfig(encoder=encoder, crf=45))
    assert coarse < 0.8 * fine


@pytest.mark.parametrize(
    ("encoder", "presets"),
    [
        *((name, PRESETS) for name in ("libx264", "libx265", "libvpx", "libvpx-vp9")),
        ("libaom-av1", ("ultrafast", "veryfast", "medium")),
        ("libsvtav1", ("ultrafast", "medium", "13")),
    ],
)
def test_every_preset_is_taken(tmp_path: Path, encoder: str, presets: tuple[str, ...]) -> None:
    if encoder not in encoders():
        pytest.skip(f"this ffmpeg has no {encoder}")
    for preset in presets:
        assert encoded_size(tmp_path / "o.mkv", EncodingConfig(encoder=encoder, preset=preset))


@pytest.mark.parametrize(
    ("encoder", "fastest", "slowest"),
    [
        ("h264_nvenc", {"preset": "p1"}, {"preset": "p7"}),
        ("hevc_qsv", {"preset": "veryfast"}, {"preset": "veryslow"}),
        ("av1_amf", {"quality": "speed"}, {"quality": "quality"}),
        ("h264_videotoolbox", {"realtime": 1}, {"realtime": 0}),
        ("libsvtav1", {"preset": 12}, {"preset": 1}),
    ],
)
def test_presets_go_from_fast_to_slow(encoder: str, fastest: dict, slowest: dict) -> None:
    for preset, expected in (("ultrafast", fastest), ("placebo", slowest)):
        options = shaping_options(encoder, EncodingConfig(encoder=encoder, preset=preset))
        assert expected.items() <= options.items()


@pytest.mark.parametrize(
    ("encoder", "best", "worst"),
    [
        ("h264_nvenc", {"cq": 0}, {"cq": 51}),
        ("h264_qsv", {"global_quality": 1}, {"global_quality": 51}),
        ("hevc_videotoolbox", {"q:v": 100}, {"q:v": 1}),
        ("h264_mf", {"quality": 100}, {"quality": 1}),
        ("hevc_amf", {"qp_i": 0, "qp_p": 0}, {"qp_i": 51, "qp_p": 51}),
    ],
)
def test_crf_spans_the_scales_of_hardware_encoders(encoder: str, best: dict, worst: dict) -> None:
    for crf, expected in ((0, best), (51, worst)):
        options = shaping_options(encoder, EncodingConfig(encoder=encoder, crf=crf))
        assert expected.items() <= options.items()


def test_an_encoders_own_preset_names_are_kept() -> None:
    for encoder, preset in (("h264_nvenc", "p4"), ("h264_nvenc", "slow"), ("h264_amf", "balanced")):
        options = shaping_options(encoder, EncodingConfig(encoder=encoder, preset=preset))
        assert preset in options.values()


@pytest.mark.parametrize("encoder", [*WITHOUT_PRESETS, *UNKNOWN])
def test_a_preset_that_means_nothing_is_refused_by_name(encoder: str) -> None:
    shaping_options(encoder, EncodingConfig(encoder=encoder))
    with pytest.raises(InputError, match=f"--preset.*{encoder}") as caught:
        shaping_options(encoder, EncodingConfig(encoder=encoder, preset="slow"))
    assert caught.value.exit_code == 3 and caught.value.hint


@pytest.mark.parametrize("encoder", UNKNOWN)
def test_a_crf_that_means_nothing_is_refused_by_name(encoder: str) -> None:
    with pytest.raises(InputError, match=f"--crf.*{encoder}"):
        shaping_options(encoder, EncodingConfig(encoder=encoder, crf=30))


@pytest.mark.parametrize("encoder", ["h264_nvenc", "libsvtav1", "h264_qsv", "libvpx-vp9"])
def test_a_preset_that_no_encoder_has_is_refused_with_those_there_are(encoder: str) -> None:
    with pytest.raises(InputError, match="hasty") as caught:
        shaping_options(encoder, EncodingConfig(encoder=encoder, preset="hasty"))
    assert "ultrafast" in caught.value.hint
