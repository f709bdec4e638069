"""The mouth network in PyTorch: what its members learn, how they are put together, and the way into ONNX.

Two kinds of small network share one view of Whisper's states, their principal components. **Labellers** learn
the ten rig parameters from synthetic speech, whose labels know every phone of English and Mandarin, every
closure and every silence. **Followers** learn from filmed speakers how far mouths open and spread, each
speaker brought to mean 0 and deviation 1: they hear no synthetic speech, which costs strangers dearly.
`assembled` then gives the labellers' mouth the followers' opening and half of their width; closures, tucks
and stillness stay the labellers'.

The ONNX graph is written node by node, as the encoder's is, to keep weights float16 on disk and to let the
members of a kind run as one convolution in groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from musetalk.engines.lite.parameters import (
    OPENING_GAIN,
    PARAMETER_INDEX,
    PUCKER_WIDTH_LOSS,
    RIG_PARAMETERS,
    WIDTH_GAIN,
    rig_opening,
    rig_width,
)
from musetalk.training.convert_encoder import LAYERS, OPSET, WIDTH, OnnxGraph
from musetalk.training.phones import EVENT_COLUMNS

N_STATES = LAYERS + 1
N_HEARD = LAYERS  # the last of the states: the first is too near the sound to be the same for everyone
N_COMPONENTS = 128
N_PARAMETERS = len(RIG_PARAMETERS)
OPENERS = [PARAMETER_INDEX[name] for name in OPENING_GAIN]

OPENING_UNIT, WIDTH_UNIT = 0.05, 0.03  # eye distances: what one unit of loss is
PARAMETER_WEIGHT = torch.full((N_PARAMETERS,), 0.1)
PARAMETER_WEIGHT[EVENT_COLUMNS] = torch.tensor([1.0, 0.6, 0.3])  # lip_press, lip_tuck, tongue_up
CLOSURE_WEIGHT = 3.0  # extra, of the opening where the lips should meet
SILENCE_WEIGHT = 1.0  # of the absolute movement in silence: squares alone let the mouth hover there
ACTIVITY_WEIGHT = 2.0  # of the activity's squared error: 1 in speech, 0 in silence
# Of the activity's sigmoid: while learning 0.1 is still and 0.9 is all, a wide band that keeps its gradient;
# what ships is still from 0.18 down and moves in full from 0.58.
LEARNING_GAIN, LEARNING_LOSS = 1.25, 0.125
ACTIVITY_GAIN, ACTIVITY_LOSS = 2.5, 0.45
# Of the members' mean, by event as in `phones.EVENTS`: a closure of chance 0.4 is made whole, for lips that
# fail to meet are seen before any other mistake; a tuck or a tongue tip from 0.65.
EVENT_GAIN, EVENT_LOSS = (3.0, 2.0, 2.0), (0.2, 0.3, 0.3)

SHAPE_SHARE = 0.95  # of a follower's loss that asks for the curve's shape (1 - r) instead of its values
BESIDE = 0.3  # weight of each distance beyond opening and width, which are only there to teach
ADVANCE_STEPS = 1  # strangers' mouths come before those of GRID and of the labels, by 20 ms each
OPENING_REST, OPENING_FOLLOWED, OPENING_LABELLED = 0.017, 0.035, 0.7
"""The opening asked for, in eye distances: at a follower's mean, for each of its deviations, and the share of
the labellers' that is added. Followers alone follow strangers a little better, and phones much less."""
WIDTH_REST, WIDTH_FOLLOWED, WIDTH_LABELLED = -0.003, 0.02, 1.2  # the same of the outer width's change
EXTRA_OPENING = {"jaw_open": 0.62, "lip_open": 0.15, "upper_lip_raise": 0.05, "lower_lip_drop": 0.18}
"""Who opens the mouth where followers want it wider than the labellers, as shares of the missing opening."""
_EXTRA = {name: part / OPENING_GAIN[name] for name, part in EXTRA_OPENING.items()}
LEAST_OPENING = 1e-3  # eye distances
WIDTH_GAINS = {"lip_width": WIDTH_GAIN, "pucker": -PUCKER_WIDTH_LOSS}


class Mix(NamedTuple):
    """How much of the opening and of the width each kind of member makes."""

    opening_followed: float = OPENING_FOLLOWED
    opening_labelled: float = OPENING_LABELLED
    width_followed: float = WIDTH_FOLLOWED
    width_labelled: float = WIDTH_LABELLED


