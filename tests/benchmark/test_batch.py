"""The batch's measurements, made small: what they compare is equal, what they count is there."""

from __future__ import annotations

import json

import pytest

from musetalk.benchmark import batch


def test_processes_are_compared_with_the_command(tmp_path, capsys):
    arguments = ["processes", "--out", str(tmp_path), "--clips", "2", "--seconds", "0.4", "--processes", "1"]
    assert batch.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == told["processes-1"]["bytes_equal"] == 2
    assert told["serial_seconds"] > 0 and told["processes-1"]["times"]["frame"] > 0


def test_what_a_worker_loses_is_what_its_clips_do_not_account_for(tmp_path):
    manifest = tmp_path / "m.jsonl"
    lines = [("a", 10.0, 1.0), ("b", 10.5, 1.0), ("a", 12.5, 2.0), ("b", 12.0, 1.0), ("a", 14.0, 1.4)]
    manifest.write_text("\n".join(json.dumps({"worker": w, "time": t, "seconds": s}) for w, t, s in lines))
    assert batch.between_clips(manifest) == pytest.approx(0.5)
