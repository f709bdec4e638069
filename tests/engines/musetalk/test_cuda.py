"""What only a card can show: the same faces as the CPU's, in every way the engine runs there.

These tests run wherever torch can use an NVIDIA card and are skipped, with the reason, elsewhere.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.config import EngineConfig
from musetalk.errors import DeviceError
from tests.engines.conftest import NEEDS_FULL, latent_template, model_paths

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("diffusers", reason=NEEDS_FULL)

from musetalk.engines.base import FaceFrame, hear_all  # noqa: E402
from musetalk.engines.choice import create_engine  # noqa: E402
from musetalk.engines.musetalk.engine import MuseTalkEngine  # noqa: E402

pytestmark = pytest.mark.cuda

PROMPTS = np.random.RandomState(3).randn(6, 20, 384).astype(np.float32)
HALF_LEVELS = 4.0  # mean difference that half precision may make on random networks


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision that keeps all its digits, as the CPU's does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def engine_on(device: str, models: Path, **settings: Any) -> MuseTalkEngine:
    config = EngineConfig(engine="musetalk", device=device, models=model_paths(models), **settings)
    engine = create_engine("musetalk", config, device)
    assert isinstance(engine, MuseTalkEngine) and engine.device == device
    return engine


def faces(device: str, models: Path, **settings: Any) -> np.ndarray:
    generator = engine_on(device, models, **settings).open(latent_template())
    return np.stack(generator.generate(PROMPTS, [0, 1, 2, 3, 0, 1])).astype(int)


@pytest.mark.parametrize("region", ["off", "on"])
def test_single_precision_gives_the_cpus_faces(tiny_models: Path, region: Any) -> None:
    found, expected = (
        faces(device, tiny_models, fp16=False, vae_region=region) for device in ("cuda:0", "cpu")
    )
    assert (np.abs(found - expected) <= 1).mean() >= 0.995


@pytest.mark.parametrize("region", ["off", "on"])
def test_half_precision_is_near_the_cpus_faces(tiny_models: Path, region: Any) -> None:
    found = faces("cuda:0", tiny_models, vae_region=region)
    assert np.abs(found - faces("cpu", tiny_models, fp16=False, vae_region=region)).mean() <= HALF_LEVELS


@pytest.mark.parametrize("region", ["off", "on"])
def test_compiled_networks_give_the_same_faces(tiny_models: Path, region: Any) -> None:
    plain, compiled = (
        faces("cuda:0", tiny_models, fp16=False, vae_region=region, compile=c) for c in (False, True)
    )
    assert (np.abs(compiled - plain) <= 1).mean() >= 0.995


def test_latents_and_prompts_are_the_cpus(tiny_models: Path) -> None:
    crop = np.random.RandomState(3).randint(0, 256, (256, 256, 3), np.uint8)
    face = FaceFrame(crop, (0, 0, 256, 256), np.zeros((68, 2), np.float32), None)
    tone = np.sin(np.arange(16_000) / 20).astype(np.float32)
    card, cpu = (engine_on(device, tiny_models, fp16=False) for device in ("cuda:0", "cpu"))
    np.testing.assert_allclose(next(card.encode([face])), next(cpu.encode([face])), atol=2e-3)
    found, expected = (next(hear_all(engine.listen(Fraction(25)), [tone])) for engine in (card, cpu))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_batch_that_does_not_fit_is_halved_and_its_memory_given_back(tiny_models: Path) -> None:
    generator = engine_on("cuda:0", tiny_models).open(latent_template())
    predict = generator.runtime.predict

    def limited(latents: Any, prompts: Any) -> Any:
        if len(latents) > 1:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")  # a petabyte
        return predict(latents, prompts)

    generator.runtime.predict = limited  # type: ignore[method-assign]
    assert len(generator.generate(PROMPTS, [0, 1, 2, 3, 0, 1])) == 6
    assert generator.limit.size == 1


def test_a_card_without_room_for_one_face_says_what_to_do(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on("cuda:0", tiny_models)
    generator = engine.open(latent_template())

    def too_much(*_: object) -> Any:
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")

    monkeypatch.setattr(engine.runtime, "predict", too_much)
    with pytest.raises(DeviceError, match="batch size 1") as error:
        generator.generate(PROMPTS[:1], [0])
    assert error.value.exit_code == 5


def test_counting_devices_leaves_forked_processes_able_to_use_them() -> None:
    import subprocess
    import sys

    code = (
        "import multiprocessing, musetalk.device as d\n"
        "assert d.cuda_device_count()\n"
        "def child():\n    assert d.usable_by_torch('cuda:0', strict=True) == 'cuda:0'\n"
        "p = multiprocessing.get_context('fork').Process(target=child); p.start(); p.join()\n"
        "raise SystemExit(p.exitcode)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
