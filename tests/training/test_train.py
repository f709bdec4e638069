"""Training: it resumes where it stopped, repeats by seed, exports what it trained, and learns stillness."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")
pytest.importorskip("onnx", reason="needs the full environment (make install-full)")

from musetalk.config import LITE_MODELS  # noqa: E402
from musetalk.engines.lite.parameters import (  # noqa: E402
    PARAMETER_INDEX,
    RIG_PARAMETERS,
    rig_opening,
    rig_width,
)
from musetalk.engines.lite.speech import LOOK_AHEAD, NETWORK_FILE  # noqa: E402
from musetalk.errors import InputError  # noqa: E402
from musetalk.training import corpus, mouth_model, report, train  # noqa: E402
from musetalk.training.corpus import Clip, Sample  # noqa: E402
from musetalk.training.mouth_model import (  # noqa: E402
    Follower,
    Labeller,
    Projection,
    assembled,
    export,
    fit_projection,
    following_loss,
    synthetic_loss,
)

N = mouth_model.N_COMPONENTS


def _recording(name: str, columns: int, seed: int) -> train.Recording:
    rng = np.random.default_rng(seed)
    samples = []
    for steps in (130, 160):
        components = rng.standard_normal((steps, N)).astype(np.float32)
        truth = np.clip(components[:, :columns], 0, 1)
        loudness = rng.standard_normal(steps).astype(np.float32)
        samples.append(Sample(components, loudness, truth, np.ones(steps, np.float32)))
    return train.Recording(name, "en", samples)


SYNTHETIC = [_recording("flite:slt", len(RIG_PARAMETERS), 1)]
REAL = [_recording("grid_s1", len(corpus.MEASURED), 2)]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(train, "BATCH", 4)


def _weights(member: mouth_model.Member) -> np.ndarray:
    return np.concatenate([values.detach().numpy().ravel() for values in member.parameters()])


@pytest.mark.parametrize(
    ("trained", "recordings"), [(train.train_labeller, SYNTHETIC), (train.train_follower, REAL)]
)
def test_the_same_seed_trains_the_same_member_and_another_seed_another(tmp_path, trained, recordings):
    first, again, other = (
        _weights(trained(recordings, seed, 3, tmp_path / f"{i}.pt")) for i, seed in enumerate((7, 7, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("trained", "recordings"), [(train.train_labeller, SYNTHETIC), (train.train_follower, REAL)]
)
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, trained, recordings):
    whole = _weights(trained(recordings, 1, 6, tmp_path / "whole.pt"))
    drawn = train.Batches.draw
    calls = []

    def draw(self, size):
        calls.append(size)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return drawn(self, size)

    monkeypatch.setattr(train.Batches, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        trained(recordings, 1, 6, tmp_path / "cut.pt")
    monkeypatch.setattr(train.Batches, "draw", drawn)
    np.testing.assert_array_equal(whole, _weights(trained(recordings, 1, 6, tmp_path / "cut.pt")))


def test_training_lowers_the_error_on_synthetic_speech(tmp_path):
    def error(steps: int) -> float:
        member = train.train_labeller(SYNTHETIC, 1, steps, tmp_path / f"{steps}.pt")
        errors = []
        for sample in SYNTHETIC[0].samples:
            given = (torch.from_numpy(values)[None] for values in (sample.states, sample.loudness))
            with torch.no_grad():
                said = member(*given)[0, :, : len(RIG_PARAMETERS)].numpy()
            errors.append(((said - sample.truth) ** 2).mean())
        return float(np.mean(errors))

    assert error(30) < 0.8 * error(1)


def test_what_a_follower_says_of_its_speakers_has_mean_0_and_deviation_1(tmp_path):
    follower = train.train_follower(REAL, 1, 3, tmp_path / "follower.pt")
    with torch.no_grad():
        said = torch.cat(
            [
                follower(torch.from_numpy(s.states)[None], torch.from_numpy(s.loudness)[None])[0]
                for s in REAL[0].samples
            ]
        )
    np.testing.assert_allclose(said.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(said.std(0), 1, atol=1e-3)


def test_nothing_is_learned_from_clips_that_are_for_judging(tmp_path):
    clips = [
        Clip(group, "one", "en", np.zeros(48_000, np.float32), np.ones((75, 10), np.float32), 25.0)
        for group in (*train.JUDGING_ONLY, "grid")
    ]
    found = train.real_recordings(clips, lambda mel: np.ones((5, mel.shape[2] // 2, 384)), tmp_path, 1)
    assert [recording.name for recording in found] == ["grid_one"]


def _random_network(seed: int) -> tuple[Projection, list[Labeller], list[Follower]]:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(4 * 384).astype(np.float32) / 10
    directions = (rng.standard_normal((4 * 384, N)) / 40).astype(np.float32)
    followers = [Follower(3).eval() for _ in range(3)]
    return Projection(mean, directions), [Labeller().eval() for _ in range(2)], followers


def _run(network: bytes, states: np.ndarray, loudness: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (values,) = session.run(["rig_parameters"], {"hidden_states": states, "loudness": loudness})
    return values


@pytest.mark.parametrize("advance", [0, 2])
@pytest.mark.parametrize("followed", [True, False])
def test_the_exported_network_is_its_members_assembled(followed, advance):
    projection, labellers, followers = _random_network(3)
    states = np.random.default_rng(0).standard_normal((5, 40, 384)).astype(np.float32) * 3 + 1
    loudness = np.random.default_rng(1).standard_normal(40).astype(np.float32)
    normal = torch.nn.functional.layer_norm(torch.from_numpy(states), (384,)).numpy()
    given = (
        torch.from_numpy(projection.components(normal.transpose(1, 0, 2)))[None],
        torch.from_numpy(loudness)[None],
    )
    with torch.no_grad():
        labels, follow = (
            torch.stack([member(*given)[0] for member in kind]).mean(0) for kind in (labellers, followers)
        )
        expected = assembled(labels, follow if followed else None).numpy()
    expected = np.concatenate([expected[advance:], np.repeat(expected[-1:], advance, 0)])
    network = export(projection, labellers, followers if followed else [], advance=advance)
    values = _run(network, states, loudness)
    assert values.shape == (40, 10)
    np.testing.assert_allclose(values, expected, atol=0.01)  # weights are stored as float16


def test_components_are_uncorrelated_and_of_deviation_1():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4 * 384, 160)) / 12

    def states(n: int) -> np.ndarray:
        heard = (rng.standard_normal((n, 160)) @ mixing.T).reshape(n, 4, 384)
        return np.concatenate([np.full((n, 1, 384), 99), heard], 1).astype(np.float32)

    speakers = [[states(900), states(600)], [states(1500)]]
    projection = fit_projection(speakers)
    found = projection.components(np.concatenate([*speakers[0], *speakers[1]]))
    assert found.shape == (3000, N)
    np.testing.assert_allclose(np.cov(found.T), np.eye(N), atol=0.02)


def _labels(activity: float = 1.0, **values: float) -> torch.Tensor:
    labels = torch.zeros(1, 11)
    for name, value in values.items():
        labels[0, PARAMETER_INDEX[name]] = value
    labels[0, 10] = activity
    return labels


def test_followers_open_and_spread_the_labelled_mouth():
    labels = _labels(jaw_open=0.2, lip_open=0.2, pucker=0.2)
    for z in (-1.0, 0.0, 1.0, 2.0):
        values = assembled(labels, torch.tensor([[z, z]]))
        opening = mouth_model.OPENING_REST + mouth_model.OPENING_FOLLOWED * z
        opening = max(opening + mouth_model.OPENING_LABELLED * 0.052, 0)
        width = mouth_model.WIDTH_REST + mouth_model.WIDTH_FOLLOWED * z - mouth_model.WIDTH_LABELLED * 0.024
        assert rig_opening(values).item() == pytest.approx(opening, abs=1e-5)
        assert rig_width(values).item() == pytest.approx(width, abs=1e-5)


def test_lips_that_labellers_press_stay_shut_whatever_followers_say():
    values = assembled(_labels(jaw_open=0.2, lip_press=0.9), torch.tensor([[3.0, 0.0]]))
    assert rig_opening(values).item() == 0


def test_a_mouth_that_labellers_rest_stays_at_rest_whatever_followers_say():
    values = assembled(_labels(activity=0.0), torch.tensor([[3.0, -2.0]]))
    assert not values.any()


def test_frames_without_a_face_teach_nothing():
    predicted = torch.rand(2, 6, 9)
    truth, weight = torch.rand(2, 6, 9), torch.ones(2, 6)
    weight[:, 3:] = 0
    changed = truth.clone()
    changed[:, 3:] += 5
    assert following_loss(predicted, truth, weight) == following_loss(predicted, changed, weight)
    assert following_loss(truth, truth, weight) < 0.01 < following_loss(predicted, truth, weight)


def test_movement_in_silence_is_an_error_and_so_is_activity():
    truth, weight, spread = torch.zeros(1, 8, 10), torch.ones(1, 8), torch.ones(10)
    still = torch.zeros(1, 8, 11)
    active, moving = still.clone(), still.clone()
    active[..., 10] = 1
    moving[..., PARAMETER_INDEX["jaw_open"]] = 0.1
    assert synthetic_loss(still, truth, weight, spread) == 0
    assert synthetic_loss(active, truth, weight, spread) > 1
    assert synthetic_loss(moving, truth, weight, spread) > 0.1


def test_recordings_are_kept_and_read_back_whole(tmp_path):
    path = tmp_path / "kept.npz"
    train.save_recording(path, REAL[0])
    read = train.load_recording(path)
    assert (read.name, read.language) == ("grid_s1", "en")
    for kept, sample in zip(read.samples, REAL[0].samples, strict=True):
        for a, b in zip(kept, sample, strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(tmp_path.iterdir()) == [path]


def test_training_without_a_synthesizer_says_what_to_install(tmp_path, monkeypatch):
    still = train.Recording("still", "", [])
    nothing = train.Corpus([], [], still, [], [], still)
    monkeypatch.setattr(train, "build_corpus", lambda *arguments: nothing)
    with pytest.raises(InputError, match="synthesizer"):
        train.train([], None, None, tmp_path / "out", tmp_path / "work", 1)
    assert not (tmp_path / "out").exists()


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


def test_what_ships_hears_no_further_ahead_than_it_says():
    network = (LITE_MODELS / NETWORK_FILE).read_bytes()
    states = np.random.default_rng(0).standard_normal((5, 120, 384)).astype(np.float32)
    loudness = np.zeros(120, np.float32)
    later = states.copy()
    ahead = round(LOOK_AHEAD * 50)
    later[:, 61 + ahead :] += np.random.default_rng(1).standard_normal(later[:, 61 + ahead :].shape)
    before, after = _run(network, states, loudness), _run(network, later.astype(np.float32), loudness)
    np.testing.assert_allclose(before[:61], after[:61], atol=1e-5)
    assert np.abs(before[61:] - after[61:]).max() > 0.01
    assert LOOK_AHEAD <= 0.2
