"""Measure the lips of a video: `python -m musetalk.training.evaluate VIDEO [--reference VIDEO]`.

A face mesh on every frame gives distances on the mouth, whoever rendered it: the lite engine, MuseTalk, or a
camera. They are compared with a reference video of the same speech, or with phone labels (lines of
``phone start end``, in seconds, ARPAbet) given by --labels; the sound itself tells where silence is.
Distances are divided by the eye distance in the same frame: neither the face's size nor a zoom counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.errors import InputError, MuseTalkError, NoFaceError
from musetalk.faces.head import (
    CHIN,
    INNER_BOTTOM,
    INNER_LEFT_CORNER,
    INNER_RIGHT_CORNER,
    INNER_TOP,
    LEFT_CORNER,
    MESH_POINTS,
    MOVED_BY_SPEECH,
    NOSE_BASE,
    OUTER_BOTTOM,
    OUTER_TOP,
    RIGHT_CORNER,
    STILL_IN_SPEECH,
    UPPER_FACE,
    distance,
    eye_distance,
)
from musetalk.native_messages import NativeMessages
from musetalk.training import scores
from musetalk.training.phones import DIPHTHONGS, SHAPES, Phone, closures
from musetalk.training.plots import Panel, draw_panels

logger = logging.getLogger(__name__)

_DISTANCES = {
    "opening": (INNER_TOP, INNER_BOTTOM),
    "inner_width": (INNER_RIGHT_CORNER, INNER_LEFT_CORNER),
    "outer_height": (OUTER_TOP, OUTER_BOTTOM),
    "outer_width": (RIGHT_CORNER, LEFT_CORNER),
    "upper_lip": (NOSE_BASE, INNER_TOP),
    "lower_lip": (NOSE_BASE, INNER_BOTTOM),
    "chin": (NOSE_BASE, CHIN),
    "upper_lip_thickness": (OUTER_TOP, INNER_TOP),
    "lower_lip_thickness": (INNER_BOTTOM, OUTER_BOTTOM),
}
TRACK_NAMES = (*_DISTANCES, "protrusion")
"""Columns of a track; the same as those of the training command's folders of tracks."""
SILENT = -2.5  # bel under the speaker's level
SILENCE_AFTER = 0.25  # s of silence before stillness is asked for
TUCKED = 1.0  # deviations by which the lower lip gets thinner in f and v


@dataclass(frozen=True)
class MouthTracks:
    """What a face mesh shows of a video's mouth.

    Attributes:
        fps: frames per second.
        tracks: (frames, 10) float32, columns `TRACK_NAMES`, in eye distances; NaN without a face.
        points: (frames, 478, 2) float32, in the video's median eye distance; NaN without a face.
        sharpness: (frames,) mean square of the Laplacian round the mouth over that of the upper face.
    """

    fps: float
    tracks: np.ndarray
    points: np.ndarray
    sharpness: np.ndarray

    def track(self, name: str) -> np.ndarray:
        """(frames,) one column of `tracks`."""
        return self.tracks[:, TRACK_NAMES.index(name)]


def mouth_distances(mesh: np.ndarray, mesh_z: np.ndarray) -> np.ndarray:
    """(10,) `TRACK_NAMES` of one mesh (478, 2) with depth (478,), both in pixels, in eye distances."""
    lengths = [distance(mesh, first, second) for first, second in _DISTANCES.values()]
    middles = mesh_z[[INNER_TOP, INNER_BOTTOM, OUTER_TOP, OUTER_BOTTOM]].mean()
    protrusion = middles - mesh_z[[RIGHT_CORNER, LEFT_CORNER]].mean()
    return np.array([*lengths, protrusion], np.float32) / np.float32(eye_distance(mesh))