class Projection(NamedTuple):
    """Whitened principal components of the layer-normalised hidden states.

    Attributes:
        mean: (1536,) float32 of the last four states, side by side.
        directions: (1536, `N_COMPONENTS`) float32, each divided by the deviation along it.
    """

    mean: np.ndarray
    directions: np.ndarray

    def components(self, states: np.ndarray) -> np.ndarray:
        """(T, `N_COMPONENTS`) float32 of normalised states (T, 5, 384)."""
        heard = states[:, -N_HEARD:].reshape(len(states), -1).astype(np.float32)
        return (heard - self.mean) @ self.directions


def fit_projection(speakers: Sequence[Sequence[np.ndarray]]) -> Projection:
    """The components of several speakers' states, every speaker counting alike.

    Args:
        speakers: per speaker, normalised states (T, 5, 384).
    """
    size = N_HEARD * WIDTH
    mean, square = np.zeros(size), np.zeros((size, size))
    for samples in speakers:
        share = 1 / sum(map(len, samples)) / len(speakers)
        for states in samples:
            heard = states[:, -N_HEARD:].reshape(-1, size).astype(np.float32)
            mean += share * heard.sum(0, dtype=np.float64)
            square += share * (heard.T @ heard)
    power, directions = np.linalg.eigh(square - np.outer(mean, mean))
    largest = np.argsort(-power)[:N_COMPONENTS]
    # an eigenvector's sign is the library's whim: the largest entry is made positive
    chosen = directions[:, largest]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), np.arange(N_COMPONENTS)])
    whitened = chosen / np.sqrt(np.maximum(power[largest], 1e-6))
    return Projection(mean.astype(np.float32), whitened.astype(np.float32))


class Shape(NamedTuple):
    """Size of a member: channels, the convolutions' lengths in steps, and the share of inputs dropped."""

    channels: int
    kernels: tuple[int, ...]
    dropout: float


LABELLER = Shape(96, (5, 5, 5), 0.2)
FOLLOWER = Shape(32, (5, 5, 1), 0.35)


class Member(nn.Module):
    """(B, T, `N_COMPONENTS`) components and (B, T) loudness → (B, T, outputs)."""

    def __init__(self, shape: Shape, outputs: int) -> None:
        super().__init__()
        widths = [N_COMPONENTS + 1, *[shape.channels] * (len(shape.kernels) - 1), outputs]
        self.dropout = nn.Dropout(shape.dropout)
        self.inner_dropout = nn.Dropout(0.1)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel, padding=kernel // 2)
            for i, kernel in enumerate(shape.kernels)
        )

    def forward(self, components: torch.Tensor, loudness: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.dropout(components), loudness[..., None]], -1).transpose(1, 2)
        for convolution in self.convolutions[:-1]:
            x = self.inner_dropout(functional.gelu(convolution(x)))
        return self.convolutions[-1](x).transpose(1, 2)

    def convolution(self, i: int) -> nn.Conv1d:
        """One of the convolutions, -1 the last."""
        return cast(nn.Conv1d, self.convolutions[i])


class Labeller(Member):
    """A member that gives (B, T, 11): rig parameters, and the activity they were multiplied by.

    Events are probabilities; the activity can hold the mouth at exactly zero in silence, where a regression
    would only hover.
    """

    def __init__(self) -> None:
        super().__init__(LABELLER, N_PARAMETERS + 1)

    def forward(self, components: torch.Tensor, loudness: torch.Tensor) -> torch.Tensor:
        x = super().forward(components, loudness)
        learning, shipped = (LEARNING_GAIN, LEARNING_LOSS), (ACTIVITY_GAIN, ACTIVITY_LOSS)
        gain, loss = learning if self.training else shipped
        activity = (gain * torch.sigmoid(x[..., N_PARAMETERS:]) - loss).clamp(0, 1)
        values = x[..., :N_PARAMETERS].clone()
        values[..., EVENT_COLUMNS] = torch.sigmoid(values[..., EVENT_COLUMNS])
        return torch.cat([values * activity, activity], -1)


class Follower(Member):
    """A member that gives (B, T, n) distances in a speaker's deviations, opening and width first."""

    def __init__(self, outputs: int) -> None:
        super().__init__(FOLLOWER, outputs)


