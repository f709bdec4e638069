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
from musetalk.errors import CancelledRun, InputError
from musetalk.pipeline import StageClock
from musetalk.rendering import Conduct, OpenedTemplate, Position, RenderingInfo, Request, render


@dataclass(frozen=True)
class InferenceResult:
    """What one request made and what it cost.

    Attributes:
        duration: seconds of video.
        processing_time: seconds from the call to the finished file.
        time_to_first_frame: seconds until the encoder had the first frame.
        stages: seconds each stage worked, waiting left out.
        intervals: (start, end) seconds of each stage's work, when they were recorded.
        vae_decoder: "full" or "tiny" of engine musetalk; None for engines without one.
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
    vae_decoder: str | None = None


class TooShortError(InputError):
    """The sound completes no frame.

    Attributes:
        position: where the session stands behind it; what comes next may complete the frame.
    """

    def __init__(self, position: Position) -> None:
        super().__init__("the audio is shorter than one frame 音频太短", "use a longer recording")
        self.position = position


@dataclass(frozen=True)
class Files:
    """Where a request's sound comes from and where its pictures go.

    Attributes:
        audio: any file with sound.
        output: the video; it appears when it is complete.
        frames_dir: also takes each blended frame as PNG; None for none.
        earlier: sounds of the session that no video holds yet: heard in this one, before its own.
    """

    audio: Path
    output: Path
    frames_dir: Path | None = None
    earlier: tuple[Path, ...] = ()


def render_file(
    opened: OpenedTemplate,
    files: Files,
    request: Request,
    encoding: EncodingConfig,
    clock: StageClock,
    expected: int | None = None,
    conduct: Conduct | None = None,
) -> tuple[RenderingInfo, float]:
    """Renders all of `files.audio`; returns where it ended and the seconds to the first frame.

    Args:
        expected: frames to come, for the progress bar; None where it isn't known.

    Raises:
        InputError: the audio can't be read; `TooShortError` where it completes no frame.
        CancelledRun: it was cancelled; nothing is left.
        OutputError: the video or a frame can't be written; nothing is left of them.
    """
    from tqdm import tqdm

    from musetalk.media.audio import read_waveform
    from musetalk.media.frame_folder import FrameFolder
    from musetalk.media.video import VideoWriter

    width, height = opened.template.frame_size
    first_frame, conduct = 0.0, conduct or Conduct()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(FrameFolder(files.frames_dir)) if files.frames_dir else None
        writer = stack.enter_context(
            VideoWriter(
                files.output, width, height, request.fps, files.audio, encoding, earlier=files.earlier
            )
        )
        frames, info = render(opened, read_waveform(files.audio), request, clock)
        stack.enter_context(contextlib.closing(frames))
        bar = stack.enter_context(
            tqdm(
                total=expected,
                desc="render 渲染",
                unit="frame",
                disable=None if conduct.bar else True,
                file=sys.stderr,
            )
        )
        for count, frame in enumerate(frames, 1):
            with clock.stage("encode"):
                writer.write(frame.i420)
                if folder is not None:
                    folder.write(opened.compositor.compose_bgr(*frame.placed))
            first_frame = first_frame or time.perf_counter() - clock.started
            bar.update()
            if conduct.progress is not None:
                conduct.progress(count, expected)
        if request.cancel is not None and request.cancel.is_set():
            raise CancelledRun("the request was cancelled 已取消", "")
        if not writer.frame_count:
            raise TooShortError(info.position)
        with clock.stage("encode"):
            writer.close()
    return info, first_frame
