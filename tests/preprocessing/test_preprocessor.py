"""What preprocessing writes beside the template: here, what the engine found of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from musetalk import config
from musetalk.config import EngineConfig
from musetalk.engines.lite.engine import LiteEngine
from musetalk.engines.registry import EngineRegistry
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
