"""The classes that earlier programs import from the three scripts, used as those programs use them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from enhanced_musetalk_preprocessing import EnhancedMuseTalkPreprocessor
from integrated_musetalk_service import IntegratedMuseTalkService
from musetalk.errors import CacheError, CacheMissingError
from musetalk.media.image import read_image
from musetalk.media.video import read_video
from tests.conftest import PORTRAIT
from ultra_fast_realtime_inference import UltraFastRealtimeInference

KEYS = {
    *("frame_list_cycle", "coord_list_cycle", "input_latent_list_cycle", "mask_list_cycle"),
    *("mask_coords_list_cycle", "original_bbox", "processed_at"),
}
FILES = ("_preprocessed.pkl", "_metadata.json", "_preview.jpg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the templates `anna (2)` and `小哈`, and a file that is no template."""
    folder = tmp_path_factory.mktemp("缓存 cache")
    preprocessor = EnhancedMuseTalkPreprocessor(cache_dir=str(folder), device="cpu")
    preprocessor.preprocess_template("小哈", str(PORTRAIT))
    preprocessor.preprocess_template("anna (2)", str(PORTRAIT.with_name("hopper.jpg")), bbox_shift=4)
    (folder / "notes_metadata.txt").write_text("mine")
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy of those templates to change."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in made.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_loaded_template_is_the_dict_that_plain_pickle_reads(made: Path) -> None:
    data, metadata = EnhancedMuseTalkPreprocessor(made).load_preprocessed_template("小哈")
    assert data.keys() == KEYS
    with (made / "小哈_preprocessed.pkl").open("rb") as stream:
        plain = pickle.load(stream)
    for key in ("frame_list_cycle", "input_latent_list_cycle", "mask_list_cycle"):
        assert len(data[key]) == len(plain[key]) == 2
        for ours, theirs in zip(data[key], plain[key], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert data["coord_list_cycle"] == [tuple(box) for box in plain["coord_list_cycle"]]
    assert metadata == json.loads((made / "小哈_metadata.json").read_text("utf-8"))


def test_a_loaded_template_shows_the_portrait_and_its_face(made: Path) -> None:
    data, metadata = EnhancedMuseTalkPreprocessor(made).load_preprocessed_template("小哈")
    np.testing.assert_array_equal(data["frame_list_cycle"][0], read_image(PORTRAIT))
    assert data["frame_list_cycle"][0] is data["frame_list_cycle"][1]
    assert metadata["bbox"] == list(data["original_bbox"]) == list(data["coord_list_cycle"][0])
    x1, y1, x2, y2 = data["mask_coords_list_cycle"][0]
    assert data["mask_list_cycle"][0].shape == (y2 - y1, x2 - x1)
    x, y = 224, 120  # on the nose of the portrait
    assert x1 < metadata["bbox"][0] < x < metadata["bbox"][2] < x2 and metadata["bbox"][1] < y


def test_a_template_that_is_not_there_or_damaged_is_not_loaded(cache: Path) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(cache)
    with pytest.raises(CacheMissingError, match="模板缓存不存在: nobody"):
        preprocessor.load_preprocessed_template("nobody")
    (cache / "小哈_preprocessed.pkl").write_bytes(b"half")
    with pytest.raises(CacheError, match="模板缓存已损坏"):
        preprocessor.load_preprocessed_template("小哈")
    assert len(preprocessor.load_preprocessed_template("anna (2)")) == 2


def test_templates_are_listed_by_name_and_strangers_are_not(made: Path, tmp_path: Path) -> None:
    assert EnhancedMuseTalkPreprocessor(made).list_cached_templates() == ["anna (2)", "小哈"]
    assert EnhancedMuseTalkPreprocessor(tmp_path / "none").list_cached_templates() == []
    assert not (tmp_path / "none").exists()


def test_cache_info_counts_what_lies_in_the_folder(made: Path, cache: Path, tmp_path: Path) -> None:
    info = EnhancedMuseTalkPreprocessor(made).get_cache_info()
    size = sum(path.stat().st_size for path in made.glob("*.pkl")) / 1024**2
    assert info == {
        "cache_dir": str(made),
        "template_count": 2,
        "total_size_mb": pytest.approx(size, abs=0.01),
        "templates": ["anna (2)", "小哈"],
    }
    preprocessor = EnhancedMuseTalkPreprocessor(cache)
    preprocessor.clean_cache("anna (2)")
    assert preprocessor.get_cache_info()["templates"] == ["小哈"]
    assert 0 < preprocessor.get_cache_info()["total_size_mb"] < info["total_size_mb"]
    assert EnhancedMuseTalkPreprocessor(tmp_path / "none").get_cache_info()["template_count"] == 0


def test_cleaning_one_template_leaves_the_others(cache: Path) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(cache)
    before = names(cache)
    assert preprocessor.clean_cache("nobody") == 0 and names(cache) == before
    assert preprocessor.clean_cache("小哈") == 1
    assert names(cache) == before - {f"小哈{suffix}" for suffix in FILES}
    with pytest.raises(CacheMissingError):
        preprocessor.load_preprocessed_template("小哈")
    preprocessor.load_preprocessed_template("anna (2)")


def test_cleaning_all_leaves_what_is_no_template(cache: Path) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(cache)
    assert preprocessor.clean_cache() == 2
    assert names(cache) == {"notes_metadata.txt"} and preprocessor.list_cached_templates() == []
    assert preprocessor.clean_cache() == 0


def test_the_renderer_renders_and_measures(made: Path, tmp_path: Path, write_tone) -> None:
    audio, renderer = write_tone(8_000), UltraFastRealtimeInference(cache_dir=str(made), device="cpu")
    result = renderer.ultra_fast_inference("anna (2)", str(audio), str(tmp_path / "o.mp4"), fps=50)
    assert result.frames == 25 == len(list(read_video(tmp_path / "o.mp4")))
    measured = renderer.benchmark_performance("anna (2)", str(audio), runs=2)
    assert (measured["runs"], measured["frames"], measured["template_id"]) == (2, 12, "anna (2)")
    assert names(tmp_path) == {"tone.wav", "o.mp4"}


def test_the_service_does_all_of_it(tmp_path: Path, write_tone) -> None:
    service = IntegratedMuseTalkService(cache_dir=str(tmp_path / "c"), device="cpu")
    assert service.check_template_cache("t")["exists"] is False
    made = service.preprocess_template("t", str(PORTRAIT))
    assert made["success"] and service.preprocess_template("t", str(PORTRAIT))["cached"]
    assert service.check_template_cache("t")["valid"]
    assert service.get_service_info()["cache_info"]["templates"] == ["t"]
    answer = service.realtime_inference("t", str(write_tone(8_000)), str(tmp_path / "o.mp4"))
    assert answer["frames"] == 12 == len(list(read_video(tmp_path / "o.mp4")))
