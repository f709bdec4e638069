"""The contact sheet, drawn from a video that the writer made of a still."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np

from musetalk.config import EncodingConfig
from musetalk.media.image import read_image
from musetalk.media.video import VideoWriter
from musetalk.tools.contact_sheet import main, track_video


def test_sheet_measures_a_still_mouth_and_is_a_picture(tmp_path, portrait, speech):
    frame = read_image(portrait)
    video = tmp_path / "still.mp4"
    with VideoWriter(video, 512, 512, Fraction(25), speech, EncodingConfig(), pixel_format="bgr24") as writer:
        for _ in range(30):
            writer.write(frame)
    track = track_video(video)
    assert len(track.times) == 30 and len(track.shown) == 12
    assert np.ptp(track.opening) < 0.05 and 0 <= track.opening[0] < 0.2
    picture = tmp_path / "still.sheet.png"
    command = [sys.executable, "-m", "musetalk.tools.contact_sheet", str(video)]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert run.stderr == f"{picture}\n", "what native libraries chat about is kept away"
    sheet = read_image(picture)
    assert sheet.shape[1] > 1000 and sheet.std() > 10


def test_a_missing_video_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "none.mp4")]) == 3
    assert "none.mp4" in capsys.readouterr().err
