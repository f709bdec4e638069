"""The bundled Whisper encoder equals transformers' own, and reads only the checkpoint it was checked with."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from musetalk.errors import WeightsError
from musetalk.training import convert_encoder

GOLDEN = Path(__file__).parents[1] / "data" / "lite" / "whisper_tiny_en_states.npz"


def _mel(frames: int) -> np.ndarray:
    """A smooth moving pattern with the range of log-mel features, (1, 80, frames) float32."""
    band, time = np.arange(80)[:, None], np.arange(frames)[None]
    pattern = np.sin(band / 7 + time / 9) + np.sin(time / 23) * np.cos(band / 5)
    return (0.4 * pattern[None]).astype(np.float32)


def _hidden_states(mel: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(convert_encoder.ENCODER_PATH, providers=["CPUExecutionProvider"])
    return session.run(None, {"mel": mel})[0]


def test_bundled_encoder_gives_the_golden_states_of_transformers():
    golden = np.load(GOLDEN)["states"]
    states = _hidden_states(_mel(200))
    assert states.shape == (5, 100, 384)
    np.testing.assert_allclose(states[:, ::10, ::8], golden, atol=2e-3)


def test_further_steps_on_what_is_remembered_are_those_of_the_whole():
    import onnxruntime

    session = onnxruntime.InferenceSession(convert_encoder.ENCODER_PATH, providers=["CPUExecutionProvider"])
    mel = _mel(200)
    whole, present = session.run(None, {"mel": mel})
    further = {
        "mel": mel[:, :, 156:],
        "skipped": np.array([2]),
        "position": np.array([80]),
        "past": present[:, :80],
    }
    later, known = session.run(None, further)
    # the past was encoded with all that follows in view, so that only the further steps are computed anew
    np.testing.assert_allclose(later, whole[:, 80:], atol=2e-4)
    np.testing.assert_allclose(known, present, atol=2e-4)


def test_bundled_encoder_is_small_enough_to_ship():
    assert convert_encoder.ENCODER_PATH.stat().st_size <= 17_000_000


@pytest.mark.parametrize("frames", [100, 3000])
def test_bundled_encoder_agrees_with_transformers_on_the_same_weights(frames):
    torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")
    pytest.importorskip("transformers", reason="needs the full environment (make install-full)")
    pytest.importorskip("onnx", reason="needs the full environment (make install-full)")
    mel = _mel(frames)
    encoder = _transformers_encoder(frames // 2)
    with torch.no_grad():
        expected = torch.cat(encoder(torch.tensor(mel), output_hidden_states=True).hidden_states).numpy()
    np.testing.assert_allclose(_hidden_states(mel), expected, atol=2e-3)


def _transformers_encoder(positions: int):
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        num_mel_bins=80,
        max_source_positions=positions,
    )
    encoder = WhisperEncoder(config).eval()
    state = {}
    for tensor in onnx.load(str(convert_encoder.ENCODER_PATH)).graph.initializer:
        values = torch.tensor(numpy_helper.to_array(tensor).astype(np.float32))
        name = tensor.name
        if not name.endswith((".weight", ".bias")):
            continue
        if name == "embed_positions.weight":
            values = values[:positions]
        elif values.ndim == 2:
            values = values.T
        if ".qkv_proj." not in name:
            state[name] = values
            continue
        for part, chunk in zip("qkv", values.chunk(3), strict=True):
            if name.endswith("weight") or part != "k":
                state[name.replace("qkv", part)] = chunk
    encoder.load_state_dict(state)
    return encoder


def _variable(name: str, values: np.ndarray, dtype: int) -> bytes:
    text = name.encode() + b"\0"
    shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    return (
        struct.pack("<H", len(text))
        + text
        + shape
        + struct.pack("<BI", dtype, values.nbytes)
        + values.tobytes()
    )


def _model_bin(*variables: bytes) -> bytes:
    return struct.pack("<I", 6) + b"\4\0abc\0" + struct.pack("<II", 3, len(variables)) + b"".join(variables)


def test_reads_names_shapes_and_values_of_a_ctranslate2_file(tmp_path):
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = tmp_path / "model.bin"
    path.write_bytes(
        _model_bin(_variable("encoder/conv1/weight", weight, 4), _variable("x", np.ones(1, "f4"), 0))
    )
    variables = dict(convert_encoder.read_ctranslate2(path))
    assert list(variables) == ["encoder/conv1/weight", "x"]
    np.testing.assert_array_equal(variables["encoder/conv1/weight"], weight)


def test_weights_get_transformers_names_and_the_decoder_is_left_out():
    names = [
        "encoder/conv1/weight",
        "encoder/layer_2/self_attention/linear_0/bias",
        "encoder/layer_2/ffn/layer_norm/gamma",
        "encoder/layer_norm/beta",
        "encoder/position_encodings/encodings",
        "encoder/num_heads",
        "decoder/layer_0/ffn/linear_0/weight",
    ]
    weights = convert_encoder.encoder_weights((name, np.zeros(1, np.float16)) for name in names)
    assert set(weights) == {
        "conv1.weight",
        "layers.2.self_attn.qkv_proj.bias",
        "layers.2.final_layer_norm.weight",
        "layer_norm.bias",
        "embed_positions.weight",
    }


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", _model_bin(b"\4\0abc\0\1")])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.bin"):
        list(convert_encoder.read_ctranslate2(path))


def test_another_checkpoint_is_refused_by_its_hash_and_nothing_is_written(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(_model_bin())
    output = tmp_path / "encoder.onnx"
    with pytest.raises(WeightsError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
        convert_encoder.convert(path, output)
    assert not output.exists()
    assert (
        convert_encoder.main(["--model_bin", str(path), "--output_path", str(output)])
        == WeightsError.exit_code
    )
