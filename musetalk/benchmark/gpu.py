"""The proof run: what MuseTalk's full-size networks do on this device, in minutes and without a download.

The decision a reader would question: random weights. They give no usable picture, but every shape, kernel
and byte that moves is the official networks', and the goldens say whether the numbers are right.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk.benchmark.trials import TRIALS, Bench, NotHereError, Row, first_line
from musetalk.device import cuda_device_count, usable_by_torch
from musetalk.errors import MuseTalkError
from musetalk.files import atomic_file
from musetalk.measurement import hardware

CARDS_GB = (6, 8, 10, 12, 16, 24, 48, 80)  # memory that cards come with
RESERVED_GB = 1.0  # of a card, for its context and a desktop


@dataclass(frozen=True)
class ProofRun:
    """How a proof run is made.

    Attributes:
        out: folder for gpu.json, table.md and chart.png.
        device: "auto", "cpu", "cuda:0".
        small: tiny networks, to see that everything works.
        budget: seconds.
    """

    out: Path
    device: str
    small: bool
    budget: float

    def run(self) -> dict[str, Any]:
        """Measures, writes the three files, and answers what gpu.json holds."""
        device = _device(self.device)
        with tempfile.TemporaryDirectory() as name:
            rows = list(self._rows(Bench(device, self.small, Path(name))))
        answer: dict[str, Any] = {
            "success": True,
            "device": device,
            "card": card(device),
            "networks": "tiny" if self.small else "full",
            "rows": rows,
            "memory": cards_by_batch(rows),
            "hardware": hardware(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        answer["chart_path"] = _draw(rows, answer["card"] or device, self.out / "chart.png")
        _write(self.out / "table.md", "\n".join(table(answer)) + "\n")
        answer["message"] = f"✅ {self.out / 'gpu.json'}"
        _write(self.out / "gpu.json", json.dumps(answer, ensure_ascii=False, indent=2))
        return answer

    def _rows(self, bench: Bench) -> Iterator[Row]:
        import torch

        started = time.perf_counter()
        for trial in TRIALS:
            group = trial.__name__
            if time.perf_counter() - started > self.budget:
                yield {"group": group, "error": f"not measured: the {self.budget:.0f} s were over"}
                continue
            try:
                with torch.inference_mode():
                    for row in trial(bench):
                        yield {"group": group, **row}
            except (NotHereError, ImportError, MuseTalkError) as e:
                yield {"group": group, "error": first_line(e)}
            except Exception as e:  # noqa: BLE001 - one trial's failure is a row, the others go on
                yield {"group": group, "error": f"{type(e).__name__}: {first_line(e)}"}


def _device(request: str) -> str:
    if request == "auto":
        request = "cuda:0" if cuda_device_count() else "cpu"
    return request if request == "cpu" else usable_by_torch(request)


def card(device: str) -> str | None:
    """The card's name and memory; None on a CPU."""
    if device == "cpu":
        return None
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GB, torch {torch.__version__}"


def cards_by_batch(rows: Sequence[Row]) -> dict[str, int]:
    """The largest batch of UNet and decoder together that a card of so many GB holds."""
    needs = [
        (row["batch"], row["peak_memory_mb"] / 1024 + RESERVED_GB)
        for row in rows
        if row["group"] == "batches" and row.get("variant") == "together" and "peak_memory_mb" in row
    ]
    held = {size: [batch for batch, need in needs if need <= size] for size in CARDS_GB}
    return {f"{size} GB": max(batches) for size, batches in held.items() if batches}


def table(answer: dict[str, Any]) -> Iterator[str]:
    """The rows in Markdown."""
    yield f"# {answer['card'] or answer['hardware']['cpu']}, {answer['networks']} random networks"
    yield ""
    yield "| measured | variant | batch | ms a frame (range) | frames/s | peak MB | |"
    yield "|---|---|---|---|---|---|---|"
    for row in answer["rows"]:
        times = row.get("ms_per_frame")
        spread = f"{times['median']} ({times['min']}-{times['max']})" if times else "–"
        cells = [row["group"].replace("_", " "), row.get("variant", "–"), row.get("batch", "–"), spread]
        cells += [row.get("frames_per_second", "–"), row.get("peak_memory_mb", "–"), _remark(row)]
        yield "| " + " | ".join(map(str, cells)) + " |"
    for size, batch in answer["memory"].items():
        yield f"\nA card of {size} holds batch {batch}."


def _remark(row: Row) -> str:
    said = {
        "error": "{}",
        "compile_seconds": "compiled in {} s",
        "first_frame_seconds": "first frame after {} s",
        "mean_levels": "differs from the reference by {} levels",
        "largest_levels": "{} at most",
    }
    return ", ".join(text.format(row[key]) for key, text in said.items() if key in row)


def _draw(rows: Sequence[Row], title: str, path: Path) -> str | None:
    from musetalk.measurement_chart import draw_curves

    measured = [row for row in rows if row["group"] == "batches" and "frames_per_second" in row]
    if not measured:
        return None
    curves = {
        name: [(row["batch"], row["frames_per_second"]) for row in measured if row["variant"] == name]
        for name in ("unet", "decoder", "together")
    }
    ticks = {float(row["batch"]): str(row["batch"]) for row in measured}
    labels = (f"Frames per second by batch, {title}", "batch", "frames/s")
    chart = draw_curves(curves, labels, path, ticks)
    return None if chart is None else str(chart)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())
