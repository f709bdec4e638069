"""Colours of clips: bars whose samples the test works out by the standards' own formulas, read back."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import numpy as np
import pytest

from musetalk.media.colour import to_bt709
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.stream_info import ColourTags
from musetalk.media.video import read_video

BARS = np.array(
    [
        *([255, 255, 255], [191, 191, 0], [0, 191, 191], [0, 191, 0], [191, 0, 191], [191, 0, 0]),
        *([0, 0, 191], [0, 0, 0], [198, 134, 66], [224, 172, 105], [128, 128, 128], [60, 46, 40]),
    ]
)  # RGB: the bars, two skins, a grey and hair
WEIGHTS = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}


def samples(rgb: np.ndarray, matrix: str, levels: str, bits: int = 8) -> np.ndarray:
    """R'G'B' in [0, 1] (n, 3) as whole Y'CbCr (n, 3), by the formulas of BT.601, BT.709 and BT.2020."""
    red_weight, blue_weight = WEIGHTS[matrix]
    red, green, blue = rgb.T
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    chroma = [(blue - luma) / (2 - 2 * blue_weight), (red - luma) / (2 - 2 * red_weight)]
    unit = 2 ** (bits - 8)
    if levels == "tv":
        planes = [unit * (219 * luma + 16), *(unit * (224 * one + 128) for one in chroma)]
    else:
        top = 2**bits - 1
        planes = [top * luma, *(top * one + 128 * unit for one in chroma)]
    return np.rint(np.stack(planes, axis=1)).clip(0, 2**bits - 1).astype(int)


def write_bars(path: Path, ycc: np.ndarray, size: tuple[int, int], tags: ColourTags, bits: int = 8) -> None:
    """Three pictures with a bar of each of the samples (n, 3), lossless 4:4:4, tagged as told and no more."""
    width, height = size
    row = np.repeat(ycc, width // len(ycc), axis=0)
    picture = np.broadcast_to(row.T[:, None, :], (3, height, len(row)))
    data = np.ascontiguousarray(picture).astype("<u2" if bits > 8 else np.uint8).tobytes() * 3
    layout = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    values = {"range": tags.levels, "colorspace": tags.matrix, "color_primaries": tags.primaries}
    values["color_trc"] = tags.transfer
    said = ":".join(f"{name}={value}" for name, value in values.items() if value != "unknown")
    tagged = ["-vf", f"setparams={said}"] if said else []
    for name, value in values.items():  # ffmpeg before 5 takes them from the options
        tagged += [] if value == "unknown" else ["-" + {"range": "color_range"}.get(name, name), value]
    raw = ["-f", "rawvideo", "-pix_fmt", layout, "-s", f"{len(row)}x{height}", "-r", "25", "-i", "pipe:0"]
    coded = ["-c:v", "ffv1"] if bits > 8 or tags.levels == "pc" else ["-c:v", "libx264", "-qp", "0"]
    command = [ffmpeg_path(), "-v", "error", "-y", *raw, *tagged, *coded, "-pix_fmt", layout, str(path)]
    subprocess.run(command, input=data, check=True)


def seen(path: Path, count: int) -> np.ndarray:
    """RGB (count, 3) in the middle of each bar."""
    frame = next(iter(read_video(path)))
    width = frame.shape[1] // count
    middles = [frame[frame.shape[0] // 2, i * width + width // 2] for i in range(count)]
    return np.array(middles)[:, ::-1].astype(int)


@pytest.mark.parametrize("size", [(1284, 720), (720, 1280), (1920, 1080), (720, 576), (480, 480)])
@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("levels", ["tv", "pc"])
def test_bars_of_hd_and_sd(tmp_path: Path, size: tuple[int, int], tagged: bool, levels: str) -> None:
    """Untagged, HD is BT.709 and SD BT.601; the range is always said where it is full."""
    matrix = "bt709" if max(size) >= 1280 else "smpte170m"
    tags = ColourTags(matrix, matrix, matrix, levels) if tagged else ColourTags(levels=levels)
    write_bars(tmp_path / "v.mkv", samples(BARS / 255, matrix, levels), size, tags)
    assert np.abs(seen(tmp_path / "v.mkv", len(BARS)) - BARS).max() <= 2


@pytest.mark.parametrize(("matrix", "size"), [("smpte170m", (1284, 720)), ("bt709", (480, 480))])
def test_tags_overrule_the_size(tmp_path: Path, matrix: str, size: tuple[int, int]) -> None:
    write_bars(
        tmp_path / "v.mkv", samples(BARS / 255, matrix, "tv"), size, ColourTags(matrix, matrix, matrix)
    )
    assert np.abs(seen(tmp_path / "v.mkv", len(BARS)) - BARS).max() <= 2


def pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """Grey of a display of 1000 cd/m² as the scene's signal."""
    scene = (nits / 1000) ** (1 / 1.2)
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


