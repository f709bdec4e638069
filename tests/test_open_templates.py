"""Templates stay open, engines stay loaded, and both follow what changes on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import pytest

from musetalk import device
from musetalk.config import EngineConfig, ModelPaths
from musetalk.engines.registry import KEPT_ENGINES, EngineRegistry
from musetalk.errors import DeviceError
from musetalk.inference import UltraFastRealtimeInference
from musetalk.open_templates import OpenTemplates
from musetalk.service import IntegratedMuseTalkService
from musetalk.templates.store import TemplateStore
from tests.conftest import make_template
from tests.test_rendering import HeldUpFaces, NumberedFaces

METADATA = {"engine": "lite", "engine_fingerprint": "numbered", "version": "2.0"}


def publish(store: TemplateStore, template_id: str, n_frames: int = 3) -> None:
    with store.lock(template_id):
        store.publish(
            template_id, make_template(n_frames, (96, 64)), {"template_id": template_id, **METADATA}
        )


@pytest.fixture
def made() -> list[NumberedFaces]:
    """The engines that were made, in order."""
    return []


@pytest.fixture
def engines(made: list[NumberedFaces]) -> EngineRegistry:
    class Engine(NumberedFaces):
        def open(self, template):
            return self

    def create(*_: object) -> Engine:
        made.append(Engine())
        return made[-1]

    return EngineRegistry(create)


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    store = TemplateStore(tmp_path / "cache")
    for name in ("a", "b"):
        publish(store, name)
    return store


def test_switching_templates_loads_one_engine_and_opens_each_once(store, engines, made):
    renderer = UltraFastRealtimeInference(store.cache_dir, engines=engines)
    opened = [renderer.open(name) for name in ("a", "b", "a", "b")]
    assert len(made) == 1
    assert opened[0] is opened[2] is not opened[1] is opened[3]


def test_a_legacy_cache_is_opened_once_and_again_when_it_changed(store, engines):
    legacy = json.loads(store.metadata_path("a").read_text())
    for key in ("pkl_sha256", "schema_version", "pkl_size"):
        del legacy[key]
    store.metadata_path("a").write_text(json.dumps(legacy | {"version": "1.0"}))
    renderer = UltraFastRealtimeInference(store.cache_dir, engines=engines)
    first = renderer.open("a")
    assert renderer.open("a") is first
    shutil.copy(store.pickle_path("b"), store.pickle_path("a"))
    assert renderer.open("a") is not first


def test_the_least_recently_used_are_closed_when_memory_runs_short(store, engines):
    publish(store, "c")
    one = UltraFastRealtimeInference(store.cache_dir, engines=engines).open("a").nbytes
    renderer = UltraFastRealtimeInference(store.cache_dir, engines=engines, templates=OpenTemplates(2 * one))
    opened = {name: renderer.open(name) for name in ("a", "b", "a", "c")}
    assert [kept.template for kept in renderer.templates.templates()] == [
        opened["a"].template,
        opened["c"].template,
    ]


def test_a_template_whose_generator_is_held_up_is_opened_anew(store, write_tone, tmp_path):
    class Engine(HeldUpFaces):
        def open(self, template):
            return HeldUpFaces()

    renderer = UltraFastRealtimeInference(store.cache_dir, engines=EngineRegistry(lambda *_: Engine()))
    first = renderer.open("a")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(renderer, first, write_tone(64_000), tmp_path)
    second = renderer.open("a")
    first.generator.let_go.set()
    assert first.abandoned and second is not first and second.generator is not first.generator


def _interrupted(renderer, opened, audio, folder) -> None:
    """A request that Ctrl-C ends once its generator is held up."""
    compose = opened.compositor.compose_i420

    def interrupt(*arguments):
        compose(*arguments)
        raise KeyboardInterrupt

    opened.compositor.compose_i420 = interrupt
    renderer.ultra_fast_inference("a", audio, folder / "out.mp4")


def test_threads_that_ask_at_once_share_one_load(store, engines, made):
    renderer = UltraFastRealtimeInference(store.cache_dir, engines=engines)
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(renderer.open("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len({id(one) for one in opened}) == 1 and len(opened) == 8


def test_preprocessing_and_inference_share_the_engine(tmp_path, portrait, speech):
    made = []

    def create(name, config, device):
        from musetalk.engines.choice import create_engine

        made.append(create_engine(name, config, device))
        return made[-1]

    service = IntegratedMuseTalkService(
        tmp_path, config=EngineConfig(engine="lite"), engines=EngineRegistry(create)
    )
    for name in ("a", "b"):
        service.preprocess_template(name, portrait)
        service.realtime_inference(name, speech, tmp_path / f"{name}.mp4")
    assert len(made) == 1


def _weights(folder: Path, content: bytes) -> ModelPaths:
    paths = ModelPaths(unet_config=folder / "u.json", unet_model_path=folder / "u.pth", whisper_dir=folder)
    for name in ("u.json", "u.pth"):
        (folder / name).write_bytes(content)
    return paths


def test_other_settings_or_weights_make_another_engine_and_few_are_kept(tmp_path, engines, made):
    models = _weights(tmp_path, b"1")
    config = EngineConfig(models=models)
    first = engines.engine("musetalk", config, "cpu")
    assert engines.engine("musetalk", EngineConfig(batch_size=2, models=models), "cpu") is first
    assert engines.engine("musetalk", EngineConfig(fp16=False, models=models), "cpu") is not first
    assert engines.engine("musetalk", config, "cpu") is first
    _weights(tmp_path, b"22")
    assert engines.engine("musetalk", config, "cpu") is not first
    assert len(made) == 3 and len(engines.engines()) == KEPT_ENGINES


def test_a_strict_request_is_refused_although_a_laxer_one_loaded_the_engine(
    tmp_path, engines, made, monkeypatch
):
    monkeypatch.setattr(device, "_torchs_complaint", lambda _device: "no kernel image for this card")
    config = EngineConfig(models=_weights(tmp_path, b"1"))
    engines.engine("musetalk", config, "cuda:0")
    with pytest.raises(DeviceError, match="no kernel image"):
        engines.engine("musetalk", dataclasses.replace(config, strict_device=True), "cuda:0")
    assert len(made) == 1
