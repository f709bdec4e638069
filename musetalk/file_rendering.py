"""One request from files to files: a sound file's speech on an open template into a video file.

The caller's thread feeds the encoder, so that a signal or an error there stops every stage at once.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from musetalk.config import EncodingConfig
from musetalk.device import Device
from musetalk.errors import InputError
from musetalk.pipeline import StageClock
from musetalk.rendering import OpenedTemplate, Request, render


@dataclass(frozen=True)
class InferenceResult:
    """What one request made and what it cost.

    Attributes:
        duration: seconds of video.
        processing_time: seconds from the call to the finished file.
        time_to_first_frame: seconds until the encoder had the first frame.
        stages: seconds each stage worked, waiting left out.
        intervals: (start, end) seconds of each stage's work, when they were recorded.
    """

    template_id: str
    audio_path: str
    output_path: str
    fps: Fraction
    frames: int
    duration: float
    processing_time: float
    time_to_first_frame: float
    stages: dict[str, float]
    intervals: dict[str, list[tuple[float, float]]]
    engine: str
    device: Device
    dtype: str


@dataclass(frozen=True)
class Files:
    """Where a request's sound comes from and where its pictures go.

    Attributes:
        audio: any file with sound.
        output: the video; it appears when it is complete.
        frames_dir: also takes each blended frame as PNG; None for none.
    """

    audio: Path
    output: Path
    frames_dir: Path | None = None


def render_file(
    opened: OpenedTemplate,
    files: Files,
    request: Request,
    encoding: EncodingConfig,
    clock: StageClock,
    expected: int | None = None,
) -> tuple[int, float]:
    """Renders all of `files.audio`; returns the number of frames and the seconds to the first one.

    Args:
        expected: frames to come, for the progress bar; None where it isn't known.

    Raises:
        InputError: the audio can't be read or is shorter than one frame.
        OutputError: the video or a frame can't be written; nothing is left of them.
    """
    from tqdm import tqdm

    from musetalk.media.audio import read_waveform
    from musetalk.media.frame_folder import FrameFolder
    from musetalk.media.video import VideoWriter

    width, height = opened.template.frame_size
    count, first_frame = 0, 0.0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(FrameFolder(files.frames_dir)) if files.frames_dir else None
        writer = stack.enter_context(
            VideoWriter(files.output, width, height, request.fps, files.audio, encoding=encoding)
        )
        frames, _ = render(opened, read_waveform(files.audio), request, clock)
        stack.enter_context(contextlib.closing(frames))
        bar = stack.enter_context(
            tqdm(total=expected, desc="render 渲染", unit="frame", disable=None, file=sys.stderr)
        )
        for frame in frames:
            with clock.stage("encode"):
                writer.write(frame.i420)
                if folder is not None:
                    folder.write(opened.compositor.compose_bgr(*frame.placed))
            first_frame = first_frame or time.perf_counter() - clock.started
            count += 1
            bar.update()
        if not count:
            raise InputError("the audio is shorter than one frame 音频太短", "use a longer recording")
        with clock.stage("encode"):
            writer.close()
    return count, first_frame
