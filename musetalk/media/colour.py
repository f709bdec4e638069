"""A clip's colours as BT.709 shows them: which matrix its pixels were made with, and HDR brought to SDR.

The decision a reader would question: HDR and wide gamut go through a table of our own, applied by ffmpeg's
`lut3d`, and not through its zscale and tonemap. Not every ffmpeg has those, and with the table a clip looks
the same whichever one is found. Nor are they better: as it comes, zscale bends HLG's channels one by one
where BT.2100 bends the luminance, and takes colour from red cloth; told to be exact, it agrees with the
table to a level below the highlights. The curve is Report ITU-R BT.2390's, the reference white BT.2408's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from musetalk.media.stream_info import ColourTags

HD_SIDES = (1280, 720)  # pixels, longer and shorter side from which an untagged picture is taken for BT.709
TABLE_SIDE = 65  # points of the table along each axis
REFERENCE_WHITE = 203.0  # cd/m², what SDR's white becomes in HDR (BT.2408)
HDR_PEAK = 1000.0  # cd/m², what HDR material is graded for
SDR_GAMMA = 2.4  # BT.1886
HLG_GAMMA = 1.2  # system gamma at 1000 cd/m² (BT.2100)

_PQ_M1, _PQ_M2 = 2610 / 16384, 2523 / 32
_PQ_C1, _PQ_C2, _PQ_C3 = 3424 / 4096, 2413 / 128, 2392 / 128
_HLG_A, _HLG_B, _HLG_C = 0.17883277, 0.28466892, 0.55991073
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
# linear RGB of each gamut in that of BT.709; D65 in all
_TO_BT709 = {
    "bt2020": np.array(
        [[1.660491, -0.587641, -0.072850], [-0.124551, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    ),
    "smpte432": np.array(
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]]
    ),
}
_HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}


def unsaid_matrix(tags: ColourTags, width: int, height: int) -> str | None:
    """The matrix to assume, in swscale's name, of a stream that names none; None where it names one.

    Untagged pictures of HD size are BT.709 and smaller ones BT.601, as players take them.
    """
    if tags.matrix != "unknown":
        return None
    if tags.primaries in ("bt709", "bt2020"):
        return tags.primaries
    longer, shorter = HD_SIDES
    is_hd = max(width, height) >= longer or min(width, height) >= shorter
    return "bt709" if is_hd else "smpte170m"


def beyond_sdr(tags: ColourTags) -> str:
    """What makes the colours need a table, for a person: "HDR (HLG)", "BT.2020"; "" where nothing does."""
    if tags.transfer in _HDR:
        return f"HDR ({_HDR[tags.transfer]})"
    return {"bt2020": "BT.2020", "smpte432": "Display P3"}.get(tags.primaries, "")


def write_table(tags: ColourTags, path: Path) -> None:
    """Writes the table from the stream's R'G'B' to BT.709's as a .cube file."""
    levels = np.linspace(0, 1, TABLE_SIDE)
    # red changes fastest in a .cube file
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")
    table = to_bt709(np.stack([red, green, blue], axis=-1).reshape(-1, 3), tags)
    rows = "\n".join(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in table)
    path.write_text(f"LUT_3D_SIZE {TABLE_SIDE}\n{rows}\n", encoding="ascii")


def to_bt709(rgb: np.ndarray, tags: ColourTags) -> np.ndarray:
    """R'G'B' (n, 3) in [0, 1] of a stream with these tags as BT.709's R'G'B', in [0, 1]."""
    gamut = tags.primaries if tags.primaries in _TO_BT709 else "bt2020"
    to_light: Callable[[np.ndarray], np.ndarray]
    to_light = {"smpte2084": _pq_light, "arib-std-b67": _hlg_light}.get(tags.transfer, _sdr_light)
    light = to_light(rgb) @ _TO_BT709[gamut].T
    return np.clip(light, 0, 1) ** (1 / SDR_GAMMA)


def _sdr_light(rgb: np.ndarray) -> np.ndarray:
    return rgb**SDR_GAMMA


def _pq_light(rgb: np.ndarray) -> np.ndarray:
    """PQ as display light with SDR's white at 1, brought to SDR's range."""
    return _dimmed(_pq_nits(rgb) / REFERENCE_WHITE)


def _hlg_light(rgb: np.ndarray) -> np.ndarray:
    """As `_pq_light`, of HLG: scene light through the system's gamma (BT.2100)."""
    scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - _HLG_C) / _HLG_A) + _HLG_B) / 12)
    luminance = (scene @ _BT2020_LUMINANCE)[:, None]
    return _dimmed(HDR_PEAK / REFERENCE_WHITE * np.maximum(luminance, 1e-9) ** (HLG_GAMMA - 1) * scene)


def _dimmed(light: np.ndarray) -> np.ndarray:
    """Light (n, 3) with highlights rolled off to 1, the largest component by the curve, the hue kept.

    Source: Report ITU-R BT.2390, EETF, black level 0.
    """
    largest = light.max(axis=1, keepdims=True)
    peak, white = _pq_signal(HDR_PEAK), _pq_signal(REFERENCE_WHITE) / _pq_signal(HDR_PEAK)
    signal = np.minimum(_pq_signal(largest * REFERENCE_WHITE) / peak, 1)
    knee = 1.5 * white - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white
    )
    target = _pq_nits(np.where(signal < knee, signal, spline) * peak) / REFERENCE_WHITE
    return light * target / np.maximum(largest, 1e-9)


def _pq_nits(signal: np.ndarray) -> np.ndarray:
    """PQ's signal in [0, 1] as cd/m² (SMPTE ST 2084)."""
    power = np.power(signal, 1 / _PQ_M2)
    return 10_000 * (np.maximum(power - _PQ_C1, 0) / (_PQ_C2 - _PQ_C3 * power)) ** (1 / _PQ_M1)


def _pq_signal(nits: np.ndarray | float) -> np.ndarray:
    """The inverse of `_pq_nits`."""
    power = np.power(np.asarray(nits) / 10_000, _PQ_M1)
    return ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)) ** _PQ_M2
