"""What the commands ask of the worker, as lines of JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from musetalk.announcement import find_announcements, proof
from musetalk.tools.demo import SPEECH

TEMPLATE = "小哈 (1)"


def said(served, **request: Any) -> list[dict[str, Any]]:
    body = {
        "command": "inference",
        "template_id": TEMPLATE,
        "audio_path": str(SPEECH),
        "fps": "25",
        **request,
    }
    status, _, content = served.call("POST", "/worker/run", body)
    assert status == 200, content
    return [json.loads(line) for line in content.splitlines()]


def test_the_worker_proves_that_the_word_in_its_cache_is_its_own(start_worker):
    worker = start_worker()
    told = find_announcements(worker.folder / "cache")
    own = next(one for one in told if one.pid == worker.process.pid)
    assert own.port == worker.http_port
    challenge = "0123456789abcdef"
    answer = worker.call("GET", f"/worker/proof?challenge={challenge}")[2]
    assert answer == {"proof": proof(own.nonce, challenge)}
    assert worker.call("GET", "/worker/proof?challenge=short")[0] == 422


def test_progress_and_the_answer_come_as_lines(served, tmp_path):
    lines = said(served, output_path=str(tmp_path / "a.mp4"))
    counts = [line["progress"][0] for line in lines if "progress" in line]
    assert counts == sorted(counts) and counts[-1] == 190
    assert lines[-1]["answer"]["frames"] == 190 and (tmp_path / "a.mp4").is_file()


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"nonsense": 1}, "command": "preprocess"},
        {"encoding": {"nonsense": 1}},
        {"encoding": {"crf": 99}},
        {"batch_size": 0},
        {"articulation": 0.4},
        {"template_id": "nobody"},
    ],
)
def test_what_cannot_be_done_fails_with_the_command_s_code(served, tmp_path, changed):
    lines = said(served, output_path=str(tmp_path / "a.mp4"), **changed)
    assert lines[-1]["failure"]["error_code"] in {"bad_input", "cache_missing"}
    assert lines[-1]["failure"]["exit_code"] in {3, 6}


def test_a_warning_is_told_to_its_own_command(served, tmp_path):
    """A sound file that is cut off: what is left of it is used, and that is said."""

    damaged = tmp_path / "cut.flac"
    damaged.write_bytes(SPEECH.read_bytes()[:-5000])
    lines = said(served, audio_path=str(damaged), output_path=str(tmp_path / "a.mp4"))
    assert "answer" in lines[-1] and any("damaged" in line.get("log", "") for line in lines)
