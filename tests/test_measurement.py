"""Medians, spreads and the documented keys of repeated requests."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from musetalk.benchmark.scene import StandInEngine
from musetalk.cli import execute, inference_main
from musetalk.device import Device
from musetalk.engines import registry
from musetalk.errors import InputError
from musetalk.file_rendering import InferenceResult
from musetalk.inference import UltraFastRealtimeInference
from musetalk.measurement import Measurement, Spread, measure, significant
from musetalk.measurement_chart import draw_stages, merged
from musetalk.media.image import read_image
from musetalk.media.video import read_video
from musetalk.templates.store import TemplateStore
from tests.conftest import make_template

DOCUMENTED = {
    "runs",
    "frames",
    "frames_per_second",
    "realtime_factor",
    "time_to_first_frame",
    "engine_utilisation",
    "stages",
    "peak_memory_mb",
    "hardware",
    "success",
    "template_id",
    "engine",
    "device",
    "dtype",
    "message",
}


def result(seconds: float, generate: float = 1.0) -> InferenceResult:
    return InferenceResult(
        template_id="t",
        audio_path="a.wav",
        output_path="o.mp4",
        fps=Fraction(25),
        frames=100,
        duration=4.0,
        processing_time=seconds,
        time_to_first_frame=seconds / 10,
        stages={"encode": 0.5, "generate": generate},
        intervals={"generate": [(0.0, generate)]},
        engine="lite",
        device=Device("cpu", "auto"),
        dtype="float32",
    )


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A cached template, rendered by a stand-in engine."""
    store = TemplateStore(tmp_path / "cache")
    metadata = {"template_id": "t", "engine": "lite", "engine_fingerprint": "stand-in", "version": "2.0"}
    with store.lock("t"):
        store.publish("t", make_template(2, (96, 64)), metadata)
    monkeypatch.setattr(registry, "create_engine", lambda *_: StandInEngine(1))
    return tmp_path


def benchmark(workplace, audio, *more: str):
    template = ["--template_id", "t", "--cache_dir", str(workplace / "cache")]
    files = ["--audio_path", str(audio), "--output_path", str(workplace / "out 视频.mp4")]
    return execute(inference_main, ["--benchmark", *template, *files, *more])


def test_figures_are_medians_with_their_spread():
    answer = Measurement([result(2.0), result(1.0), result(4.0)], [1.0, 3.0, 2.0], 5.0, 7.0, None).answer()
    assert answer["processing_time"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert answer["frames_per_second"] == {"median": 50.0, "min": 25.0, "max": 100.0}
    assert answer["realtime_factor"] == {"median": 0.5, "min": 0.25, "max": 1.0}
    assert answer["engine_utilisation"] == {"median": 0.5, "min": 0.25, "max": 1.0}
    assert answer["cpu_time"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert list(answer["stages"]) == ["generate", "encode"]
    assert answer["runs"] == 3


def test_stage_that_some_runs_lack_counts_as_nothing():
    other = result(1.0)
    other.stages["load"] = 0.2
    assert Measurement([result(1.0), other], [1, 1], 0, 2, None).stages["load"] == Spread(0.1, 0.0, 0.2)


def test_typical_run_is_the_median_one():
    runs = [result(3.0), result(1.0), result(2.0), result(9.0)]
    assert Measurement(runs, [1] * 4, 0, 15, None).typical.processing_time == 2.0


def test_table_has_a_line_per_figure():
    table = Measurement([result(2.0)], [1.0], 0, 2, None).table()
    assert table[0].split() == ["median", "min", "max"]
    assert table[1].split() == ["frames/s", *["50.000"] * 3]
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("value", "rounded"), [(0, 0), (1234.567, 1235), (0.00123456, 0.001235), (-98.7654, -98.77)]
)
def test_figures_keep_four_digits(value, rounded):
    assert significant(value) == rounded


def test_warm_up_is_not_counted():
    calls = iter([result(9.0), result(1.0), result(2.0)])
    assert measure(lambda: next(calls), 2).spread(lambda r: r.processing_time) == Spread(1.5, 1.0, 2.0)
    assert next(calls, None) is None


def test_what_happens_between_runs_is_not_measured():
    order: list[str] = []

    def render() -> InferenceResult:
        order.append("run")
        return result(1.0)

    measurement = measure(render, 2, lambda: order.append("between"))
    assert order == ["run", "between", "run", "between", "run"] and len(measurement.results) == 2


@pytest.mark.parametrize("runs", [0, -1])
def test_fewer_than_one_run_is_refused(runs):
    with pytest.raises(InputError):
        measure(lambda: result(1.0), runs)


def test_benchmark_answers_the_documented_keys(workplace, write_tone, capsys):
    answer, code = benchmark(workplace, write_tone(16_000), "--benchmark_runs", "2")
    assert code == 0 and answer.keys() >= DOCUMENTED
    assert answer["runs"] == 2 and answer["frames"] == 25 == len(list(read_video(answer["output_path"])))
    assert set(answer["stages"]) == {"load", "features", "generate", "composite", "encode"}
    assert 0 < answer["engine_utilisation"]["median"] < 1
    assert answer["stages"]["generate"]["min"] >= 0.025
    assert 2 * answer["processing_time"]["min"] <= answer["measured_time"]
    assert {"cpu", "cores"} <= answer["hardware"].keys()
    assert json.loads(json.dumps(answer)) == answer
    assert "frames/s" in capsys.readouterr().err
    assert read_image(answer["chart_path"]).shape[0] > 100


@pytest.mark.parametrize(
    ("flags", "code"), [(["--benchmark_runs", "0"], 3), (["--frames_dir", "f"], 2), (["--fps", "0"], 3)]
)
def test_benchmark_that_makes_no_sense_is_refused(workplace, write_tone, flags, code):
    answer, got = benchmark(workplace, write_tone(16_000), *flags)
    assert got == code and not answer["success"]
    assert not (workplace / "out 视频.mp4").exists()


def test_python_callers_get_the_same_answer(workplace, write_tone):
    renderer = UltraFastRealtimeInference(workplace / "cache")
    answer = renderer.benchmark_performance("t", write_tone(16_000), runs=1)
    assert answer.keys() >= DOCUMENTED and answer["runs"] == 1


def test_close_intervals_become_one():
    assert merged([(3.0, 4.0), (0.0, 1.0), (1.05, 2.0)], gap=0.1) == [(0.0, 2.0), (3.0, 4.0)]


def test_without_matplotlib_there_is_a_warning_and_no_chart(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert draw_stages({"generate": [(0.0, 1.0)]}, "", tmp_path / "c.png") is None
    assert "matplotlib" in caplog.text and not list(tmp_path.iterdir())
