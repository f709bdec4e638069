"""The benchmark's own commands on tiny pictures, and the plain way it compares with."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from musetalk.benchmark import __main__ as benchmark
from musetalk.benchmark.plain import PlainResult, blend_whole_frame, render_plainly
from musetalk.benchmark.scene import (
    StandInEngine,
    make_scene,
    make_template,
    parse_stand_in,
    write_speech,
)
from musetalk.cli import execute
from musetalk.compositor import paste_back
from musetalk.config import EncodingConfig, EngineConfig
from musetalk.errors import InputError
from musetalk.measurement import Measurement
from musetalk.media.audio import read_waveform
from musetalk.media.image import read_image
from musetalk.media.video import read_video
from tests.test_measurement import result

SIZE = (128, 96)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every size is a tiny one."""
    monkeypatch.setattr(benchmark, "SIZES", {"512": SIZE})
    monkeypatch.setattr(benchmark, "TEMPLATE_LENGTHS", (1, 3))
    monkeypatch.setattr("musetalk.benchmark.scene.VIDEO_FRAMES", 8)


def run(tmp_path: Path, *arguments: str):
    return execute(benchmark.benchmark_main, [*arguments, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pipeline_measures_a_stand_in_engine(tmp_path, kind):
    flags = ["--engine", "sleep:1", "--template", kind, "--frames", "30", "--runs", "2"]
    answer, code = run(tmp_path, "pipeline", *flags)
    assert code == 0 and answer["success"], answer
    assert (answer["frames"], answer["runs"], answer["engine"]) == (30, 2, "sleep:1")
    assert answer["stages"]["generate"]["min"] >= 0.030
    assert len(list(read_video(answer["output_path"]))) == 30
    assert read_image(answer["chart_path"]).ndim == 3


def test_compare_prints_ratios(tmp_path):
    answer, code = run(tmp_path, "compare", "--frames", "10", "--runs", "1")
    assert code == 0 and answer["plain"]["runs"] == 1, answer
    assert answer["ratios"].keys() == {"frames_per_second", "cpu_time", "generate"}
    assert answer["plain"]["stages"].keys() == {"features", "generate", "composite", "encode"}


def test_ratios_say_how_many_times_less_the_pipeline_takes():
    ours = [replace(result(seconds), frames=100) for seconds in (2.0, 4.0, 5.0)]
    plain = [
        PlainResult(100, seconds, processor, {"generate": generate})
        for seconds, processor, generate in ((20.0, 30.0, 3.0), (80.0, 60.0, 1.0), (40.0, 90.0, 2.0))
    ]
    measurement = Measurement(ours, [4.0, 6.0, 8.0], 5.0, 7.0, None)
    answer = benchmark.comparison(measurement, plain)
    assert answer["ratios"] == {"frames_per_second": 10.0, "cpu_time": 10.0, "generate": 2.0}
    assert answer["plain"]["frames_per_second"] == {"median": 2.5, "min": 1.25, "max": 5.0}


def test_scaling_writes_json_and_charts(tmp_path):
    answer, code = run(tmp_path, "scaling", "--longest", "1")
    assert code == 0, answer
    assert json.loads((tmp_path / "out" / "scaling.json").read_text("utf-8")) == answer
    assert [row["frames"] for row in answer["load"]] == [1, 3]
    assert [row["template"] for row in answer["resolution"]] == ["image", "video"]
    assert [row["frames"] for row in answer["length"]] == [25]
    assert [Path(chart).name for chart in answer["charts"]] == ["length.png", "resolution.png", "load.png"]
    assert all(read_image(chart).ndim == 3 for chart in answer["charts"])


@pytest.mark.parametrize(
    "flags",
    ["--engine sleep:x", "--engine sleep:-1", "--engine nosuch", "--size 9", "--runs 0", "--frames 0"],
)
def test_values_that_make_no_sense_are_refused(tmp_path, flags):
    answer, code = run(tmp_path, "pipeline", "--frames", "5", "--runs", "1", *flags.split())
    assert code == 3 and not answer["success"]


@pytest.mark.parametrize(("text", "milliseconds"), [("null", 0), ("sleep:8", 8), ("sleep:0.5", 0.5)])
def test_stand_in_engines_are_named_by_their_milliseconds(text, milliseconds):
    assert parse_stand_in(text) == milliseconds
    assert StandInEngine(milliseconds).name == text


def test_real_engines_are_no_stand_ins():
    assert parse_stand_in("lite") is None


def test_endless_sleep_is_refused():
    with pytest.raises(InputError):
        parse_stand_in("sleep:inf")


@pytest.mark.parametrize("frames", [1, 190, 400])
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30_000, 1001)])
def test_speech_is_as_long_as_the_frames(tmp_path, frames, fps):
    n_samples = sum(len(block) for block in read_waveform(write_speech(tmp_path / "s.wav", frames, fps)))
    assert n_samples * fps // 16_000 == frames


def test_swaying_faces_stay_in_their_boxes():
    scene = make_scene("video", (256, 256))
    still = make_scene("image", (256, 256))
    x1, y1, x2, y2 = still.bboxes[0]
    for frame, (left, top, right, bottom) in zip(scene.frames, scene.bboxes, strict=True):
        assert (right - left, bottom - top) == (x2 - x1, y2 - y1)
        difference = frame[top:bottom, left:right].astype(float) - still.frames[0][y1:y2, x1:x2]
        assert np.abs(difference).mean() < 10
    assert len(set(scene.bboxes)) > 1


def test_plain_way_shows_what_the_pipeline_shows(tmp_path):
    scene = make_scene("video", (256, 192))
    audio, fps = write_speech(tmp_path / "s.wav", 20, Fraction(25)), Fraction(25)
    renderer = benchmark.open_renderer("null", scene, tmp_path, EngineConfig(), EncodingConfig())
    renderer.ultra_fast_inference(benchmark.TEMPLATE_ID, audio, tmp_path / "ours.mp4", fps)
    template = renderer.open(benchmark.TEMPLATE_ID).template
    render_plainly(template, StandInEngine(0), audio, tmp_path / "plain.mp4", fps, 4, "ultrafast")
    ours, plain = (np.stack(list(read_video(tmp_path / f"{way}.mp4"))) for way in ("ours", "plain"))
    assert len(ours) == len(plain) == 20
    distances = np.abs(ours[:, None].astype(np.int16) - plain[None]).mean(axis=(2, 3, 4))
    assert distances.diagonal().max() < 6  # the plain way encodes twice
    shown = [template.bboxes[template.position(i, fps)] for i in range(20)]
    assert [shown[nearest] for nearest in distances.argmin(axis=1)] == shown and len(set(shown)) > 4


def test_whole_frame_blend_equals_the_compositor():
    random = np.random.default_rng(5)
    template = make_template(make_scene("image", (256, 256)))
    bbox, mask, crop = template.bboxes[0], template.masks[0], template.crop_boxes[0]
    shape = (bbox[3] - bbox[1], bbox[2] - bbox[0], 3)
    face = random.integers(0, 256, shape, dtype=np.uint8)
    plain = blend_whole_frame(template.frames[0], face, bbox, mask, crop)
    np.testing.assert_array_equal(plain, paste_back(template.frames[0], face, bbox, mask, crop))
