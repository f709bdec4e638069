"""The commands as a caller runs them: subprocesses, exit codes, one JSON object on stdout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk import cli
from musetalk.config import REPOSITORY
from musetalk.device import cuda_device_count
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.image import read_image
from musetalk.media.video import probe_video, read_video
from musetalk.templates.store import TemplateStore
from tests.conftest import PORTRAIT, SPEECH

FAILURE_KEYS = {"success", "error_code", "error", "message", "hint", "template_id"}
INFERENCE_KEYS = {
    *("success", "template_id", "audio_path", "output_path", "fps", "frames", "duration", "processing_time"),
    *("rtf", "stages", "engine", "device", "dtype", "vae_decoder", "message"),
}
PREPROCESS_KEYS = {
    *("success", "template_id", "metadata", "cached", "processing_time", "message", "engine", "device")
}
CHECK_KEYS = {"success", "exists", "valid", "template_id", "metadata", "cache_size_mb", "message"}
INFO_KEYS = {
    *("success", "service_name", "version", "device", "cache_dir", "batch_size"),
    *("cache_info", "capabilities", "engines", "vae_decoder"),
}


@dataclass
class Done:
    """A finished command."""

    code: int
    answer: dict[str, Any]
    errors: str


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> Done:
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, cwd=cwd, env={**os.environ, **environment}, check=False, timeout=300
    )
    return Done(done.returncode, json.loads(done.stdout.decode("utf-8")), done.stderr.decode("utf-8"))


def service(*arguments: str, cwd: Path, **environment: str) -> Done:
    return run("integrated_musetalk_service", *arguments, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with Chinese and spaces in its name that holds a preprocessed template `小哈 (1)`."""
    folder = tmp_path_factory.mktemp("工作 目录 (x)")
    shutil.copy(PORTRAIT, folder / "小哈 (1).jpg")
    done = service(
        "--preprocess",
        *("--template_id", "小哈 (1)"),
        *("--template_image_path", "./小哈 (1).jpg"),
        *("--bbox_shift", "0", "--parsing_mode", "jaw", "--cache_dir", "./cache", "--device", "cuda:0"),
        cwd=folder,
        PYTHONIOENCODING="ascii",
    )
    assert done.code == 0, done.errors
    assert done.answer.keys() >= PREPROCESS_KEYS and done.answer["cached"] is False
    return folder


def inference(workplace: Path, *arguments: str) -> Done:
    ordinary = ("--template_id", "小哈 (1)", "--cache_dir", "./cache", "--audio_path", str(SPEECH))
    return service("--inference", *ordinary, *arguments, cwd=workplace)


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".tmp" in path.name]


def test_unchanged_template_is_answered_from_the_cache(workplace):
    arguments = ["--template_id", "小哈 (1)", "--template_image_path", "小哈 (1).jpg", "--cache_dir", "cache"]
    assert service("--preprocess", *arguments, cwd=workplace).answer["cached"] is True
    changed = service("--preprocess", *arguments, "--bbox_shift", "3", cwd=workplace).answer
    assert changed["cached"] is False and changed["metadata"]["bbox_shift"] == 3
    assert service("--preprocess", *arguments, cwd=workplace).answer["cached"] is False
    assert service("--preprocess", *arguments, "--force_refresh", cwd=workplace).answer["cached"] is False
    assert (workplace / "cache" / "小哈 (1)_preview.jpg").stat().st_size > 5_000


def test_changed_portrait_refreshes_the_cache(tmp_path):
    import cv2

    image = read_image(PORTRAIT)
    arguments = ("--template_id", "t", "--template_image", "t.png", "--cache_dir", "c", "--device", "cpu")
    answers = []
    for picture in (image, image[:, ::-1]):
        cv2.imwrite(str(tmp_path / "t.png"), picture)
        answers.append(run("enhanced_musetalk_preprocessing", *arguments, cwd=tmp_path).answer)
    assert [answer["cached"] for answer in answers] == [False, False]
    assert answers[0]["metadata"]["source_sha256"] != answers[1]["metadata"]["source_sha256"]


