"""The networks through OpenVINO: the same numbers, converted once, safe against others converting."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.config import REPOSITORY, EngineConfig
from musetalk.engines.base import Engine, Listener, TemplateJudge, hear_all
from musetalk.engines.choice import create_engine
from musetalk.engines.musetalk import openvino_conversion, openvino_runtime
from musetalk.engines.musetalk.engine import MuseTalkEngine
from musetalk.engines.musetalk.openvino_runtime import OpenVinoRuntime
from musetalk.engines.musetalk.torch_runtime import TorchRuntime
from musetalk.errors import EngineError
from musetalk.templates.template import Template
from tests.engines.conftest import NEEDS_FULL, latent_template, model_paths

pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("openvino", reason=NEEDS_FULL)


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_models, tmp_path_factory.mktemp("openvino") / "models 模型")


def faces(models: Path, runtime: str, template: Template | None = None, **settings: Any) -> np.ndarray:
    config = EngineConfig(
        engine="musetalk", models=model_paths(models), fp16=False, runtime=runtime, **settings
    )
    engine = create_engine("musetalk", config, "cpu")
    prompts = np.random.RandomState(3).randn(3, 20, 384).astype(np.float32)
    return np.stack(engine.open(template or latent_template()).generate(prompts, [0, 1, 0]))


def settings(models: Path) -> EngineConfig:
    return EngineConfig(engine="musetalk", models=model_paths(models), fp16=False)


def auto_engine(models: Path) -> MuseTalkEngine:
    engine = create_engine("musetalk", settings(models), "cpu")
    assert isinstance(engine, MuseTalkEngine) and isinstance(engine.runtime, OpenVinoRuntime)
    return engine


def listening(engine: Engine) -> Listener:
    return engine.listen(Fraction(25))


def test_openvino_gives_torchs_frames_and_converts_once(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = faces(models, "torch")
    found = faces(models, "openvino")
    assert (np.abs(found.astype(int) - expected) <= 1).mean() >= 0.999

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(openvino_conversion, "_convert", never)
    np.testing.assert_array_equal(faces(models, "openvino"), found)


WITHOUT_TORCH = """
import sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from musetalk.config import REPOSITORY, EngineConfig
from musetalk.engines.base import hear_all
from musetalk.engines.choice import create_engine
from tests.engines.conftest import latent_template, model_paths

