"""The rig's parameters: what the mouth network predicts and what the warp displaces.

One frame of mouth shape is a float32 vector of `len(RIG_PARAMETERS)` values in the order below. Zero is
the portrait's own mouth, closed. Gains tie the parameters to distances that can be measured on a face
mesh, in eye distances, so that tracks of real speakers become parameters and
rendered faces can be measured against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    Values = TypeVar("Values", np.ndarray, torch.Tensor)


class RigParameter(NamedTuple):
    """A named mouth movement with its range."""

    name: str
    low: float
    high: float
    meaning: str


RIG_PARAMETERS = (
    RigParameter("jaw_open", 0.0, 1.0, "the jaw's rotation: chin, lower lip and lower teeth go down"),
    RigParameter("lip_open", 0.0, 1.0, "the lips part without the jaw"),
    RigParameter("lip_width", -1.0, 1.0, "the corners move apart (+) or together (-)"),
    RigParameter("pucker", 0.0, 1.0, "the lips round and come forward: u, o, w, sh"),
    RigParameter("upper_lip_raise", 0.0, 1.0, "the upper lip uncovers the upper teeth"),
    RigParameter("lower_lip_drop", 0.0, 1.0, "the lower lip uncovers the lower teeth"),
    RigParameter("lip_press", 0.0, 1.0, "the lips meet and roll in: p, b, m; shuts the mouth at 1"),
    RigParameter("lip_tuck", 0.0, 1.0, "the lower lip rises under the upper teeth: f, v"),
    RigParameter("smile", 0.0, 1.0, "the corners rise"),
    RigParameter("tongue_up", 0.0, 1.0, "the tongue's tip shows behind the upper teeth: l, th, n"),
)
PARAMETER_INDEX = {parameter.name: i for i, parameter in enumerate(RIG_PARAMETERS)}
LOW = np.array([parameter.low for parameter in RIG_PARAMETERS], np.float32)
HIGH = np.array([parameter.high for parameter in RIG_PARAMETERS], np.float32)

# Inner-lip opening (mesh 13–14) at full value, in eye distances; the sum is shut by 1 - lip_press.
OPENING_GAIN = {"jaw_open": 0.20, "lip_open": 0.06, "upper_lip_raise": 0.03, "lower_lip_drop": 0.05}
CHIN_GAIN = 0.20  # descent of the chin (mesh 152) at jaw_open 1, eye distances
WIDTH_GAIN = 0.10  # outer width (mesh 61–291) gained at lip_width 1 or lost at -1, eye distances
PUCKER_WIDTH_LOSS = 0.12  # outer width lost at pucker 1, eye distances


ARTICULATED = ("jaw_open", "lip_open", "lip_width", "pucker", "upper_lip_raise", "lower_lip_drop")
"""What a style makes smaller or larger; lips that meet, tuck or smile do so as before."""


def articulated(parameters: np.ndarray, articulation: float) -> np.ndarray:
    """Rig parameters (..., 10) with the mouth's movements `articulation` times as large, in their ranges."""
    scale = np.ones(len(RIG_PARAMETERS), np.float32)
    scale[[PARAMETER_INDEX[name] for name in ARTICULATED]] = articulation
    return np.clip(parameters * scale, LOW, HIGH)


def rig_opening(parameters: Values) -> Values:
    """(...) inner-lip opening that a mesh would measure of rig parameters (..., 10), eye distances."""
    total: Any = sum(gain * parameters[..., PARAMETER_INDEX[name]] for name, gain in OPENING_GAIN.items())
    return total * (1 - parameters[..., PARAMETER_INDEX["lip_press"]].clip(0, 1))


def rig_width(parameters: Values) -> Values:
    """(...) change of the mouth's outer width by rig parameters (..., 10), eye distances."""
    spread: Any = WIDTH_GAIN * parameters[..., PARAMETER_INDEX["lip_width"]]
    return spread - PUCKER_WIDTH_LOSS * parameters[..., PARAMETER_INDEX["pucker"]]