def test_inference_makes_the_documented_answer_and_a_whole_video(workplace):
    done = inference(workplace, "--output_path", "输出 out/视频.mp4", "--fps", "25", "--batch_size", "32")
    assert done.code == 0, done.errors
    answer = done.answer
    assert answer.keys() >= INFERENCE_KEYS and answer["engine"] == "lite" and answer["device"] == "cpu"
    assert len(list(read_video(workplace / "输出 out" / "视频.mp4"))) == answer["frames"] == 190
    info = probe_video(workplace / "输出 out" / "视频.mp4")
    assert (info.width, info.height) == (512, 512) and info.duration == pytest.approx(7.635, abs=0.06)
    assert not leftovers(workplace)


def frames_and_mask(workplace: Path, audio: Path) -> tuple[np.ndarray, np.ndarray]:
    """All blended frames (T, H, W, 3) of a rendering, and the template's mask (H, W) on the frame."""
    done = inference(
        workplace, "--audio_path", str(audio), "--output_path", "f.mp4", "--frames_dir", "frames"
    )
    assert done.code == 0, done.errors
    template, _ = TemplateStore(workplace / "cache").load("小哈 (1)")
    frames = np.stack([read_image(path) for path in sorted((workplace / "frames").iterdir())])
    x1, y1, x2, y2 = template.crop_boxes[0]
    mask = np.zeros(frames.shape[1:3], np.uint8)
    mask[y1:y2, x1:x2] = template.masks[0]
    return frames, mask


