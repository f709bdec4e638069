"""The callers' own way of speaking, in their own language: the clients of docs/csharp.md, run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import REPOSITORY
from musetalk.media.audio import read_waveform
from musetalk.media.video import read_video
from tests.conftest import PORTRAIT, SPEECH
from tests.csharp.conftest import Client
from tests.served import Served

PREPROCESS = REPOSITORY / "enhanced_musetalk_preprocessing.py"
INFERENCE = REPOSITORY / "ultra_fast_realtime_inference.py"


def run_script(
    client: Client, script: Path, folder: Path, expected: str, *arguments: str, seconds: int = 300
) -> dict[str, Any]:
    """One command through the process client; what it made of it."""
    (answer,) = client("process", sys.executable, script, folder, expected, seconds, *arguments)
    return answer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """A folder of awkward names with a template that the C# caller made by the script."""
    folder = tmp_path_factory.mktemp("C sharp 目录 (1)")
    shutil.copy(PORTRAIT, folder / "小哈 (1).jpg")
    state = folder / "state" / "小哈 (1).pkl"
    answer = run_script(
        client,
        PREPROCESS,
        folder,
        str(state),
        *("--template_id", "小哈 (1)", "--template_image", str(folder / "小哈 (1).jpg")),
        *("--output_state", str(state), "--cache_dir", str(folder / "cache"), "--device", "cuda:0"),
    )
    assert answer["success"] and answer["exit_code"] == 0, answer["errors"]
    return folder


def older_call(folder: Path, audio: Path, output: Path) -> list[str]:
    """The arguments of the caller's older single-script call."""
    return [
        *("--template_id", "小哈 (1)", "--audio_path", str(audio), "--output_path", str(output)),
        *("--template_dir", str(folder), "--version", "v1", "--batch_size", "64", "--fps", "25"),
        *("--cache_dir", str(folder / "cache"), "--device", "cuda:0"),
    ]


def test_a_script_is_run_with_quoted_arguments_and_drained_streams(client: Client, workplace: Path) -> None:
    output = workplace / "输出 out" / '视频 "1".mp4' if os.name != "nt" else workplace / "视频.mp4"
    answer = run_script(
        client, INFERENCE, workplace.parent, str(output), "--verbose", *older_call(workplace, SPEECH, output)
    )
    assert answer["success"] and answer["frames"] == 190 == len(list(read_video(output)))
    assert "190 frames" in answer["errors"]


def test_a_failed_script_tells_what_to_do_in_its_last_lines(client: Client, workplace: Path) -> None:
    output = workplace / "none.mp4"
    answer = run_script(
        client, INFERENCE, workplace, str(output), "--template_id", "nobody", "--audio_path", str(SPEECH)
    )
    assert not answer["success"] and answer["exit_code"] == 6 and answer["error_code"] == "cache_missing"
    assert answer["errors"].splitlines()[-1].startswith("💡 请先运行预处理创建缓存")


def test_success_needs_the_file(client: Client, workplace: Path) -> None:
    listing = ("--check_cache", "--cache_dir", str(workplace / "cache"))
    script = REPOSITORY / "integrated_musetalk_service.py"
    assert run_script(client, script, workplace, "", *listing)["success"]
    answer = run_script(client, script, workplace, str(workplace / "missing"), *listing)
    assert answer["exit_code"] == 0 and not answer["success"]


def address(served: Served) -> str:
    """Where its HTTP is."""
    return f"http://127.0.0.1:{served.http_port}"