def decided(parameters: torch.Tensor) -> torch.Tensor:
    """Members' mean parameters with events brought from chances to deeds: lips half closed are a mistake."""
    values = parameters.clone()
    gain, loss = torch.tensor(EVENT_GAIN), torch.tensor(EVENT_LOSS)
    values[..., EVENT_COLUMNS] = (gain * values[..., EVENT_COLUMNS] - loss).clamp(0, 1)
    return values


def synthetic_loss(
    predicted: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Squared errors of the parameters in units of their `spread` (10,), and of the distances they make.

    `predicted` (B, T, 11) with the activity, `truth` (B, T, 10), `weight` (B, T).
    """
    predicted, active = predicted[..., :N_PARAMETERS], predicted[..., N_PARAMETERS]
    error = (PARAMETER_WEIGHT * ((predicted - truth) / spread) ** 2).sum(-1)
    closed = 1 + CLOSURE_WEIGHT * truth[..., PARAMETER_INDEX["lip_press"]]
    error = error + closed * ((rig_opening(predicted) - rig_opening(truth)) / OPENING_UNIT) ** 2
    error = error + 0.5 * ((rig_width(predicted) - rig_width(truth)) / WIDTH_UNIT) ** 2
    silent = (truth == 0).all(-1)
    error = error + SILENCE_WEIGHT * silent * predicted.abs().sum(-1)
    error = error + ACTIVITY_WEIGHT * (active - (~silent).float()) ** 2
    return (error * weight).sum() / weight.sum()


def following_loss(predicted: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far curves are from measured ones, by value and, mostly, by shape: 1 - Pearson's r in the window.

    `predicted`, `truth` (B, T, n) in deviations, opening and width first, `weight` (B, T), 0 where unknown.
    """
    known = weight[..., None]
    count = known.sum(1, keepdim=True) + 1e-6
    square = (known * (predicted - truth) ** 2).sum(1) / count[:, 0]
    a = known * (predicted - (known * predicted).sum(1, keepdim=True) / count)
    b = known * (truth - (known * truth).sum(1, keepdim=True) / count)
    r = (a * b).sum(1) / ((a**2).sum(1) * (b**2).sum(1) + 1e-4).sqrt()
    importance = torch.full((truth.shape[-1],), BESIDE)
    importance[:2] = 1
    error = (1 - SHAPE_SHARE) * square + SHAPE_SHARE * (1 - r)
    return (error * importance).sum(-1).mean() / importance.sum()


def assembled(labels: torch.Tensor, follow: torch.Tensor | None) -> torch.Tensor:
    """Rig parameters (..., 10): the labellers' mouth, opened and spread as both kinds together say.

    Where that is less open than the labellers' mouth, all that opens it becomes smaller alike; where it is
    wider, `EXTRA_OPENING` says who opens it. Lips press shut and the mouth rests as the labellers say.

    Args:
        labels: (..., 11) the labellers' mean, events still chances.
        follow: (..., 2 or more) the followers' mean; None without filmed speech to learn from.
    """
    values, active = decided(labels[..., :N_PARAMETERS]), labels[..., N_PARAMETERS:]
    if follow is None:
        return values
    values[..., OPENERS] = values[..., OPENERS].clamp(min=0)
    made = values @ _row(OPENING_GAIN)[:, None]
    followed = (OPENING_REST + OPENING_FOLLOWED * follow[..., :1]) * active
    wanted = (followed + OPENING_LABELLED * made).clamp(min=0)
    share = (wanted / made.clamp(min=LEAST_OPENING)).clamp(max=1)
    opened = values * share + (wanted - made).clamp(min=0) * _row(_EXTRA)
    values[..., OPENERS] = opened[..., OPENERS]
    made = values @ _row(WIDTH_GAINS)[:, None]
    followed = (WIDTH_REST + WIDTH_FOLLOWED * follow[..., 1:2]) * active
    return values + (followed + (WIDTH_LABELLED - 1) * made) * _row({"lip_width": 1 / WIDTH_GAIN})


def _row(by_name: Mapping[str, float]) -> torch.Tensor:
    """(10,) a number for each rig parameter, 0 for those not named."""
    row = torch.zeros(N_PARAMETERS)
    for name, value in by_name.items():
        row[PARAMETER_INDEX[name]] = value
    return row


def export(
    projection: Projection,
    labellers: Sequence[Labeller],
    followers: Sequence[Follower],
    mix: Mix | None = None,
    advance: int = ADVANCE_STEPS,
) -> bytes:
    """The whole network as an ONNX file; members of a kind become one convolution in groups.

    Inputs ``hidden_states`` (5, T, 384) and ``loudness`` (T,), output ``rig_parameters`` (T, 10), float32.

    Args:
        mix: how much of the mouth is whose, as ships by default.
        advance: steps by which the mouth comes earlier than the members say.
    """
    from onnx import TensorProto, helper

    weights = {
        "projection.weight": projection.directions.T,
        "projection.bias": -(projection.mean @ projection.directions),
        **_grouped("labellers", labellers),
        **(_averaged("followers", followers) if followers else {}),
    }
    graph = OnnxGraph({name: values.astype(np.float16) for name, values in weights.items()})
    x = _inputs(graph)
    labels = _convolved(graph, x, "labellers", len(labellers), LABELLER)
    values, active = _labels(graph, labels, len(labellers))
    if followers:
        follow = _convolved(graph, x, "followers", len(followers), FOLLOWER)
        values = _assembled(graph, values, active, follow, mix or Mix())
    if advance:
        values = graph.step("Slice", values, graph.whole(advance), graph.whole(2**31), graph.whole(0))
        values = graph.step("Pad", values, graph.whole(0, 0, advance, 0), mode="edge")
    graph.nodes.append(helper.make_node("Identity", [values], ["rig_parameters"]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "mouth_network",
            [
                helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, [N_STATES, "steps", WIDTH]),
                helper.make_tensor_value_info("loudness", TensorProto.FLOAT, ["steps"]),
            ],
            [helper.make_tensor_value_info("rig_parameters", TensorProto.FLOAT, ["steps", N_PARAMETERS])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="enhanced-musetalk",
    )
    model.ir_version = 9
    return model.SerializeToString(deterministic=True)


def _grouped(name: str, members: Sequence[Member]) -> dict[str, np.ndarray]:
    """The members' weights side by side: ``name.i.weight``, ``name.i.bias``."""
    return {
        f"{name}.{i}.{part}": np.concatenate(
            [getattr(member.convolution(i), part).detach().numpy() for member in members]
        )
        for i in range(len(members[0].convolutions))
        for part in ("weight", "bias")
    }


def _averaged(name: str, members: Sequence[Member]) -> dict[str, np.ndarray]:
    """As `_grouped`, but the last convolution gives the mean of the members' first two outputs."""
    weights = _grouped(name, members)
    last = len(members[0].convolutions) - 1
    kernels = [member.convolution(last).weight.detach().numpy()[:2] for member in members]
    biases = [weights[f"{name}.{last}.bias"].reshape(len(members), -1)[i, :2] for i in range(len(members))]
    weights[f"{name}.{last}.weight"] = np.concatenate(kernels, 1) / len(members)
    weights[f"{name}.{last}.bias"] = np.mean(biases, 0)
    return weights


def _inputs(graph: OnnxGraph) -> str:
    """(1, `N_COMPONENTS` + 1, T) components and loudness."""
    ones = graph.constant("ones", np.ones(WIDTH, np.float32))
    normal = graph.step("LayerNormalization", "hidden_states", ones, axis=-1, epsilon=1e-5)
    first, end = graph.whole(N_STATES - N_HEARD), graph.whole(N_STATES)
    heard = graph.step("Transpose", graph.step("Slice", normal, first, end, graph.whole(0)), perm=(1, 0, 2))
    components = graph.linear(graph.step("Reshape", heard, graph.whole(0, N_HEARD * WIDTH)), "projection")
    loudness = graph.step("Unsqueeze", "loudness", graph.whole(1))
    x = graph.step("Transpose", graph.step("Concat", components, loudness, axis=-1), perm=(1, 0))
    return graph.step("Unsqueeze", x, graph.whole(0))


def _convolved(graph: OnnxGraph, x: str, name: str, members: int, shape: Shape) -> str:
    """The members' raw outputs (1, members × outputs, T), or their mean where the last one isn't grouped."""
    last = len(shape.kernels) - 1
    for i, kernel in enumerate(shape.kernels):
        weight, bias = (graph.weight(f"{name}.{i}.{part}") for part in ("weight", "bias"))
        separate = graph.weights[f"{name}.{i}.weight"].shape[1] == shape.channels
        group = members if separate and i else 1
        x = graph.step("Conv", x, weight, bias, pads=[kernel // 2, kernel // 2], group=group)
        x = graph.step("Gelu", x) if i < last else x
    return x


def _labels(graph: OnnxGraph, x: str, members: int) -> tuple[str, str]:
    """Decided rig parameters (T, 10) and activity (T, 1) of the labellers' raw outputs."""
    split = graph.step("Reshape", x, graph.whole(members, N_PARAMETERS + 1, -1))
    split = graph.step("Transpose", split, perm=(0, 2, 1))
    bounds = (0, N_PARAMETERS, N_PARAMETERS + 1)
    values, active = (
        graph.step("Slice", split, graph.whole(a), graph.whole(b), graph.whole(2))
        for a, b in pairwise(bounds)
    )
    is_event = graph.constant("is_event", np.isin(np.arange(N_PARAMETERS), EVENT_COLUMNS))
    values = graph.step("Where", is_event, graph.step("Sigmoid", values), values)
    gain, loss = np.float32(ACTIVITY_GAIN), np.float32(ACTIVITY_LOSS)
    active = _clipped(graph, graph.step("Sigmoid", active), "activity", gain, loss)
    values = graph.step("ReduceMean", graph.step("Mul", values, active), graph.whole(0), keepdims=0)
    active = graph.step("ReduceMean", active, graph.whole(0), keepdims=0)
    gains, losses = np.ones(N_PARAMETERS, np.float32), np.zeros(N_PARAMETERS, np.float32)
    gains[EVENT_COLUMNS], losses[EVENT_COLUMNS] = EVENT_GAIN, EVENT_LOSS
    decided_events = _clipped(graph, values, "event", gains, losses)
    return graph.step("Where", is_event, decided_events, values), active


def _assembled(graph: OnnxGraph, values: str, active: str, follow: str, mix: Mix) -> str:
    """`assembled` of decided values (T, 10), activity (T, 1) and the followers' mean (1, 2, T)."""

    def number(name: str, value: float) -> str:
        return graph.constant(name, np.array(value, np.float32))

    def column(name: str, by_name: Mapping[str, float]) -> str:
        return graph.constant(name, _row(by_name).numpy()[:, None])

    scale = np.array([[mix.opening_followed], [mix.width_followed]], np.float32)
    offset = np.array([[OPENING_REST], [WIDTH_REST]], np.float32)
    distances = graph.step("Mul", follow, graph.constant("followed", scale))
    distances = graph.step("Add", distances, graph.constant("rest", offset))
    distances = graph.step("Transpose", graph.step("Squeeze", distances, graph.whole(0)), perm=(1, 0))
    distances = graph.step("Mul", distances, active)
    opening, width = (
        graph.step("Slice", distances, graph.whole(i), graph.whole(i + 1), graph.whole(1)) for i in (0, 1)
    )
    is_opener = graph.constant("is_opener", np.isin(np.arange(N_PARAMETERS), OPENERS))
    values = graph.step("Where", is_opener, graph.step("Relu", values), values)
    made = graph.step("MatMul", values, column("opening_gain", OPENING_GAIN))
    labelled = graph.step("Mul", made, number("opening_labelled", mix.opening_labelled))
    wanted = graph.step("Relu", graph.step("Add", opening, labelled))
    share = graph.step("Div", wanted, graph.step("Max", made, number("least_opening", LEAST_OPENING)))
    share = graph.step("Min", share, number("one", 1.0))
    missing = graph.step("Relu", graph.step("Sub", wanted, made))
    extra = graph.constant("extra_opening", _row(_EXTRA).numpy())
    opened = graph.step("Add", graph.step("Mul", values, share), graph.step("Mul", missing, extra))
    values = graph.step("Where", is_opener, opened, values)
    made = graph.step("MatMul", values, column("width_gain", WIDTH_GAINS))
    labelled = graph.step("Mul", made, number("width_labelled", mix.width_labelled - 1))
    corners = graph.constant("corners", _row({"lip_width": 1 / WIDTH_GAIN}).numpy())
    wider = graph.step("Mul", graph.step("Add", width, labelled), corners)
    return graph.step("Add", values, wider)


def _clipped(graph: OnnxGraph, x: str, name: str, gain: np.ndarray, loss: np.ndarray) -> str:
    """gain · x − loss, clipped to 0 … 1."""
    scale = graph.constant(f"{name}_gain", np.asarray(gain))
    offset = graph.constant(f"{name}_loss", np.asarray(loss))
    zero, one = (graph.constant(str(limit), np.array(limit, np.float32)) for limit in (0.0, 1.0))
    return graph.step("Clip", graph.step("Sub", graph.step("Mul", x, scale), offset), zero, one)
