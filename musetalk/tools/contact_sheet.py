"""A picture of a talking video: frames over the waveform, with the mouth opening measured on the frames.

`python -m musetalk.tools.contact_sheet VIDEO [PICTURE]`. The opening is measured by a face mesh on the
finished video, not taken from the engine, so that the sheet shows what a viewer sees.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musetalk.errors import MuseTalkError
from musetalk.faces.head import mouth_opening
from musetalk.files import atomic_file
from musetalk.geometry import Box, bounding_box, clamp_box, crop_box
from musetalk.native_messages import NativeMessages

N_SHOWN = 12  # frames in the row above the waveform
SHOWN_HEIGHT = 220  # pixels


@dataclass(frozen=True)
class VideoTrack:
    """What a contact sheet shows.

    Attributes:
        times: (T,) seconds, the middle of each frame's time on screen.
        opening: (T,) distance of the inner lips over that of the outer eye corners; NaN without a face.
        shown: evenly spaced frames, uint8 BGR, with their times.
    """

    times: np.ndarray
    opening: np.ndarray
    shown: list[tuple[float, np.ndarray]]


def face_meshes(frames: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Each frame of a video with its (478, 2) face mesh; None where no face is seen."""
    from musetalk.faces.mediapipe import MediapipeDetector

    detector = MediapipeDetector(video=True)
    for frame in frames:
        faces = detector.detect(frame)
        yield frame, faces[0].mesh if faces else None


def _close_up(frame: np.ndarray, box: Box) -> np.ndarray:
    """The face of `frame` at `SHOWN_HEIGHT`."""
    import cv2

    x1, y1, x2, y2 = clamp_box(crop_box(box), *frame.shape[:2])
    scale = SHOWN_HEIGHT / (y2 - y1)
    return cv2.resize(frame[y1:y2, x1:x2], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def track_video(video: Path) -> VideoTrack:
    """Measures a video.

    Raises:
        InputError: the video can't be read.
    """
    from musetalk.media.video import probe_video, read_video

    openings: list[float] = []
    pictures: list[np.ndarray] = []
    box: Box | None = None
    for frame, mesh in face_meshes(read_video(video)):
        openings.append(float("nan") if mesh is None else float(mouth_opening(mesh)))
        if box is None and mesh is not None:
            box = bounding_box(mesh)
        pictures.append(_close_up(frame, box or (0, 0, frame.shape[1], frame.shape[0])))
    times = (np.arange(len(openings)) + 0.5) / float(probe_video(video).fps)
    chosen = np.linspace(0, len(pictures) - 1, min(N_SHOWN, len(pictures))).round().astype(int)
    return VideoTrack(times, np.array(openings), [(float(times[i]), pictures[i]) for i in chosen])


def draw_sheet(track: VideoTrack, waveform: np.ndarray, picture: Path) -> None:
    """Writes the sheet as PNG.

    Args:
        waveform: (n,) float32 at 16 kHz.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from musetalk.media.audio import SAMPLE_RATE

    figure = Figure(figsize=(18, 5.2), dpi=100)
    grid = figure.add_gridspec(
        2, len(track.shown), height_ratios=(1, 1.6), hspace=0.05, wspace=0.03, left=0.02, right=0.95, top=0.97
    )
    for column, (time, frame) in enumerate(track.shown):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(frame[:, :, ::-1], interpolation="lanczos")
        axes.set_title(f"{time:.2f} s", fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    peak = float(np.abs(waveform).max()) or 1.0
    axes.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform / peak, color="0.75", linewidth=0.4)
    axes.set(xlim=(0, track.times[-1]), ylim=(-1, 1), yticks=(), xlabel="seconds")
    for time, _ in track.shown:
        axes.axvline(time, color="0.5", linewidth=0.5, linestyle=":")
    opening = axes.twinx()
    opening.plot(track.times, track.opening, color="tab:red", linewidth=1.4)
    opening.set_ylim(0, max(0.2, float(np.nanmax(track.opening, initial=0.0)) * 1.1))
    opening.set_ylabel("mouth opening / eye distance", color="tab:red")
    with atomic_file(picture) as stream:
        FigureCanvasAgg(figure).print_png(stream)


def contact_sheet(video: Path, picture: Path) -> None:
    """Measures `video` and draws its sheet into `picture`.

    Raises:
        InputError: the video can't be read or has no sound.
        OutputError: the picture can't be written.
    """
    from musetalk.media.audio import read_waveform

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    draw_sheet(track_video(video), np.concatenate(list(read_waveform(video))), picture)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Frames of a talking video over its waveform")
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="default: VIDEO.sheet.png")
    arguments = parser.parse_args(argv)
    picture = arguments.picture or arguments.video.with_suffix(".sheet.png")
    try:
        contact_sheet(arguments.video, picture)
    except MuseTalkError as e:
        sys.stderr.write(f"{e.message}\n{e.hint}\n")
        return e.exit_code
    sys.stderr.write(f"{picture}\n")
    return 0


if __name__ == "__main__":
    with contextlib.closing(NativeMessages()):
        raise SystemExit(main())