def movement(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute change from frame to frame, levels."""
    return np.abs(np.diff(pixels.astype(np.int16), axis=0)).mean(axis=(1, 2))


def test_mouth_moves_in_speech_and_only_inside_the_mask(workplace):
    frames, mask = frames_and_mask(workplace, SPEECH)
    template, _ = TemplateStore(workplace / "cache").load("小哈 (1)")
    assert (frames[:, mask == 0] == template.frames[0][mask == 0]).all()
    assert movement(frames[:, mask > 128]).max() > 2


def test_mouth_is_still_in_silence(workplace, write_tone):
    frames, mask = frames_and_mask(workplace, write_tone(32_000, amplitude=0))
    assert len(frames) == 50 and movement(frames[:, mask > 128]).max() < 0.4


def test_verbose_tells_decisions_and_stage_timings(workplace):
    picture = ("--template_image_path", "小哈 (1).jpg", "--cache_dir", "verbose cache", "--template_id", "v")
    told = service("--preprocess", *picture, "--verbose", cwd=workplace).errors
    for line in (
        "engine lite on cpu",
        "face detector: mediapipe",
        "face parser: landmarks",
        r"box .*faces \d",
    ):
        assert re.search(line, told), line
    told = inference(workplace, "--output_path", "verbose.mp4", "--verbose").errors
    for line in ("engine lite on cpu, float32, batch 8", r"190 frames at 25 per second .*generate \d"):
        assert re.search(line, told), line


def test_older_single_script_call_preprocesses_when_needed(workplace):
    arguments = (
        *("--template_id", "小哈 (1)", "--audio_path", str(SPEECH), "--output_path", "old.mp4"),
        *("--template_dir", ".", "--version", "v1", "--batch_size", "64", "--fps", "25"),
        *("--cache_dir", "./old cache"),
    )
    done = run("ultra_fast_realtime_inference", *arguments, cwd=workplace, PYTHONPATH=str(workplace))
    assert done.code == 0, done.errors
    assert (workplace / "old.mp4").is_file() and done.answer["frames"] == 190


def test_a_picture_that_changed_under_its_name_is_preprocessed_again(workplace):
    folder = workplace / "pictures"
    folder.mkdir()
    shutil.copy(PORTRAIT, folder / "p.jpg")
    script, cache = "ultra_fast_realtime_inference", workplace / "changing cache"
    arguments = ("--template_id", "p", "--audio_path", str(SPEECH), "--output_path", "p.mp4")
    arguments += ("--template_dir", "pictures", "--cache_dir", str(cache))
    assert run(script, *arguments, cwd=workplace).code == 0
    made = (cache / "p_metadata.json").read_bytes()
    assert run(script, *arguments, cwd=workplace).code == 0
    assert (cache / "p_metadata.json").read_bytes() == made
    shutil.copy(PORTRAIT.with_name("hopper.jpg"), folder / "p.jpg")
    done = run(script, *arguments, cwd=workplace)
    assert done.code == 0 and "p.jpg" in done.errors
    assert (cache / "p_metadata.json").read_bytes() != made


def test_a_template_folder_without_the_picture_is_named(tmp_path):
    arguments = ("--template_id", "nobody", "--audio_path", str(SPEECH), "--template_dir", "pictures")
    done = run("ultra_fast_realtime_inference", *arguments, cwd=tmp_path)
    assert done.code == 6 and "nobody.jpg" in done.errors and str(tmp_path) in done.errors


def test_older_preprocessing_call_leaves_the_state_file(workplace):
    done = run(
        "enhanced_musetalk_preprocessing",
        *("--template_id", "s", "--template_image", "小哈 (1).jpg", "--output_state", "state/s.pkl"),
        *("--cache_dir", "c3", "--device", "cuda:0"),
        cwd=workplace,
    )
    assert done.code == 0, done.errors
    assert (workplace / "state" / "s.pkl").read_bytes() == (
        workplace / "c3" / "s_preprocessed.pkl"
    ).read_bytes()


def test_check_cache_and_service_info(workplace):
    check = service("--check_cache", "--template_id", "小哈 (1)", "--cache_dir", "cache", cwd=workplace)
    assert check.code == 0 and check.answer.keys() >= CHECK_KEYS and check.answer["valid"]
    listing = service("--check_cache", "--cache_dir", "cache", cwd=workplace)
    assert listing.code == 0 and "小哈 (1)" in listing.errors
    assert [entry["template_id"] for entry in listing.answer["templates"]] == ["小哈 (1)"]
    info = service("--service_info", "--cache_dir", "cache", cwd=workplace)
    assert info.code == 0 and info.answer.keys() >= INFO_KEYS
    assert info.answer["cache_info"]["templates"] == ["小哈 (1)"]


def test_missing_cache_says_the_documented_words(tmp_path):
    done = service("--check_cache", "--template_id", "xiaoha", cwd=tmp_path)
    assert done.code == 6 and not done.answer["exists"] and done.answer.keys() >= CHECK_KEYS
    done = service(
        "--inference",
        "--template_id",
        "xiaoha",
        "--audio_path",
        str(SPEECH),
        "--output_path",
        "o.mp4",
        cwd=tmp_path,
    )
    assert done.code == 6 and done.answer.keys() >= FAILURE_KEYS
    assert "❌ 模板缓存不存在: xiaoha" in done.errors and "💡 请先运行预处理创建缓存" in done.errors


def _bad_images(folder: Path) -> None:
    import cv2

    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "cut.jpg").write_bytes(PORTRAIT.read_bytes()[:20_000])
    cv2.imwrite(str(folder / "one.png"), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(folder / "grey.png"), np.full((256, 256, 3), 128, np.uint8))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder").mkdir()


@pytest.mark.parametrize(
    ("source", "code"),
    [
        *(("missing.jpg", 3), ("empty.jpg", 3), ("text.jpg", 3), ("cut.jpg", 3), ("one.png", 3)),
        *(("empty.mp4", 3), ("folder", 3), ("grey.png", 4)),
    ],
)
def test_unusable_portraits_have_their_exit_codes(tmp_path, capsys, monkeypatch, source, code):
    _bad_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = ["--preprocess", "--template_id", "bad", "--template_image_path", source, "--engine", "lite"]
    answer, got = cli.execute(cli.service_main, argv)
    assert got == code and answer.keys() == FAILURE_KEYS and answer["message"] and answer["hint"]
    assert capsys.readouterr().err.splitlines()[-1] == answer["hint"]
    if code == 4:
        assert "ValueError: 未检测到有效面部" in answer["message"] and "bbox_shift" in answer["hint"]
    assert TemplateStore("template_cache").template_ids() == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        *((("--fps", fps), 3) for fps in ("0", "-1", "nan", "1e9", "fast")),
        *((("--batch_size", "0"), 3), (("--batch_size", "many"), 2), (("--crf", "99"), 3)),
        *((("--template_id", bad), 3) for bad in ("../x", "a/b", "CON", "x" * 300)),
        (("--audio_path", "missing.wav"), 3),
        (("--audio_path", "text.wav"), 3),
        (("--device", "tpu"), 3),
        (("--device", "cuda:7", "--strict_device"), 5),
        (("--engine", "other"), 2),
        (("--nonsense",), 2),
        (("--output_path", "o.avi"), 7),
        (("--output_path", "."), 7),
        (("--unet_model_path", "models/none.pth"), 5),
    ],
)
def test_bad_values_have_their_exit_codes(workplace, monkeypatch, capsys, changes, code):
    monkeypatch.chdir(workplace)
    Path("text.wav").write_text("no sound")
    argv = ["--inference", "--template_id", "小哈 (1)", "--audio_path", str(SPEECH), "--cache_dir", "cache"]
    answer, got = cli.execute(cli.service_main, [*argv, "--output_path", "bad.mp4", *changes])
    assert got == code, answer
    assert answer.keys() == FAILURE_KEYS and answer["success"] is False and answer["hint"]
    assert not Path("bad.mp4").exists() and not leftovers(workplace)


@pytest.mark.parametrize("argv", [[], ["--preprocess", "--inference"], ["--preprocess"], ["--inference"]])
def test_incomplete_command_lines_are_usage_errors(argv):
    answer, code = cli.execute(cli.service_main, argv)
    assert code == 2 and answer["error_code"] == "usage"


def test_a_defect_becomes_an_answer_too(monkeypatch, capsys):
    monkeypatch.setattr(cli, "info_command", lambda arguments: 1 / 0)
    answer, code = cli.execute(cli.service_main, ["--service_info"])
    assert code == 1 and answer["error_code"] == "internal" and "ZeroDivisionError" in capsys.readouterr().err


def test_a_missing_package_says_how_to_get_it(monkeypatch, capsys):
    def command(arguments):
        raise ModuleNotFoundError("No module named 'filelock'", name="filelock")

    monkeypatch.setattr(cli, "info_command", command)
    answer, code = cli.execute(cli.service_main, ["--service_info"])
    assert code == 5 and "filelock" in answer["message"] and "pip install" in answer["hint"]
    assert "Traceback" not in capsys.readouterr().err


def test_output_that_is_the_templates_own_clip_is_refused(workplace):
    shutil.copy(PORTRAIT, workplace / "source.png")
    preprocess = ("--preprocess", "--template_id", "own", "--template_image_path", "source.png")
    assert service(*preprocess, "--cache_dir", "own cache", cwd=workplace).code == 0
    os.link(workplace / "source.png", workplace / "clip.mp4")
    arguments = ("--template_id", "own", "--audio_path", str(SPEECH), "--cache_dir", "own cache")
    done = service("--inference", *arguments, "--output_path", "clip.mp4", cwd=workplace)
    assert done.code == 7 and (workplace / "clip.mp4").read_bytes() == PORTRAIT.read_bytes()


def test_damaged_cache_is_made_again_where_the_picture_is_named(workplace):
    shutil.copytree(workplace / "cache", workplace / "damaged cache")
    (workplace / "damaged cache" / "小哈 (1)_metadata.json").write_text('{"template_id": "小', "utf-8")
    arguments = ("--template_id", "小哈 (1)", "--audio_path", str(SPEECH), "--cache_dir", "damaged cache")
    done = run(
        *("ultra_fast_realtime_inference", *arguments, "--output_path", "mended.mp4", "--template_dir", "."),
        *("--device", "cuda:0"),
        cwd=workplace,
    )
    assert done.code == 0 and (workplace / "mended.mp4").is_file(), done.errors
    assert done.answer["device"] == "cpu"  # lite's, whatever card there is
    assert done.errors.count("cuda:0") == (cuda_device_count() == 0)


@pytest.mark.skipif(os.name == "nt", reason="closes descriptors in a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), [("--service_info", 0), ("--check_cache --template_id x", 6)])
def test_closed_streams_do_not_change_the_outcome(tmp_path, closed, command, code):
    line = f'"{sys.executable}" "{REPOSITORY / "integrated_musetalk_service.py"}" {command} {closed}'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == code and b"Traceback" not in done.stderr
    if closed == "2>&-":
        assert json.loads(done.stdout)["success"] is (code == 0)


def recording_ffmpeg(folder: Path) -> tuple[Path, Path]:
    """A program that runs ffmpeg under the process id which it first adds to a list, and the list."""
    program, children = folder / "ffmpeg", folder / "children"
    program.write_text(f'#!/bin/sh\necho $$ >> "{children}"\nexec "{ffmpeg_path()}" "$@"\n')
    program.chmod(0o755)
    return program, children


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_rendering_and_leave_nothing(workplace, write_tone, tmp_path, number, code):
    audio = write_tone(16_000 * 600)
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--inference"]
    command += ["--template_id", "小哈 (1)", "--cache_dir", "cache", "--audio_path", str(audio)]
    command += ["--output_path", "long/long.mp4", "--frames_dir", "long/frames"]
    recorder, children = recording_ffmpeg(tmp_path)
    process = subprocess.Popen(
        command,
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FFMPEG_BINARY": str(recorder)},
    )
    while not list(workplace.glob("long/frames/.*.tmp/00000010.png")):
        assert process.poll() is None
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == code and json.loads(stdout)["error_code"] == "interrupted"
    assert not leftovers(workplace) and not (workplace / "long" / "long.mp4").exists()
    pids = [int(line) for line in children.read_text().split()]
    assert len(pids) >= 3  # the probe, the decoder, the encoder
    assert not [pid for pid in pids if is_running(pid)]


HEAVY = (
    "torch",
    "transformers",
    "diffusers",
    "mediapipe",
    "cv2",
    "onnxruntime",
    "matplotlib",
    "numpy",
    "PIL",
)


def imported(code: str, cwd: Path) -> set[str]:
    show = f"import sys\n{code}\nsys.stderr.write('\\n' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", show],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    return set(done.stderr.splitlines()[-1].split()) if done.stderr else set()


@pytest.mark.parametrize(
    "code",
    [
        "import musetalk.cli",
        "from musetalk.cli import *\nimport musetalk.cli as c\nc.execute(c.service_main, ['--service_info'])",
        "import musetalk.cli as c\nc.execute(c.service_main, ['--check_cache', '--cache_dir', 'cache'])",
        "import integrated_musetalk_service, enhanced_musetalk_preprocessing, ultra_fast_realtime_inference",
    ],
)
def test_quick_commands_import_nothing_heavy(workplace, code):
    assert not imported(code, workplace)


def test_lite_inference_imports_no_framework(workplace):
    code = (
        "import musetalk.cli as c\n"
        "argv = ['--inference', '--template_id', '小哈 (1)', '--cache_dir', 'cache']\n"
        "argv += ['--output_path', 'i.mp4']\n"
        f"assert c.execute(c.service_main, [*argv, '--audio_path', {str(SPEECH)!r}])[1] == 0"
    )
    assert not imported(code, workplace) & {"torch", "transformers", "diffusers", "mediapipe", "matplotlib"}


STUCK = """
import hashlib, sys
sys.stderr.write("loading\\n")
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # minutes in a library, deaf to signals
"""


@pytest.fixture(params=["an engine", "an import"])
def slow_load(request, tmp_path) -> str:
    """Code after which lite's engine, or a package that it imports, takes minutes to load."""
    if request.param == "an import":
        (tmp_path / "onnxruntime.py").write_text(STUCK)
        return f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    load = "from musetalk.engines.lite.engine import LiteEngine as Engine"
    return f"{load}\nEngine.__init__ = lambda *_, **__: exec({STUCK!r})"


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_load_that_is_deep_in_a_library(workplace, tmp_path, slow_load, number, code):
    script = f"{slow_load}\nfrom musetalk import cli\ncli.run(cli.service_main)\n"
    command = [
        sys.executable,
        "-c",
        script,
        "--inference",
        "--template_id",
        "小哈 (1)",
        "--cache_dir",
        "cache",
    ]
    process = subprocess.Popen(
        [*command, "--audio_path", str(SPEECH), "--output_path", str(tmp_path / "o.mp4")],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        while process.stderr.readline() != b"loading\n":
            assert process.poll() is None
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    answer = json.loads(stdout)
    assert process.returncode == code and answer.keys() == FAILURE_KEYS
    assert (answer["error_code"], answer["template_id"]) == ("interrupted", "小哈 (1)")
    assert "interrupted 已中断" in stderr.decode()
    assert not (tmp_path / "o.mp4").exists()
