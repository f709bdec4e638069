"""One request from audio to mp4, with a stand-in engine whose faces are known."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from musetalk.benchmark.scene import FrameCounter
from musetalk.config import EncodingConfig, EngineConfig
from musetalk.engines.registry import EngineRegistry
from musetalk.errors import CacheError, CacheMissingError, InputError, OutputError
from musetalk.inference import UltraFastRealtimeInference
from musetalk.media.image import read_image
from musetalk.media.video import probe_video, read_video
from musetalk.templates.store import TemplateStore
from tests.conftest import make_template

SIZE = (96, 64)


class CountingEngine:
    """Prompts are frame numbers; the face of prompt n is one grey level that tells n."""

    name, device, dtype, fingerprint = "lite", "cpu", "float32", "counting"

    def encode(self, faces):
        raise NotImplementedError

    def listen(self, fps, *, live=False, state=None):
        return FrameCounter(fps, state)

    def open(self, template):
        return self

    def generate(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        return [np.full((16, 16, 3), int(prompt[0]) % 200, np.uint8) for prompt in audio_prompts]


class BrokenEngine(CountingEngine):
    """Fails on the third batch."""

    calls = 0

    def generate(self, audio_prompts, indices):
        self.calls += 1
        if self.calls == 3:
            raise LookupError("generator broke")
        return super().generate(audio_prompts, indices)


@pytest.fixture
def renderer(tmp_path) -> UltraFastRealtimeInference:
    template = make_template(3, SIZE, faceless=(1,))
    store = TemplateStore(tmp_path / "cache")
    metadata = {"template_id": "t", "engine": "lite", "engine_fingerprint": "counting", "version": "2.0"}
    with store.lock("t"):
        store.publish("t", template, metadata)
    return UltraFastRealtimeInference(tmp_path / "cache", engines=EngineRegistry(lambda *_: CountingEngine()))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".tmp" in path.name)


@pytest.mark.parametrize("fps", [23.976, 25, 29.97, 50, 60, 7.3])
@pytest.mark.parametrize("n_samples", [641 * 25, 16_000 * 2 + 7])
def test_every_frame_is_in_the_file_and_sound_ends_with_it(renderer, tmp_path, write_tone, fps, n_samples):
    result = renderer.ultra_fast_inference("t", write_tone(n_samples), tmp_path / "out.mp4", fps)
    expected = n_samples * result.fps.numerator // (16_000 * result.fps.denominator)
    frames = list(read_video(tmp_path / "out.mp4"))
    info = probe_video(tmp_path / "out.mp4")
    assert result.frames == len(frames) == expected
    assert info.fps == pytest.approx(float(result.fps), rel=1e-4)
    assert info.duration == pytest.approx(n_samples / 16_000, abs=1 / float(result.fps) + 0.03)


def test_frames_outside_the_mask_are_the_templates_own(renderer, tmp_path, write_tone):
    renderer.ultra_fast_inference("t", write_tone(16_000), tmp_path / "o.mp4", 25, frames_dir=tmp_path / "f")
    template = make_template(3, SIZE, faceless=(1,))
    written = sorted((tmp_path / "f").iterdir())
    assert [path.name for path in written] == [f"{i:08d}.png" for i in range(25)]
    for i, path in enumerate(written):
        frame, position = read_image(path), template.position(i, Fraction(25))
        outside = np.ones(frame.shape[:2], bool)
        if template.has_face(position):
            x1, y1, x2, y2 = template.crop_boxes[position]
            mask = np.zeros((y2 - y1 + 200, x2 - x1 + 200), np.uint8)
            full = np.zeros((SIZE[1] + 400, SIZE[0] + 400), np.uint8)
            full[200 + y1 : 200 + y2, 200 + x1 : 200 + x2] = template.masks[position]
            mask = full[200 : 200 + SIZE[1], 200 : 200 + SIZE[0]]
            outside = mask == 0
            inside_box = np.s_[template.bboxes[position][1], template.bboxes[position][0]]
            weight = mask[inside_box] / 255
            blended = i * weight + template.frames[position][inside_box] * (1 - weight)
            assert np.abs(frame[inside_box] - blended).max() <= 1
        np.testing.assert_array_equal(frame[outside], template.frames[position][outside])


def test_batch_size_changes_no_frame(renderer, tmp_path, write_tone, monkeypatch):
    audio, pictures = write_tone(16_000), []
    for batch_size in (1, 7, 32):
        config = EngineConfig(batch_size=batch_size)
        again = UltraFastRealtimeInference(renderer.store.cache_dir, config=config, engines=renderer.engines)
        again.ultra_fast_inference("t", audio, tmp_path / "o.mp4", 25, frames_dir=tmp_path / "f")
        pictures.append([path.read_bytes() for path in sorted((tmp_path / "f").iterdir())])
    assert pictures[0] == pictures[1] == pictures[2]


def test_frames_of_a_longer_run_are_removed(renderer, tmp_path, write_tone):
    for n_samples in (16_000, 8_000):
        audio = write_tone(n_samples)
        renderer.ultra_fast_inference("t", audio, tmp_path / "o.mp4", 25, frames_dir=tmp_path / "f")
    assert len(list((tmp_path / "f").iterdir())) == 12


@pytest.mark.parametrize(("fps", "told"), [("source", 12), ("source", None), (25, 12)])
def test_source_is_the_template_s_own_rate(renderer, tmp_path, write_tone, fps, told):
    metadata = renderer.store.read_metadata("t") | ({} if told is None else {"source_fps": told})
    with renderer.store.lock("t"):
        renderer.store.publish("t", make_template(3, SIZE), metadata)
    result = renderer.ultra_fast_inference("t", write_tone(16_000), tmp_path / "o.mp4", fps)
    assert result.fps == result.frames == (told if fps == "source" and told else 25)


def test_same_input_gives_the_same_bytes(renderer, tmp_path, write_tone):
    audio = write_tone(16_000)
    for name in ("a.mp4", "b.mp4"):
        renderer.ultra_fast_inference("t", audio, tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_result_counts_every_stage(renderer, tmp_path, write_tone):
    result = renderer.ultra_fast_inference("t", write_tone(16_000), tmp_path / "o.mp4", record=True)
    assert (
        set(result.stages) == {"load", "features", "generate", "composite", "encode"} == set(result.intervals)
    )
    assert 0 < result.time_to_first_frame < result.processing_time
    assert result.duration == 1.0 and result.fps == 25


@pytest.mark.parametrize("name", ["out.avi", "out", "folder.mp4", "tone.wav"])
def test_output_that_cannot_be_written_is_refused_first(renderer, tmp_path, write_tone, name):
    (tmp_path / "folder.mp4").mkdir()
    audio = write_tone(16_000)
    before = audio.read_bytes()
    with pytest.raises(OutputError):
        renderer.ultra_fast_inference("t", audio, tmp_path / name)
    assert audio.read_bytes() == before and not leftovers(tmp_path)


def test_audio_shorter_than_a_frame_leaves_nothing(renderer, tmp_path, write_tone):
    with pytest.raises(InputError):
        renderer.ultra_fast_inference("t", write_tone(600), tmp_path / "o.mp4")
    assert not (tmp_path / "o.mp4").exists() and not leftovers(tmp_path)


def test_failing_generator_ends_the_run_and_leaves_nothing(renderer, tmp_path, write_tone):
    renderer.engines = EngineRegistry(lambda *_: BrokenEngine())
    with pytest.raises(LookupError, match="generator broke"):
        renderer.ultra_fast_inference("t", write_tone(64_000), tmp_path / "o.mp4", frames_dir=tmp_path / "f")
    assert not (tmp_path / "o.mp4").exists() and not leftovers(tmp_path) and not (tmp_path / "f").exists()


def test_unknown_encoder_reports_ffmpegs_own_words(renderer, tmp_path, write_tone):
    renderer.encoding = EncodingConfig(encoder="nosuchcodec")
    with pytest.raises(OutputError, match="nosuchcodec"):
        renderer.ultra_fast_inference("t", write_tone(16_000), tmp_path / "o.mp4")
    assert not leftovers(tmp_path)


def test_cache_of_other_weights_or_none_is_refused(renderer, tmp_path, write_tone, monkeypatch):
    with pytest.raises(CacheMissingError):
        renderer.ultra_fast_inference("none", write_tone(16_000), tmp_path / "o.mp4")
    monkeypatch.setattr(CountingEngine, "fingerprint", "other weights")
    with pytest.raises(CacheError):
        renderer.ultra_fast_inference("t", write_tone(16_000), tmp_path / "o.mp4")


def test_refreshed_template_is_loaded_again(renderer, tmp_path):
    first = renderer.open("t")
    assert renderer.open("t") is first
    with renderer.store.lock("t"):
        renderer.store.publish("t", make_template(5, SIZE), dict(renderer.store.read_metadata("t")))
    assert len(renderer.open("t").template) == 10


@pytest.mark.parametrize(
    ("recorded", "verdict"),
    [({}, None), ({"vae_region": {"harmless": True}}, {"harmless": True}), ({"vae_region": "x"}, "x")],
)
def test_what_preprocessing_found_of_a_template_reaches_the_engine(renderer, monkeypatch, recorded, verdict):
    opened = []
    monkeypatch.setattr(CountingEngine, "open", lambda self, template: opened.append(template))
    metadata = {**renderer.store.read_metadata("t"), **recorded}
    with renderer.store.lock("t"):
        renderer.store.publish("t", make_template(3, SIZE), metadata)
    renderer.open("t")
    assert [template.region_verdict for template in opened] == [verdict]
