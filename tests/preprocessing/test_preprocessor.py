"""What preprocessing writes beside the template: what was found of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from musetalk import config
from musetalk.config import EngineConfig, PreprocessingConfig
from musetalk.engines.lite.engine import LiteEngine
from musetalk.engines.registry import EngineRegistry
from musetalk.errors import InputError
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.media.image import read_image
from musetalk.preprocessing.preprocessor import EnhancedMuseTalkPreprocessor
from musetalk.templates.template import Template

VERDICT = {"harmless": True, "share": 0.4, "mean": 0.1, "tail": 1.0, "largest": 2.0}


class JudgingEngine(LiteEngine):
    """An engine that has something to say of a template with one face."""

    def judge(self, template: Template) -> dict[str, Any]:
        return {"vae_region": VERDICT} if template.unique_count == 1 else {}


def test_the_engines_verdict_is_kept_in_the_metadata(tmp_path: Path, portrait: Path) -> None:
    engine = JudgingEngine(config.LITE_MODELS)
    engines = EngineRegistry(lambda *_: engine)
    preprocessor = EnhancedMuseTalkPreprocessor(tmp_path, config=EngineConfig(engine="lite"), engines=engines)
    preprocessor.preprocess_template("t", portrait)
    metadata = json.loads((tmp_path / "t_metadata.json").read_text(encoding="utf-8"))
    assert metadata["vae_region"] == VERDICT
    assert "judge" in metadata["stages"]
    assert preprocessor.preprocess_template("t", portrait) == metadata


def masked(portrait: Path, folder: Path) -> Path:
    """The portrait with a paper mask from the middle of the nose to the chin."""
    image = read_image(portrait)
    [face] = MediapipeDetector().detect(image)
    outline = face.mesh[[93, 58, 172, 150, 176, 152, 400, 379, 397, 288, 323, 345, 5, 116]]
    cv2.fillPoly(image, [outline.round().astype(np.int32)], (200, 150, 90))
    path = folder / "masked.png"
    cv2.imwrite(str(path), image)
    return path


def test_a_covered_mouth_is_said_and_kept_in_the_metadata(
    tmp_path: Path, portrait: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(tmp_path, config=EngineConfig(engine="lite"))
    assert preprocessor.preprocess_template("free", portrait)["covered_mouth"] == 0
    assert "looks covered" not in caplog.text
    assert preprocessor.preprocess_template("masked", masked(portrait, tmp_path))["covered_mouth"] == 1
    assert caplog.text.count("looks covered") == 1


@pytest.mark.parametrize("background", ["green", "#12", "no such picture.png"])
def test_a_background_that_is_neither_colour_nor_picture_is_called_so(
    tmp_path: Path, portrait: Path, background: str
) -> None:
    settings = PreprocessingConfig(background=background)
    with pytest.raises(InputError, match="background") as caught:
        EnhancedMuseTalkPreprocessor(tmp_path).preprocess("t", portrait, settings)
    assert "#rrggbb" in caught.value.hint