paths = model_paths(Path(sys.argv[1]))
engine = create_engine("musetalk", EngineConfig("musetalk", models=paths, runtime="openvino"), "cpu")
prompts = next(hear_all(engine.listen(Fraction(25)), [np.zeros(16_000, np.float32)]))
assert engine.open(latent_template()).generate(prompts[:2], [0, 1])[1].any()
print("torch" in sys.modules)
"""


def test_converted_networks_run_without_torch(models: Path, tmp_path: Path) -> None:
    script = tmp_path / "without_torch.py"
    script.write_text(WITHOUT_TORCH, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    said = [
        subprocess.run(
            [sys.executable, str(script), str(models)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said == ["True", "False"]  # the first converts the networks, from torch's


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied", "openvino"), ImportError("libopenvino.so: Permission denied")],
)
def test_auto_goes_on_with_torch_where_openvino_cant(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def unusable(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr(openvino_runtime, "WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(openvino_runtime, "converted_path", unusable)
    np.testing.assert_array_equal(faces(models, "auto"), faces(models, "torch"))
    assert "going on with torch" in caplog.text
    with pytest.raises(EngineError, match="Permission denied"):
        faces(models, "openvino")


def test_auto_goes_on_with_torch_for_all_who_open_at_once(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_runtime, "WORTHWHILE_BYTES", 1)
    engine = auto_engine(models)
    begun, asked, decoder = threading.Barrier(2), itertools.count(), OpenVinoRuntime.decoder

    def together(self: OpenVinoRuntime, *wanted: Any, **how: Any) -> Any:
        begun.wait(60)
        return decoder(self, *wanted, **how)

    def read_only(*_: object, **__: object) -> Path:
        if next(asked):  # the other one has gone on with torch already
            while isinstance(engine.runtime, OpenVinoRuntime):
                pass
        raise PermissionError(13, "Permission denied", "openvino")

    monkeypatch.setattr(OpenVinoRuntime, "decoder", together)
    monkeypatch.setattr(openvino_runtime, "converted_path", read_only)
    with ThreadPoolExecutor(2) as threads:
        opening = [threads.submit(engine.open, latent_template()) for _ in range(2)]
    assert all(isinstance(opened.result().runtime, TorchRuntime) for opened in opening)


def test_auto_hears_with_torch_where_openvino_cant_and_open_templates_go_on(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_runtime, "WORTHWHILE_BYTES", 1)
    engine = auto_engine(models)
    generator = engine.open(latent_template())
    prompts = np.random.RandomState(3).randn(2, 20, 384).astype(np.float32)
    shown = generator.generate(prompts, [0, 1])

    def read_only(*_: object, **__: object) -> Path:
        raise PermissionError(13, "Permission denied", "openvino")

    monkeypatch.setattr(openvino_runtime, "converted_path", read_only)
    heard = [next(hear_all(listening(engine), [np.zeros(16_000, np.float32)])) for _ in range(2)]
    torchs = create_engine("musetalk", dataclasses.replace(settings(models), runtime="torch"), "cpu")
    expected = next(hear_all(listening(torchs), [np.zeros(16_000, np.float32)]))
    assert all((one == expected).all() for one in heard)
    assert (np.stack(generator.generate(prompts, [0, 1])) == np.stack(shown)).all()


def test_a_region_through_openvino_gives_torchs_pixels(models: Path) -> None:
    expected, found = (faces(models, runtime, vae_region="on") for runtime in ("torch", "openvino"))
    assert (expected[:, :100] == 0).all()  # the upper part of the face is left away
    assert (np.abs(found.astype(int) - expected) <= 1).mean() >= 0.999


def judged(models: Path, monkeypatch: pytest.MonkeyPatch, runtime: str = "torch") -> dict[str, Any]:
    """The verdict of engine musetalk on `latent_template`, the tiny networks taken for large ones."""
    monkeypatch.setattr("musetalk.engines.musetalk.engine.WORTHWHILE_BYTES", 1)
    config = EngineConfig(engine="musetalk", models=model_paths(models), fp16=False, runtime=runtime)
    engine = create_engine("musetalk", config, "cpu")
    assert isinstance(engine, TemplateJudge)
    return engine.judge(latent_template())


def test_a_recorded_verdict_decides_what_is_decoded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = latent_template()
    found = {**judged(models, monkeypatch)["vae_region"], "harmless": True}
    harmless = dataclasses.replace(template, region_verdict=found)
    whole, part = faces(models, "torch", template), faces(models, "torch", harmless)
    assert (part[:, :100] == 0).all() and whole[:, :100].any()
    np.testing.assert_array_equal(faces(models, "torch", harmless, vae_region="off"), whole)


UNUSABLE = (None, [], "x", {"harmless": True}, {"harmless": True, "networks": "other"})


@pytest.mark.parametrize("verdict", UNUSABLE)
def test_a_damaged_verdict_or_one_on_other_networks_is_no_verdict(models: Path, verdict: object) -> None:
    template = dataclasses.replace(latent_template(), region_verdict=verdict)
    np.testing.assert_array_equal(faces(models, "torch", template), faces(models, "torch"))


def test_where_memory_is_missing_nothing_is_judged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from musetalk.engines.musetalk import engine

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(engine, "difference", out_of_memory)
    assert judged(models, monkeypatch) == {}


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_preprocessing_judges_large_networks(
    models: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    config = EngineConfig(engine="musetalk", models=model_paths(models), fp16=False, runtime=runtime)
    engine = create_engine("musetalk", config, "cpu")
    assert isinstance(engine, TemplateJudge)
    assert engine.judge(latent_template()) == {}
    verdict = judged(models, monkeypatch, runtime)["vae_region"]
    assert verdict.keys() == {"harmless", "share", "mean", "tail", "largest", "networks"}
    assert 0 < verdict["mean"] < verdict["tail"] <= verdict["largest"]
    assert verdict["networks"].endswith("float32")
    off = create_engine("musetalk", dataclasses.replace(config, vae_region="off"), "cpu")
    assert isinstance(off, TemplateJudge) and off.judge(latent_template()) == {}


def conversion(folder: Path) -> openvino_conversion.Conversion:
    from torch import nn

    source = folder / "net.pth"
    source.write_bytes(b"weights")
    example = np.zeros((1, 3), np.float32)
    return openvino_conversion.Conversion("net", [source], lambda: nn.Linear(3, 2), [example], [(-1, 3)])


def test_concurrent_first_runs_convert_once_and_leave_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, convert, calls = conversion(tmp_path), openvino_conversion._convert, []

    def counted(*arguments: object, **settings: bool) -> None:
        calls.append(1)
        convert(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(openvino_conversion, "_convert", counted)
    threads = [
        threading.Thread(target=openvino_conversion.converted_path, args=(network,), kwargs={"half": False})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert {path.suffix for path in (tmp_path / "openvino").iterdir()} <= {".xml", ".bin", ".lock"}


def test_other_weights_are_converted_anew(tmp_path: Path) -> None:
    network = conversion(tmp_path)
    first = openvino_conversion.converted_path(network, half=False)
    network.sources[0].write_bytes(b"retrained")
    assert openvino_conversion.converted_path(network, half=False) != first


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openvino, "save_model", full_disk)
    with pytest.raises(EngineError, match="No space left") as error:
        openvino_runtime.CompiledNetwork(conversion(tmp_path), "float32")
    assert "--runtime torch" in error.value.hint
    assert not list((tmp_path / "openvino").glob("*.xml")) + list((tmp_path / "openvino").glob("*.bin"))


def test_auto_takes_openvino_for_large_networks_on_a_cpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "unet.pth"
    weights.write_bytes(b"small")
    assert openvino_runtime.choose_runtime("openvino", "cpu", weights)
    assert not openvino_runtime.choose_runtime("auto", "cpu", weights)
    monkeypatch.setattr(openvino_runtime, "WORTHWHILE_BYTES", 1)
    assert openvino_runtime.choose_runtime("auto", "cpu", weights)
    assert not openvino_runtime.choose_runtime("auto", "cuda:0", weights)
    assert not openvino_runtime.choose_runtime("torch", "cpu", weights)
    with pytest.raises(EngineError, match="cuda:0"):
        openvino_runtime.choose_runtime("openvino", "cuda:0", weights)
