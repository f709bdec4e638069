"""The mouth network in PyTorch, its losses, and its way into ONNX.

The network that ships is the mean of several small members trained on different shares of synthetic and real
speech: synthetic labels know every phone and every closure, real tracks how far mouths move, and the mean
keeps one recorded man's habits from taking over. A member sees 120 ms to each side.

The ONNX graph is written node by node, as the encoder's is, to keep weights float16 on disk: of the same
members `torch.onnx.export` (torch 2.13) makes 4.6 MB instead of 2.2, of other bytes with equal results, and
its older exporter, for the assignments to columns, a graph that onnxruntime refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from musetalk.engines.lite.parameters import (
    CHIN_GAIN,
    OPENING_GAIN,
    PARAMETER_INDEX,
    RIG_PARAMETERS,
    rig_opening,
    rig_width,
)
from musetalk.training.convert_encoder import LAYERS, OPSET, WIDTH, OnnxGraph
from musetalk.training.phones import EVENT_COLUMNS

N_STATES = LAYERS + 1
N_PARAMETERS = len(RIG_PARAMETERS)

OPENING_UNIT, WIDTH_UNIT, CHIN_UNIT = 0.05, 0.03, 0.04  # eye distances: what one unit of loss is
PARAMETER_WEIGHT = torch.full((N_PARAMETERS,), 0.1)
PARAMETER_WEIGHT[EVENT_COLUMNS] = torch.tensor([1.0, 0.6, 0.3])  # lip_press, lip_tuck, tongue_up
CLOSURE_WEIGHT = 3.0  # extra, of the opening where the lips should meet
SILENCE_WEIGHT = 1.0  # of the absolute movement in silence: squares alone let the mouth hover there
# Of the activity's sigmoid: while learning 0.1 is still and 0.9 is all, a wide band that keeps its gradient;
# what ships is still from 0.18 down.
LEARNING_GAIN, LEARNING_LOSS = 1.25, 0.125
ACTIVITY_GAIN, ACTIVITY_LOSS = 1.4, 0.25
# Of the members' mean, by event as in `phones.EVENTS`: a closure of chance 0.4 is made whole, for lips that
# fail to meet are seen before any other mistake; a tuck or a tongue tip from 0.65.
EVENT_GAIN, EVENT_LOSS = (3.0, 2.0, 2.0), (0.2, 0.3, 0.3)
HIDDEN_WIDTH = 128
KERNEL = 5  # steps; three convolutions of it look 120 ms ahead


class Member(nn.Module):
    """(B, T, 5, 384) layer-normalised hidden states and (B, T) loudness → (B, T, 10) rig parameters.

    Events are probabilities; everything is multiplied by an activity output, which can hold the mouth at
    exactly zero in silence where a regression would only hover.
    """

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(N_STATES))
        self.dropout = nn.Dropout(dropout)
        self.input = nn.Linear(WIDTH + 1, HIDDEN_WIDTH)
        self.inner = nn.ModuleList(
            nn.Conv1d(HIDDEN_WIDTH, HIDDEN_WIDTH, KERNEL, padding=KERNEL // 2) for _ in range(2)
        )
        self.inner_dropout = nn.Dropout(dropout / 2)
        self.output = nn.Conv1d(HIDDEN_WIDTH, N_PARAMETERS + 1, KERNEL, padding=KERNEL // 2)

    def forward(self, states: torch.Tensor, loudness: torch.Tensor) -> torch.Tensor:
        """Rig parameters (B, T, 10) of hidden states (B, T, 5, 384) and loudness (B, T)."""
        mixed = torch.einsum("btld,l->btd", states, self.mix.softmax(0))
        x = self.input(torch.cat([self.dropout(mixed), loudness[..., None]], -1)).transpose(1, 2)
        for convolution in self.inner:
            x = self.inner_dropout(functional.gelu(convolution(x)))
        x = self.output(x).transpose(1, 2)
        learning, shipped = (LEARNING_GAIN, LEARNING_LOSS), (ACTIVITY_GAIN, ACTIVITY_LOSS)
        gain, loss = learning if self.training else shipped
        activity = (gain * torch.sigmoid(x[..., N_PARAMETERS:]) - loss).clamp(0, 1)
        values = x[..., :N_PARAMETERS].clone()
        values[..., EVENT_COLUMNS] = torch.sigmoid(values[..., EVENT_COLUMNS])
        return values * activity


def upper_lip(parameters: torch.Tensor) -> torch.Tensor:
    """Change of the distance from nose base to inner upper lip (mesh 2–13) in eye distances."""
    raised = OPENING_GAIN["upper_lip_raise"] * parameters[..., PARAMETER_INDEX["upper_lip_raise"]]
    return -raised - OPENING_GAIN["lip_open"] / 2 * parameters[..., PARAMETER_INDEX["lip_open"]]


def chin(parameters: torch.Tensor) -> torch.Tensor:
    """Descent of the chin (mesh 152) in eye distances."""
    return CHIN_GAIN * parameters[..., PARAMETER_INDEX["jaw_open"]]


def decided(parameters: torch.Tensor) -> torch.Tensor:
    """Members' mean parameters (..., 10) with events brought from chances to deeds: lips half closed are a
    mistake."""
    values = parameters.clone()
    gain, loss = torch.tensor(EVENT_GAIN), torch.tensor(EVENT_LOSS)
    values[..., EVENT_COLUMNS] = (gain * values[..., EVENT_COLUMNS] - loss).clamp(0, 1)
    return values


def synthetic_loss(
    predicted: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Squared errors of the parameters in units of their `spread` (10,), and of the distances they make.

    `predicted`, `truth` (B, T, 10), `weight` (B, T).
    """
    error = (PARAMETER_WEIGHT * ((predicted - truth) / spread) ** 2).sum(-1)
    closed = 1 + CLOSURE_WEIGHT * truth[..., PARAMETER_INDEX["lip_press"]]
    error = error + closed * ((rig_opening(predicted) - rig_opening(truth)) / OPENING_UNIT) ** 2
    error = error + 0.5 * ((rig_width(predicted) - rig_width(truth)) / WIDTH_UNIT) ** 2
    silent = (truth == 0).all(-1)
    error = error + SILENCE_WEIGHT * silent * predicted.abs().sum(-1)
    return (error * weight).sum() / weight.sum()


