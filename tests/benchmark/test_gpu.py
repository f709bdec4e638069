"""The proof run, whole, on a CPU with tiny networks; and what it does where a trial fails or time is over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.benchmark import __main__ as benchmark
from tests.engines.conftest import NEEDS_FULL

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("diffusers", reason=NEEDS_FULL)

from musetalk.benchmark import gpu, trials  # noqa: E402
from musetalk.benchmark.random_engine import RandomEngine  # noqa: E402
from musetalk.cli import execute  # noqa: E402
from musetalk.config import EngineConfig  # noqa: E402

NEEDS_A_CARD = {"captured_graph", "compiled"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # networks this small lose more to waiting threads than they gain
    monkeypatch.setattr("musetalk.device.usable_cores", lambda: 1)


def proof(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    return gpu.ProofRun(tmp_path, "cpu", True, settings.get("budget", 480.0)).run()


def test_the_whole_run_on_a_cpu_measures_all_but_what_needs_a_card(tmp_path: Path) -> None:
    flags = ["gpu", "--device", "cpu", "--small", "--out", str(tmp_path)]
    answer, code = execute(benchmark.benchmark_main, flags)
    assert code == 0 and answer["success"], answer
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8")) == answer
    groups = {row["group"] for row in answer["rows"]}
    assert groups == {trial.__name__ for trial in trials.TRIALS}
    failed = {row["group"] for row in answer["rows"] if "error" in row}
    assert NEEDS_A_CARD <= failed <= NEEDS_A_CARD | {"transfers", "encoders"}
    exact, half = (row for row in answer["rows"] if row["group"] == "goldens")
    assert exact["mean_levels"] < 0.01 and exact["largest_levels"] <= 1 and half["mean_levels"] < 4
    timed = [row for row in answer["rows"] if "ms_per_frame" in row]
    assert all(0 < row["ms_per_frame"]["min"] <= row["ms_per_frame"]["median"] for row in timed)
    rows = (tmp_path / "table.md").read_text("utf-8").splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == len(answer["rows"]) + 1
    assert Path(answer["chart_path"]).read_bytes().startswith(b"\x89PNG")


def test_one_failing_trial_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(bench: trials.Bench) -> Iterator[trials.Row]:
        yield {"variant": "first", "batch": 1}
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def works(bench: trials.Bench) -> Iterator[trials.Row]:
        yield {"variant": "only", "batch": 1}

    monkeypatch.setattr(gpu, "TRIALS", (breaks, works))
    rows = proof(tmp_path)["rows"]
    assert [row["group"] for row in rows] == ["breaks", "breaks", "works"]
    assert rows[1]["error"] == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"


def test_what_the_time_does_not_suffice_for_is_said(tmp_path: Path) -> None:
    rows = proof(tmp_path, budget=-1.0)["rows"]
    assert len(rows) == len(trials.TRIALS)
    assert all("not measured" in row["error"] for row in rows)
    assert "not measured" in (tmp_path / "table.md").read_text("utf-8")


def test_the_table_says_which_card_holds_what() -> None:
    def row(batch: int, peak: float, variant: str = "together") -> dict[str, Any]:
        return {"group": "batches", "variant": variant, "batch": batch, "peak_memory_mb": peak}

    rows = [row(1, 4000), row(8, 7.5 * 1024), row(64, 40 * 1024), row(64, 1000, "unet")]
    held = gpu.cards_by_batch(rows)
    assert (held["6 GB"], held["8 GB"], held["10 GB"], held["80 GB"]) == (1, 1, 8, 64)


def test_random_networks_keep_numbers_in_range_and_touch_no_disk(tmp_path: Path) -> None:
    config = EngineConfig(fp16=False, vae_region="off")
    engine = RandomEngine(tmp_path, "tiny", config, "cpu")
    with torch.inference_mode():
        prompts = np.random.RandomState(1).randn(1, 50, engine.prompt_width).astype(np.float32)
        decode = engine.runtime.decoder("full", None, lambda: None, optimise=False)
        face = decode(engine.runtime.predict(torch.randn(1, 8, 32, 32), prompts))
    assert face.shape == (1, 3, 256, 256)
    assert 0.01 < face.std().item() < 100
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10_000
