"""What each family of ffmpeg's encoders calls quality and speed.

`--crf` is x264's scale (0 best, 51 worst) and `--preset` takes x264's names, whatever the encoder. The
decision a reader would question: where an encoder has no such setting, the default is left to the encoder and
anything else is refused by name, because ffmpeg drops an option that an encoder doesn't know without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from musetalk.config import MAX_CRF, EncodingConfig
from musetalk.errors import InputError

Options = dict[str, Any]

PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow", "placebo"),
)  # x264's, fastest first
MIN_QUANTISER, MAX_QUANTISER = 1, 31  # of the MPEG-4 family's qscale


def _named(option: str, values: Sequence[Any], own: Iterable[Any] = ()) -> dict[str, Options]:
    """`option`'s value for each of x264's presets, and for the encoder's own names."""
    own_names = {str(value): {option: value} for value in own}
    return own_names | {name: {option: value} for name, value in zip(PRESETS, values, strict=True)}


def _quantiser(crf: int) -> int:
    """MPEG's qscale of an H.264 quantiser: 0.85 · 2^((qp - 12) / 6), x264's qp2qscale."""
    return min(MAX_QUANTISER, max(MIN_QUANTISER, round(0.85 * 2 ** ((crf - 12) / 6))))


def _percent(crf: int) -> int:
    """From 100, the best, to 1."""
    return 100 - round(crf * 99 / MAX_CRF)


@dataclass(frozen=True)
class Family:
    """Encoders that share their words.

    Attributes:
        names: regular expression of their whole names.
        quality: ffmpeg's options for a crf; None where they have no such scale.
        presets: ffmpeg's options for each preset; None where ffmpeg takes x264's names as they are, empty
            where there is nothing to choose.
    """

    names: str
    quality: Callable[[int], Options] | None
    presets: Mapping[str, Options] | None


_NVENC = (*("p1", "p1", "p2", "p3", "p4"), *("p4", "p5", "p6", "p7", "p7"))
_NVENC_OWN = {name: {"preset": name} for name in ("fast", "medium", "slow", *(f"p{n}" for n in range(1, 8)))}
_QSV = (*("veryfast", "veryfast", "veryfast", "faster", "fast"), *PRESETS[5:9], "veryslow")
_AMF = ("speed",) * 4 + ("balanced",) * 3 + ("quality",) * 3
_VPX = {
    **{name: {"deadline": "realtime", "cpu-used": 8 - i} for i, name in enumerate(PRESETS[:5])},
    **{name: {"deadline": "good", "cpu-used": 4 - i} for i, name in enumerate(PRESETS[5:])},
}
FAMILIES = (
    Family(r"libx26[45].*", lambda crf: {"crf": crf}, None),
    Family(
        r".*_nvenc",
        lambda crf: {"cq": crf, "rc": "vbr", "b:v": 0},
        _named("preset", _NVENC) | _NVENC_OWN,
    ),
    Family(r"libvpx.*", lambda crf: {"crf": crf, "b:v": 0}, _VPX),
    Family(
        r"libaom-av1",
        lambda crf: {"crf": crf, "b:v": 0},
        _named("cpu-used", (8, 7, 6, 6, 5, 4, 3, 2, 1, 0), range(9)),
    ),
    Family(
        r"libsvtav1", lambda crf: {"crf": crf}, _named("preset", (12, 11, 10, 9, 8, 7, 5, 4, 2, 1), range(14))
    ),
    Family(
        r"librav1e", lambda crf: {"qp": crf * 5}, _named("speed", (10, 10, 9, 8, 7, 6, 5, 4, 2, 1), range(11))
    ),
    Family(r".*_qsv", lambda crf: {"global_quality": max(1, crf)}, _named("preset", _QSV)),
    Family(
        r".*_amf",
        lambda crf: {"rc": "cqp", "qp_i": crf, "qp_p": crf},
        _named("quality", _AMF, sorted(set(_AMF))),
    ),
    Family(
        r".*_videotoolbox",
        lambda crf: {"q:v": _percent(crf)},
        _named("realtime", (1, 1, 1, 0, 0, 0, 0, 0, 0, 0)),
    ),
    Family(r".*_mf", lambda crf: {"rate_control": "quality", "quality": _percent(crf)}, {}),
    Family(r"libtheora", lambda crf: {"q:v": 10 - round(crf * 10 / MAX_CRF)}, {}),
    Family(
        r"mpeg[12]video|mpeg4|libxvid|msmpeg4.*|wmv[12]|h263p?|flv", lambda crf: {"q:v": _quantiser(crf)}, {}
    ),
)
UNKNOWN = Family(".*", None, {})


def family(encoder: str) -> Family:
    """The family that `encoder` belongs to; one without settings for those that nobody knows."""
    return next((known for known in FAMILIES if re.fullmatch(known.names, encoder)), UNKNOWN)


def shaping_options(encoder: str, encoding: EncodingConfig) -> Options:
    """ffmpeg's options for the quality and speed that `encoding` asks of `encoder`.

    Raises:
        InputError: `encoder` has no such setting, or doesn't know that value.
    """
    known = family(encoder)
    options: Options = {}
    if known.quality is not None:
        options |= known.quality(encoding.crf)
    elif encoding.crf != EncodingConfig.crf:
        raise InputError(
            f"--crf means nothing to encoder {encoder} 该编码器不支持--crf",
            "leave --crf away, or use libx264",
        )
    return options | _speed(encoder, known, encoding.preset)


def _speed(encoder: str, known: Family, preset: str) -> Options:
    if known.presets is None:
        return {"preset": preset}
    if preset in known.presets:
        return known.presets[preset]
    if known.presets:
        raise InputError(
            f"--preset {preset} is unknown to encoder {encoder} 未知的--preset",
            f"choose one of {', '.join(known.presets)}",
        )
    if preset != EncodingConfig.preset:
        raise InputError(
            f"--preset means nothing to encoder {encoder} 该编码器不支持--preset",
            "leave --preset away, or use libx264",
        )
    return {}