def real_loss(predicted: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared errors of the distances that the predicted parameters make, where real ones were measured.

    `truth` (B, T, 4) as corpus.MEASURED, `weight` (B, T).
    """
    error = ((rig_opening(predicted) - truth[..., 0]) / OPENING_UNIT) ** 2
    error = error + ((rig_width(predicted) - truth[..., 1]) / WIDTH_UNIT) ** 2
    error = error + 0.3 * ((chin(predicted) - truth[..., 2]) / CHIN_UNIT) ** 2
    error = error + 0.1 * ((upper_lip(predicted) - truth[..., 3]) / WIDTH_UNIT) ** 2
    return (error * weight).sum() / weight.sum()


def export(members: Sequence[Member]) -> bytes:
    """The mean of `members` as an ONNX file.

    Inputs ``hidden_states`` (5, T, 384) and ``loudness`` (T,), output ``rig_parameters`` (T, 10), float32.
    """
    from onnx import TensorProto, helper

    weights: dict[str, np.ndarray] = {}
    for i, member in enumerate(members):
        for name, values in member.state_dict().items():
            weights[f"members.{i}.{name}"] = values.numpy().astype(np.float16)
    graph = OnnxGraph(weights)
    ones = graph.constant("ones", np.ones(WIDTH, np.float32))
    normal = graph.step("LayerNormalization", "hidden_states", ones, axis=-1, epsilon=1e-5)
    loudness = graph.step("Unsqueeze", "loudness", graph.whole(1))
    outputs = [_member_graph(graph, f"members.{i}", normal, loudness) for i in range(len(members))]
    mean = graph.step("Mean", *outputs)
    is_event = graph.constant("is_event", np.isin(np.arange(N_PARAMETERS), EVENT_COLUMNS))
    gain, loss = np.ones(N_PARAMETERS, np.float32), np.zeros(N_PARAMETERS, np.float32)
    gain[EVENT_COLUMNS], loss[EVENT_COLUMNS] = EVENT_GAIN, EVENT_LOSS
    decided_events = _clipped(graph, mean, "event", gain, loss)
    graph.nodes.append(helper.make_node("Where", [is_event, decided_events, mean], ["rig_parameters"]))
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


def _member_graph(graph: OnnxGraph, name: str, normal: str, loudness: str) -> str:
    """One member's nodes; returns the name of its (T, 10) output."""
    mix = np.exp(graph.weights[f"{name}.mix"].astype(np.float32))
    shares = graph.constant(f"{name}.shares", (mix / mix.sum()).reshape(-1, 1, 1))
    mixed = graph.step("ReduceSum", graph.step("Mul", normal, shares), graph.whole(0), keepdims=0)
    x = graph.linear(graph.step("Concat", mixed, loudness, axis=-1), f"{name}.input")
    x = graph.step("Unsqueeze", graph.step("Transpose", x, perm=(1, 0)), graph.whole(0))
    for layer in ("inner.0", "inner.1", "output"):
        pads = [KERNEL // 2, KERNEL // 2]
        x = graph.step(
            "Conv", x, graph.weight(f"{name}.{layer}.weight"), graph.weight(f"{name}.{layer}.bias"), pads=pads
        )
        if layer != "output":
            x = graph.step("Gelu", x)
    x = graph.step("Transpose", graph.step("Squeeze", x, graph.whole(0)), perm=(1, 0))
    is_event = graph.constant("is_event", np.isin(np.arange(N_PARAMETERS), EVENT_COLUMNS))
    values = graph.step("Slice", x, graph.whole(0), graph.whole(N_PARAMETERS), graph.whole(1))
    activity = graph.step(
        "Slice", x, graph.whole(N_PARAMETERS), graph.whole(N_PARAMETERS + 1), graph.whole(1)
    )
    values = graph.step("Where", is_event, graph.step("Sigmoid", values), values)
    sigmoid = graph.step("Sigmoid", activity)
    gain, loss = np.float32(ACTIVITY_GAIN), np.float32(ACTIVITY_LOSS)
    activity = _clipped(graph, sigmoid, "activity", gain, loss)
    return graph.step("Mul", values, activity)


def _clipped(graph: OnnxGraph, x: str, name: str, gain: np.ndarray, loss: np.ndarray) -> str:
    """gain · x − loss, clipped to 0 … 1."""
    scale = graph.constant(f"{name}_gain", np.asarray(gain))
    offset = graph.constant(f"{name}_loss", np.asarray(loss))
    zero, one = (graph.constant(str(limit), np.array(limit, np.float32)) for limit in (0.0, 1.0))
    return graph.step("Clip", graph.step("Sub", graph.step("Mul", x, scale), offset), zero, one)
