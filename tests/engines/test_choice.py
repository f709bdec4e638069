"""Which engine runs, with all, some and none of the files."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from musetalk import config
from musetalk.config import REPOSITORY, EngineConfig, EngineRequest, ModelPaths
from musetalk.engines import choice
from musetalk.engines.choice import available_engines, choose_engine
from musetalk.errors import CacheError, EngineError, WeightsError
from musetalk.weights import files as weight_files

ALL_FILES = (
    *("musetalkV15/musetalk.json", "musetalkV15/unet.pth"),
    *("sd-vae/config.json", "sd-vae/diffusion_pytorch_model.bin"),
    *("whisper/config.json", "whisper/pytorch_model.bin"),
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and repository without weights; MuseTalk's packages look installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "REPOSITORY", tmp_path)
    monkeypatch.setattr(choice, "MUSETALK_PACKAGES", ())
    return tmp_path


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def choose(request: EngineRequest = "auto", template: str | None = None, **paths: Path | str) -> str:
    return choose_engine(EngineConfig(engine=request, models=ModelPaths(**paths)), template)


def test_auto_takes_musetalk_when_every_file_is_there(root: Path) -> None:
    put(root, *ALL_FILES)
    assert choose() == "musetalk"


@pytest.mark.parametrize("present", [ALL_FILES[:-1], ALL_FILES[1:], ()])
def test_auto_takes_lite_and_says_so_once_when_a_file_is_missing(
    root: Path, caplog: pytest.LogCaptureFixture, present: tuple[str, ...]
) -> None:
    put(root, *present)
    with caplog.at_level(logging.WARNING):
        assert choose() == "lite"
    (record,) = caplog.records
    missing = next(name for name in ALL_FILES if name not in present)
    assert "lite" in record.getMessage() and Path(missing).parent.name in record.getMessage()


def test_auto_takes_lite_when_the_packages_are_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, *ALL_FILES)
    monkeypatch.setattr(choice, "MUSETALK_PACKAGES", ("no_such_package",))
    assert choose() == "lite"
    with pytest.raises(EngineError, match="no_such_package"):
        choose("musetalk")


@pytest.mark.parametrize("template", [None, "lite", "musetalk"])
def test_a_named_path_that_is_missing_is_an_error_never_a_fallback(root: Path, template: str | None) -> None:
    put(root, *ALL_FILES)
    with pytest.raises(WeightsError, match=r"nowhere\.pth") as error:
        choose(template=template, unet_model_path=Path("models/nowhere.pth"))
    assert error.value.exit_code == 5
    for named in ({"vae_type": "other-vae"}, {"whisper_dir": Path("x")}, {"unet_config": Path("y.json")}):
        with pytest.raises(WeightsError):
            choose(**named)


def test_named_paths_that_are_there_dont_hide_that_others_are_missing(root: Path) -> None:
    put(root, "whisper/config.json", "whisper/pytorch_model.bin")
    assert choose(whisper_dir=Path("models/whisper")) == "lite"


def test_an_engine_that_is_asked_for_by_name_never_becomes_another(root: Path) -> None:
    with pytest.raises(WeightsError) as error:
        choose("musetalk")
    assert "unet.pth" in error.value.message and weight_files.DOWNLOAD_COMMAND in error.value.hint
    put(root, *ALL_FILES)
    assert choose("lite") == "lite"


def test_at_inference_auto_is_the_engine_that_made_the_cache(root: Path) -> None:
    with pytest.raises(WeightsError):
        choose(template="musetalk")
    put(root, *ALL_FILES)
    assert choose(template="lite") == "lite"
    assert choose(template="musetalk") == "musetalk"


@pytest.mark.parametrize(("request_name", "template"), [("lite", "musetalk"), ("musetalk", "lite")])
def test_a_cache_of_another_engine_than_the_one_asked_for_is_refused(
    root: Path, request_name: EngineRequest, template: str
) -> None:
    put(root, *ALL_FILES)
    with pytest.raises(CacheError) as error:
        choose(request_name, template)
    assert error.value.exit_code == 6 and "--force_refresh" in error.value.hint


def test_an_unknown_engine_in_the_metadata_is_a_cache_error(root: Path) -> None:
    with pytest.raises(CacheError, match="wav2lip"):
        choose(template="wav2lip")


def test_what_could_run_is_told_with_what_is_missing(root: Path) -> None:
    musetalk, lite = available_engines()
    assert (musetalk.name, musetalk.available, lite.available) == ("musetalk", False, True)
    assert "unet.pth" in musetalk.reason
    put(root, *ALL_FILES)
    assert available_engines()[0].available


def test_lite_is_not_available_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LITE_PACKAGES", ("numpy", "no_such_package"))
    lite = available_engines()[1]
    assert not lite.available and "no_such_package" in lite.reason


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the full environment")
def test_choosing_imports_no_framework() -> None:
    code = (
        "import sys; from musetalk.config import EngineConfig; from musetalk.engines.choice import *;"
        "from musetalk.engines.choice import choose_engine, engine_fingerprint;"
        "name = choose_engine(EngineConfig()); engine_fingerprint(name, EngineConfig());"
        "print(sorted({'torch', 'cv2', 'transformers', 'diffusers', 'mediapipe'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