def _sharpness(frame: np.ndarray, mesh: np.ndarray) -> float:
    """Fine detail of the lower face against the upper: mean squares of the Laplacian."""
    import cv2

    def detail(points: Sequence[int]) -> float:
        x1, y1 = np.maximum(mesh[list(points)].min(0).astype(int), 0)
        x2, y2 = mesh[list(points)].max(0).astype(int)
        patch = frame[y1 : y2 + 1, x1 : x2 + 1]
        if patch.size == 0:
            return float("nan")
        return float((cv2.Laplacian(cv2.cvtColor(patch, cv2.COLOR_BGR2GRAY), cv2.CV_64F) ** 2).mean())

    upper = detail(UPPER_FACE)
    return detail((*MOVED_BY_SPEECH, CHIN)) / upper if upper > 0 else float("nan")


def measure_video(path: Path) -> MouthTracks:
    """The mouth of the largest face in each frame of a video.

    Raises:
        InputError: the video can't be read.
        NoFaceError: no frame shows a face.
    """
    from musetalk.faces.mediapipe import MediapipeDetector
    from musetalk.media.video import probe_video, read_video

    detector = MediapipeDetector(video=True)
    tracks, points, sharpness = [], [], []
    for frame in read_video(path):
        mesh = np.full((MESH_POINTS, 2), np.nan, np.float32)
        distances = np.full(len(TRACK_NAMES), np.nan, np.float32)
        sharp = float("nan")
        faces = detector.detect(frame)
        if faces and faces[0].mesh is not None and faces[0].mesh_z is not None:
            distances = mouth_distances(faces[0].mesh, faces[0].mesh_z)
            mesh = faces[0].mesh
            sharp = _sharpness(frame, faces[0].mesh)
        tracks.append(distances)
        points.append(mesh)
        sharpness.append(sharp)
    if not tracks or not np.isfinite(np.array(tracks)).any():
        raise NoFaceError(f"no frame of {path} shows a face", "measure a video with a larger, frontal face")
    meshes = np.array(points)
    eyes = np.nanmedian(eye_distance(meshes))
    fps = float(probe_video(path).fps)
    return MouthTracks(fps, np.array(tracks), meshes / eyes, np.array(sharpness, np.float32))


def read_labels(path: Path) -> list[Phone]:
    """Phones of a text file of ``phone start end`` lines; ``sil`` and the like count as silence.

    Raises:
        InputError: a line isn't of this form.
    """
    phones = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            name, start, end = line.split()
            known = name.lower().rstrip("012")
            phones.append(
                Phone(known if known in SHAPES or known in DIPHTHONGS else "pau", float(start), float(end))
            )
        except ValueError as e:
            raise InputError(f"line {number} of {path} is {line!r}", "write: phone start end") from e
    return phones