@pytest.mark.parametrize(("transfer", "encode"), [("smpte2084", pq), ("arib-std-b67", hlg)])
def test_hdr_greys_keep_their_lightness_below_the_knee(tmp_path: Path, caplog, transfer: str, encode) -> None:
    """Of 203 cd/m², HDR's reference white, up to 90: as bright as SDR shows that share of its own white."""
    nits = np.array([0.5, 2, 8, 20, 40, 60, 80, 90])
    rgb = np.repeat(encode(nits)[:, None], 3, axis=1)
    tags = ColourTags("bt2020nc", "bt2020", transfer, "tv")
    write_bars(tmp_path / "v.mkv", samples(rgb, "bt2020nc", "tv", 10), (640, 64), tags, 10)
    with caplog.at_level(logging.WARNING):
        levels = seen(tmp_path / "v.mkv", len(nits))
    expected = 255 * (nits / 203) ** (1 / 2.4)
    assert np.abs(levels - expected[:, None]).max() <= 3
    assert caplog.text.count("HDR") == 1


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_highlights_roll_off_to_white(transfer: str) -> None:
    nits = np.linspace(1, 1000, 200)
    rgb = np.repeat({"smpte2084": pq, "arib-std-b67": hlg}[transfer](nits)[:, None], 3, axis=1)
    levels = to_bt709(rgb, ColourTags("bt2020nc", "bt2020", transfer))[:, 0] * 255
    assert (np.diff(levels) > 0).all()
    assert levels[-1] == pytest.approx(255, abs=0.5)
    assert 215 < levels[np.searchsorted(nits, 203)] < 245


@pytest.mark.parametrize(
    ("primaries", "to_xyz"),
    [
        ("bt2020", [[0.636958, 0.144617, 0.168881], [0.262700, 0.677998, 0.059302], [0, 0.028073, 1.060985]]),
        (
            "smpte432",
            [[0.486571, 0.265668, 0.198217], [0.228975, 0.691739, 0.079287], [0, 0.045113, 1.043944]],
        ),
    ],
)
def test_wide_gamut_shows_the_colours_that_were_filmed(tmp_path: Path, primaries: str, to_xyz) -> None:
    """BT.709's own colours, said in the primaries of a wider gamut, come back as they were.

    But for components of no light beside much of another's: there a table has steps, too dark to be seen.
    """
    from_xyz = [
        [3.240970, -1.537383, -0.498611],
        [-0.969244, 1.875968, 0.041555],
        [0.055630, -0.203977, 1.056972],
    ]
    to_709 = np.array(from_xyz) @ np.array(to_xyz)
    wide = np.linalg.solve(to_709, (BARS / 255).T ** 2.4).T.clip(0, 1) ** (1 / 2.4)
    matrix = "bt2020nc" if primaries == "bt2020" else "bt709"
    tags = ColourTags(matrix, primaries, "bt709", "tv")
    write_bars(tmp_path / "v.mkv", samples(wide, matrix, "tv", 10), (1284, 720), tags, 10)
    difference = np.abs(seen(tmp_path / "v.mkv", len(BARS)) - BARS)
    assert difference[BARS > 0].max() <= 3
    assert difference.max() <= 14
