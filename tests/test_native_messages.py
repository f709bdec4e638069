"""Native chatter stays out of what a caller reads; everything else comes through, whole and in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from musetalk.config import REPOSITORY

CODE = """
import logging, os, sys
from musetalk.native_messages import NativeMessages
native = NativeMessages()
logging.basicConfig(level=int(sys.argv[1]), stream=sys.stderr, format="%(message)s")
os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\\n")
os.write(2, "a library's last words \u6a21\u578b\\n".encode())
sys.stderr.write("python\\n")
os.write(2, b"W0000 00:00:17.660 1 inference_feedback_manager.cc:114] Feedback manager\\nno line's end")
native.close()
os.write(2, b"|after")
"""


def _stderr(level: int) -> str:
    code = CODE.replace("\\\\", "\\")
    done = subprocess.run(
        [sys.executable, "-c", code, str(level)], cwd=REPOSITORY, capture_output=True, check=True
    )
    return done.stdout.decode() + done.stderr.decode()


def test_chatter_is_kept_back_and_the_rest_comes_through():
    heard = _stderr(30)
    assert "TensorFlow" not in heard and "feedback" not in heard
    assert "a library's last words \u6a21\u578b\n" in heard and "python\n" in heard
    assert heard.endswith("no line's end|after")


def test_chatter_is_in_the_debug_log():
    assert "native: INFO: Created TensorFlow Lite" in _stderr(10)


def test_a_command_that_finds_faces_says_nothing_of_native_code(tmp_path: Path, portrait: Path):
    command = [sys.executable, str(REPOSITORY / "enhanced_musetalk_preprocessing.py"), "--engine", "lite"]
    command += ["--template_id", "t", "--template_image_path", str(portrait), "--cache_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b"" and done.stdout.startswith(b"{")