def rendering(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [line for line in lines if str(folder) in line and "client" not in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="lists processes in /proc")
def test_a_timeout_kills_the_whole_tree_and_the_next_run_sweeps_its_traces(
    client: Client, workplace: Path, write_tone
) -> None:
    output, audio = workplace / "long" / "o.mp4", write_tone(16_000 * 600)
    answer = run_script(
        client, INFERENCE, workplace, str(output), *older_call(workplace, audio, output), seconds=4
    )
    assert answer["timed_out"] and not answer["success"] and answer["exit_code"] != 0
    assert not output.exists() and not rendering(workplace)
    answer = run_script(client, INFERENCE, workplace, str(output), *older_call(workplace, SPEECH, output))
    assert answer["success"] and [path.name for path in output.parent.iterdir()] == ["o.mp4"]


def test_the_http_client_renders_a_session_in_segments(
    client: Client, served: Served, write_tone, tmp_path: Path
) -> None:
    segments = [write_tone(8_000, name=f"段 {i}.wav") for i in range(3)]
    answers = client("http", address(served), "小哈 http", PORTRAIT, *segments)
    healthy, first, again, made, started, *rendered, ended, whole, status = answers
    assert healthy == {"healthy": True} and first["success"] and again["success"]
    assert made["success"] and made["template_id"] == "小哈 http" and Path(made["cache_path"]).is_file()
    assert started["success"] and len(rendered) == 3
    for i, answer in enumerate(rendered):
        path = Path(answer["video_path"])
        assert answer["segment_index"] == i and answer["is_final"] is (i == 2)
        assert path.parent == served.videos and path.stat().st_size == answer["downloaded"]
        assert len(list(read_video(path))) == answer["frames"]
    assert sum(answer["frames"] for answer in rendered) == 37  # floor(1.5 s × 25)
    assert len({answer["video_path"] for answer in rendered}) == 3
    assert ended["segments_processed"] == 3 and ended["average_latency"] > 0
    assert whole["is_final"] and whole["frames"] == 12
    assert status["active_sessions"] == 0 and status["templates_cached"] >= 1


def test_the_http_client_reads_what_went_wrong(client: Client, served: Served) -> None:
    answers = client("http-failures", address(served), SPEECH)
    assert [answer["status"] for answer in answers] == [400] * 4
    assert all(answer["success"] is False and answer["detail"] for answer in answers)
    assert "模板缓存不存在: nobody" in answers[0]["detail"]


def test_the_line_client_keeps_one_connection_for_everything(
    client: Client, served: Served, tmp_path: Path
) -> None:
    output = tmp_path / "行 lines.mp4"
    answers = client("lines", served.tcp_port, "小哈 行", PORTRAIT, SPEECH, output, tmp_path / "cache")
    ping, status, unknown, made, known, rendered, failed = answers
    assert ping["success"] and ping["message"] and ping["timestamp"] and ping["modelLoaded"] is True
    assert status["status"] == "running" and status["modelLoaded"] is True and status["device"] == "cpu"
    assert status.keys() >= {"cacheDir", "activeThreads", "uptime", "version"}
    assert unknown["success"] and unknown["cacheExists"] is False and unknown["error"]
    assert made["success"] and made["templateId"] == "小哈 行" and made["processTime"] > 0
    assert known["cacheExists"] is True and Path(known["metadataPath"]).is_file()
    assert rendered["success"] and rendered["resultPath"] == str(output) and rendered["inferenceTime"] > 0
    assert len(list(read_video(output))) == 190
    assert failed["success"] is False and failed["errorType"] and "nobody" in failed["error"]


def test_a_ping_behind_an_inference_is_answered_after_it(
    client: Client, served: Served, tmp_path: Path
) -> None:
    rendered, ping = client("pipelined", served.tcp_port, "小哈 (1)", SPEECH, tmp_path / "b.mp4")
    assert rendered["resultPath"] == str(tmp_path / "b.mp4") and ping["message"] == "pong"


def test_the_framed_client_shares_the_http_port(client: Client, served: Served, tmp_path: Path) -> None:
    rendered, failed = client("framed", served.http_port, "小哈 (1)", SPEECH, tmp_path / "f.mp4")
    assert rendered["Success"] is True and rendered["OutputPath"] == str(tmp_path / "f.mp4")
    assert len(list(read_video(tmp_path / "f.mp4"))) == 190
    assert failed["Success"] is False and "nobody" in failed["Error"]


def test_the_json_reader_is_case_sensitive_and_knows_escapes(client: Client, tmp_path: Path) -> None:
    text = {"a": '引号 " \\ \n\t', "A": -1.5e3, "success": True, "list": [1, [], {}], "none": None}
    (tmp_path / "j.json").write_text(json.dumps(text), "utf-8")
    (answer,) = client("json", tmp_path / "j.json")
    assert answer == {**text, "list": "list of 3"}


def test_a_rendered_segment_has_its_own_sound(client: Client, served: Served, write_tone) -> None:
    answers = client("http", address(served), "小哈 http", PORTRAIT, write_tone(16_000, name="one.wav"))
    (path,) = {Path(a["video_path"]) for a in answers if a.get("downloaded")}
    samples = sum(len(block) for block in read_waveform(path))
    assert abs(samples - 16_000) < 16_000 / 25


@pytest.mark.parametrize("name", ["json", "process", "http", "tcp"])
def test_the_page_shows_what_is_tested(name: str) -> None:
    sources = "\n".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.cs")))
    region = re.search(rf"#region {name}\n(.*?)#endregion", sources, re.DOTALL)
    assert region is not None
    page = (REPOSITORY / "docs" / "csharp.md").read_text("utf-8")
    blocks = re.findall(r"```csharp\n(.*?)```", page, re.DOTALL)
    assert region[1] in blocks