def silent_frames(path: Path, fps: float, n_frames: int) -> np.ndarray:
    """(n_frames,) where the video's sound has been silent for `SILENCE_AFTER`; all False without sound."""
    from musetalk.engines.lite.speech import SpeechLevel, loudness, step_powers
    from musetalk.media.audio import read_waveform
    from musetalk.whisper import STEP_SAMPLES, STEPS_PER_SECOND

    try:
        waveform = np.concatenate(list(read_waveform(path)))
    except InputError:
        return np.zeros(n_frames, bool)
    powers = step_powers(waveform, len(waveform) // STEP_SAMPLES)
    quiet = loudness(powers, SpeechLevel().update(powers)) < SILENT
    length = int(SILENCE_AFTER * STEPS_PER_SECOND)
    lasting = np.convolve(quiet, np.ones(length), mode="full")[: len(quiet)] >= length
    steps = ((np.arange(n_frames) + 0.5) / fps * STEPS_PER_SECOND).astype(int)
    return lasting[np.minimum(steps, len(lasting) - 1)]


def resampled_track(track: np.ndarray, fps: float, wanted_fps: float, n_frames: int) -> np.ndarray:
    """A track (n,) at another frame rate, (n_frames,), linear between frame middles, NaN beyond its end."""
    times = (np.arange(n_frames) + 0.5) / wanted_fps
    return np.interp(times, (np.arange(len(track)) + 0.5) / fps, track, right=np.nan)


def _own_scores(measured: MouthTracks, silent: np.ndarray) -> dict[str, Any]:
    """What the video shows by itself."""
    opening = measured.track("opening")
    spread = scores.opening_range(opening)
    still = float(np.nanstd(opening[silent]) / spread) if silent.sum() > 2 and spread > 0 else float("nan")
    return {
        "frames": len(measured.tracks),
        "fps": measured.fps,
        "frames_without_face": int(np.isnan(opening).sum()),
        "opening_range": spread,
        "silence_deviation": still,
        "jitter_mouth": scores.jitter(measured.points[:, MOVED_BY_SPEECH]),
        "jitter_elsewhere": scores.jitter(measured.points[:, STILL_IN_SPEECH]),
        "sharpness": float(np.nanmedian(measured.sharpness)),
    }


def compare_tracks(measured: MouthTracks, reference: MouthTracks) -> dict[str, Any]:
    """Agreement of opening, width and protrusion with those of another video of the same speech."""
    result = {}
    for key, name in (("opening", "opening"), ("width", "outer_width"), ("protrusion", "protrusion")):
        truth = resampled_track(reference.track(name), reference.fps, measured.fps, len(measured.tracks))
        found = scores.agreement(measured.track(name), truth, measured.fps)
        result[key] = {"r": found.r, "best_r": found.best_r, "lag": found.lag}
    return result


def compare_labels(measured: MouthTracks, phones: Sequence[Phone]) -> dict[str, Any]:
    """Whether the lips meet on p, b, m and the lower lip tucks on f, v."""
    thickness = measured.track("lower_lip_thickness")
    thinness = (np.nanmedian(thickness) - thickness) / (np.nanstd(thickness) + 1e-9)
    tucks = [(phone.start, phone.end) for phone in phones if phone.name in ("f", "v")]
    return {
        "closure_rate": scores.closure_rate(measured.track("opening"), measured.fps, closures(phones)),
        "tuck_f": scores.f_score(thinness, measured.fps, tucks, TUCKED),
    }


def evaluate(
    video: Path, reference: Path | None = None, labels: Path | None = None, output: Path | None = None
) -> dict[str, Any]:
    """All scores of a video, as one JSON-ready dict; `output` is a folder for scores.json and tracks.png.

    Raises:
        InputError: a file can't be read.
        NoFaceError: a video shows no face.
    """
    measured = measure_video(video)
    silent = silent_frames(video, measured.fps, len(measured.tracks))
    result: dict[str, Any] = {"video": str(video), **_own_scores(measured, silent)}
    curves = {name: {"video": measured.track(name)} for name in ("opening", "outer_width", "protrusion")}
    if reference:
        other = measure_video(reference)
        result |= {"reference": str(reference), **compare_tracks(measured, other)}
        for name, shown in curves.items():
            shown["reference"] = resampled_track(
                other.track(name), other.fps, measured.fps, len(measured.tracks)
            )
    if labels:
        result |= {"labels": str(labels), **compare_labels(measured, read_labels(labels))}
    if output:
        _write(output, result, [Panel(name, shown, measured.fps) for name, shown in curves.items()])
    return result


def json_text(result: dict[str, Any]) -> str:
    """The result as JSON; what could not be measured is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps(plain(result), ensure_ascii=False, indent=2)


def _write(output: Path, result: dict[str, Any], panels: Sequence[Panel]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "scores.json").write_text(json_text(result), encoding="utf-8")
    draw_panels(panels, output / "tracks.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; writes the scores to stdout and returns the exit code."""
    parser = argparse.ArgumentParser(description="measure the lips of a talking video")
    parser.add_argument("video", type=Path)
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--reference", type=Path, help="video of the same speech to compare with")
    compared.add_argument("--labels", type=Path, help="text file of 'phone start end' lines")
    parser.add_argument("--output", type=Path, help="folder for scores.json and tracks.png")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result = evaluate(options.video, options.reference, options.labels, options.output)
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    sys.stdout.buffer.write(json_text(result).encode() + b"\n")
    return 0


if __name__ == "__main__":
    with contextlib.closing(NativeMessages()):
        raise SystemExit(main())
