"""Training: it resumes where it stopped, repeats by seed, and exports what it trained."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")
pytest.importorskip("onnx", reason="needs the full environment (make install-full)")

from musetalk.engines.lite.parameters import PARAMETER_INDEX, rig_opening  # noqa: E402
from musetalk.training import report, train  # noqa: E402
from musetalk.training.corpus import Sample  # noqa: E402
from musetalk.training.mouth_model import Member, decided, export, real_loss  # noqa: E402


def _recording(name: str, columns: int, seed: int) -> train.Recording:
    rng = np.random.default_rng(seed)
    samples = []
    for steps in (130, 160):
        states = rng.standard_normal((steps, 5, 384)).astype(np.float16)
        truth = np.clip(states[:, 4, :columns].astype(np.float32), 0, 1)
        loudness = rng.standard_normal(steps).astype(np.float32)
        samples.append(Sample(states, loudness, truth, np.ones(steps, np.float32)))
    return train.Recording(name, "en", samples)


SYNTHETIC = [_recording("flite:slt", 10, 1)]
REAL = [_recording("s1", 4, 2)]
PLAN = train.MemberPlan("both", 0.5)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(train, "BATCH", 4)


def _weights(member: Member) -> np.ndarray:
    return np.concatenate([values.detach().numpy().ravel() for values in member.parameters()])


def test_the_same_seed_trains_the_same_member_and_another_seed_another(tmp_path):
    first, again, other = (
        _weights(train.train_member(PLAN, SYNTHETIC, REAL, seed, 3, tmp_path / f"{i}.pt"))
        for i, seed in enumerate((7, 7, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    whole = _weights(train.train_member(PLAN, SYNTHETIC, REAL, 1, 6, tmp_path / "whole.pt"))
    drawn = train.Batches.draw
    calls = []

    def draw(self, size):
        calls.append(size)
        if len(calls) > 2 * 4:
            raise KeyboardInterrupt
        return drawn(self, size)

    monkeypatch.setattr(train.Batches, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        train.train_member(PLAN, SYNTHETIC, REAL, 1, 6, tmp_path / "cut.pt")
    monkeypatch.setattr(train.Batches, "draw", drawn)
    resumed = _weights(train.train_member(PLAN, SYNTHETIC, REAL, 1, 6, tmp_path / "cut.pt"))
    np.testing.assert_array_equal(whole, resumed)


def test_training_lowers_the_error_on_synthetic_speech(tmp_path):
    plan = train.MemberPlan("synthetic", 0.0)

    def error(steps: int) -> float:
        member = train.train_member(plan, SYNTHETIC, [], 1, steps, tmp_path / f"{steps}.pt")
        predict = train.predictor([member])
        return float(np.mean([((predict(s) - s.truth) ** 2).mean() for s in SYNTHETIC[0].samples]))

    assert error(30) < 0.8 * error(1)


def test_the_exported_network_is_the_mean_of_its_members():
    import onnxruntime

    torch.manual_seed(3)
    members = [Member().eval() for _ in range(3)]
    for member in members:
        member.mix.data = torch.randn(5)
    states = torch.randn(5, 40, 384) * 3 + 1
    loudness = torch.randn(40)
    normal = torch.nn.functional.layer_norm(states, (384,)).transpose(0, 1)[None]
    with torch.no_grad():
        expected = decided(torch.stack([m(normal, loudness[None])[0] for m in members]).mean(0)).numpy()
    session = onnxruntime.InferenceSession(export(members), providers=["CPUExecutionProvider"])
    given = {"hidden_states": states.numpy(), "loudness": loudness.numpy()}
    (values,) = session.run(["rig_parameters"], given)
    assert values.shape == (40, 10)
    np.testing.assert_allclose(values, expected, atol=3e-3)  # weights are stored as float16


def test_recordings_are_kept_and_read_back_whole(tmp_path):
    path = tmp_path / "kept.npz"
    train.save_recording(path, REAL[0])
    read = train.load_recording(path)
    assert (read.name, read.language) == ("s1", "en")
    for kept, sample in zip(read.samples, REAL[0].samples, strict=True):
        for a, b in zip(kept, sample, strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(tmp_path.iterdir()) == [path]


def test_a_pressed_mouth_measures_as_shut_however_far_the_jaw_is():
    values = torch.zeros(1, 10)
    values[0, PARAMETER_INDEX["jaw_open"]] = 0.5
    assert rig_opening(values).item() == pytest.approx(0.1)
    values[0, PARAMETER_INDEX["lip_press"]] = 1.0
    assert rig_opening(values).item() == 0


def test_real_frames_without_a_face_teach_nothing():
    predicted = torch.rand(2, 6, 10)
    truth, weight = torch.rand(2, 6, 4), torch.ones(2, 6)
    weight[:, 3:] = 0
    changed = truth.clone()
    changed[:, 3:] += 5
    assert real_loss(predicted, truth, weight) == real_loss(predicted, changed, weight)


def test_a_perfect_network_scores_perfectly():
    truth = np.zeros((300, 10), np.float32)
    wave = (1 + np.sin(np.arange(200) / 5)) / 2
    truth[50:250, PARAMETER_INDEX["jaw_open"]] = wave + 0.1
    truth[50:250, PARAMETER_INDEX["lip_width"]] = wave - 0.5
    for name, begin in (("lip_press", 100), ("lip_tuck", 200)):
        truth[begin : begin + 4, PARAMETER_INDEX[name]] = 1
    sample = Sample(
        np.zeros((300, 5, 384), np.float16), np.zeros(300, np.float32), truth, np.ones(300, np.float32)
    )
    found = report.synthetic_scores([sample], lambda s: s.truth)
    assert [found.opening.r, found.width.r] == pytest.approx([1, 1])
    assert found.closure_rate == found.tuck_f == 1
    assert found.silence_deviation == 0
    held = report.synthetic_scores(
        [sample], lambda s: s.truth * (np.arange(10) != PARAMETER_INDEX["lip_press"])
    )
    assert held.closure_rate == 0
