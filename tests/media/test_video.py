"""Videos written here are opened again by ffmpeg on its own; videos read here were written by it."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from musetalk.config import REPOSITORY, EncodingConfig, parse_fps
from musetalk.errors import InputError, OutputError
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.video import (
    PixelFormat,
    VideoReader,
    VideoWriter,
    check_output_path,
    encoder_options,
    probe_video,
    read_video,
)
from musetalk.whisper import frame_count
from tests.media.conftest import ends

FAST = EncodingConfig(preset="ultrafast")
LOSSLESS = EncodingConfig(preset="ultrafast", crf=0)
WriteTone = Callable[..., Path]


def run_ffmpeg(*arguments: object) -> bytes:
    command = [ffmpeg_path(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def ffmpeg_version() -> int:
    """The major version; that of builds named after their date or commit is taken for a new one."""
    shown = subprocess.run([ffmpeg_path(), "-version"], stdout=subprocess.PIPE, check=True).stdout.decode()
    found = re.match(r"ffmpeg version n?(\d+)\.", shown)
    return int(found[1]) if found else 99


VERSION = ffmpeg_version()
SILENT_TAIL = Fraction(0) if VERSION >= 6 else Fraction(1024, 44_100)
"""Seconds that a decoder adds to what the edit list shows: older ones play the last packet whole."""


def describe(path: Path) -> str:
    command = [ffmpeg_path(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, stderr=subprocess.PIPE).stderr.decode("utf-8", "replace")


@dataclass
class Reopened:
    """A file as ffmpeg's demuxer and decoders see it."""

    n_frames: int
    picture_end: Fraction  # seconds
    frame_times: list[Fraction]  # seconds
    sound_end: Fraction  # seconds


def reopen(path: Path) -> Reopened:
    report = run_ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-f", "framecrc", "-").decode()
    base = re.search(r"#tb 0: (\d+)/(\d+)", report)
    assert base
    tick = Fraction(int(base[1]), int(base[2]))
    rows = [line.split(",") for line in report.splitlines() if line.startswith("0,")]
    times = sorted(int(row[2]) * tick for row in rows)
    sound = run_ffmpeg("-i", path, "-map", "0:a", "-ac", 1, "-ar", 48_000, "-f", "s16le", "-")
    return Reopened(len(rows), times[-1] + int(rows[-1][3]) * tick, times, Fraction(len(sound) // 2, 48_000))


def planes(path: Path, width: int, height: int) -> np.ndarray:
    """Decoded I420 (n, height × 3 // 2, width)."""
    data = run_ffmpeg("-i", path, "-map", "0:v", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-")
    return np.frombuffer(data, np.uint8).reshape(-1, height * 3 // 2, width)


def picture(width: int, height: int) -> np.ndarray:
    """Smooth BGR with every kind of colour."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, 255 - (x + y) * 255 // (width + height)]
    return np.stack(channels, axis=2).astype(np.uint8)


def write(path: Path, buffers: list[np.ndarray], **changes: Any) -> None:
    settings: dict[str, Any] = {
        "width": 64,
        "height": 48,
        "fps": Fraction(25),
        "audio_path": None,
        "encoding": FAST,
        "pixel_format": "bgr24",
    }
    with VideoWriter(path, **(settings | changes)) as writer:
        for buffer in buffers:
            writer.write(buffer)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("fps", ["23.976", "25", "29.97", "50", "60"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_all_frames_are_in_the_file_and_sound_ends_with_them(
    tmp_path: Path, write_tone: WriteTone, suffix: str, fps: str
) -> None:
    rate = parse_fps(fps)
    n_samples = 16_000 * 3 + 123
    n_frames = frame_count(n_samples, rate)
    path = tmp_path / f"out{suffix}"
    write(path, [picture(64, 48)] * n_frames, fps=rate, audio_path=write_tone(n_samples))
    file = reopen(path)
    clock = Fraction(1, 1000) if suffix in (".mkv", ".webm") else Fraction(0)  # Matroska counts milliseconds
    assert file.n_frames == n_frames
    start = file.frame_times[0]
    assert all(abs(time - start - i / rate) <= clock for i, time in enumerate(file.frame_times))
    assert abs(file.picture_end - start - n_frames / rate) <= clock
    assert abs(file.sound_end - file.picture_end) <= 1 / rate + clock + SILENT_TAIL
    assert probe_video(path).fps == rate
    assert names(tmp_path) == sorted(["tone.wav", path.name])


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 192_000])
def test_sound_of_any_rate_keeps_its_length(tmp_path: Path, write_tone: WriteTone, rate: int) -> None:
    sound = write_tone(int(rate * 1.01), rate)
    write(tmp_path / "out.mp4", [picture(64, 48)] * 60, fps=Fraction(60), audio_path=sound)
    assert abs(reopen(tmp_path / "out.mp4").sound_end - Fraction(101, 100)) < Fraction(1, 500) + SILENT_TAIL


def test_mp4_holds_h264_and_aac_with_its_index_in_front(tmp_path: Path, write_tone: WriteTone) -> None:
    write(tmp_path / "out.mp4", [picture(64, 48)] * 25, audio_path=write_tone(16_000))
    description = describe(tmp_path / "out.mp4")
    assert "Video: h264" in description
    assert "Audio: aac" in description
    assert "yuv420p(tv, smpte170m" in description
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_webm_holds_vp9_and_opus_whatever_the_encoder(tmp_path: Path, write_tone: WriteTone) -> None:
    write(tmp_path / "OUT.WEBM", [picture(64, 48)] * 5, audio_path=write_tone(3_200))
    description = describe(tmp_path / "OUT.WEBM")
    assert "Video: vp9" in description
    assert "Audio: opus" in description


def test_a_late_start_or_gap_in_the_source_shifts_nothing(tmp_path: Path, write_tone: WriteTone) -> None:
    """The encoder hears the samples as `read_waveform` gave them, without the source's time stamps."""
    late = tmp_path / "late.mkv"
    run_ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "color=s=64x64:d=2",
        "-itsoffset",
        1,
        "-i",
        write_tone(16_000),
        "-c:a",
        "flac",
        late,
    )
    write(tmp_path / "out.mp4", [picture(64, 48)] * 25, audio_path=late)
    assert abs(reopen(tmp_path / "out.mp4").sound_end - 1) < Fraction(1, 500) + SILENT_TAIL


@pytest.mark.parametrize(("width", "height"), [(64, 48), (63, 47), (64, 47), (17, 48)])
def test_planes_arrive_unchanged(tmp_path: Path, width: int, height: int) -> None:
    even_width, even_height = width + width % 2, height + height % 2
    frame = cv2.copyMakeBorder(picture(width, height), 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    buffer = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
    path = tmp_path / "out.mp4"
    write(path, [buffer] * 3, width=width, height=height, encoding=LOSSLESS, pixel_format="yuv420p")
    np.testing.assert_array_equal(planes(path, even_width, even_height), [buffer] * 3)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (63, 47), (64, 47), (17, 48)])
def test_bgr_frames_are_converted_as_opencv_does_and_padded_by_their_edge(
    tmp_path: Path, width: int, height: int
) -> None:
    padded = cv2.copyMakeBorder(picture(width, height), 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    path = tmp_path / "out.mp4"
    write(path, [picture(width, height)] * 2, width=width, height=height, encoding=LOSSLESS)
    decoded = planes(path, padded.shape[1], padded.shape[0]).astype(int)
    difference = np.abs(decoded - cv2.cvtColor(padded, cv2.COLOR_BGR2YUV_I420))
    assert difference[:, : padded.shape[0]].max() <= 1
    assert (
        difference[:, padded.shape[0] :].mean() < 4
    )  # OpenCV takes one pixel's chroma, ffmpeg the mean of four


@pytest.mark.parametrize("pixel_format", ["yuv420p", "bgr24"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_colours_survive_the_way_there_and_back(
    tmp_path: Path, suffix: str, pixel_format: PixelFormat
) -> None:
    frame = picture(16, 12).repeat(8, axis=0).repeat(8, axis=1)
    buffer = frame if pixel_format == "bgr24" else cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
    path = tmp_path / f"out{suffix}"
    write(path, [buffer] * 3, width=128, height=96, pixel_format=pixel_format)
    difference = next(read_video(path)).astype(int) - frame
    assert np.abs(difference).mean() < 3
    assert np.abs(difference.mean(axis=(0, 1))).max() < 1.5  # swscale of ffmpeg 5 makes red 1.3 brighter


def test_the_same_frames_make_the_same_bytes(tmp_path: Path, write_tone: WriteTone) -> None:
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, [picture(64, 48)] * 30, audio_path=write_tone(20_000))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "name", ["-o.mp4", "小哈 (2) 100%d.mp4", 'a\'b "c".mp4', "concat:x.mp4", "n" * 200 + ".mp4"]
)
def test_odd_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("the file system doesn't allow the name")
    write(Path(name), [picture(64, 48)] * 3)
    assert names(tmp_path) == [name]
    assert len(list(read_video(Path(name)))) == 3


def test_the_name_appears_only_when_the_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the old one")
    with VideoWriter(path, 64, 48, Fraction(25), None, FAST, "bgr24") as writer:
        for _ in range(10):
            writer.write(picture(64, 48))
            assert path.read_bytes() == b"the old one"
    assert len(list(read_video(path))) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_exception_leaves_nothing_behind(
    tmp_path: Path, children: Callable[[], list[int]], error: type[BaseException]
) -> None:
    with (
        pytest.raises(error),
        VideoWriter(tmp_path / "out.mp4", 64, 48, Fraction(25), None, FAST, "bgr24") as writer,
    ):
        for _ in range(50):
            writer.write(picture(64, 48))
        raise error
    assert names(tmp_path) == []
    assert children() == []


def test_abort_from_outside_then_close_is_harmless(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", 64, 48, Fraction(25), None, FAST, "bgr24")
    writer.write(picture(64, 48))
    writer.abort()
    writer.abort()
    writer.close()
    assert names(tmp_path) == []


def test_writing_after_abort_is_an_output_error(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", 64, 48, Fraction(25), None, FAST, "bgr24")
    writer.abort()
    with pytest.raises(OutputError):
        writer.write(picture(64, 48))


def test_an_unknown_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.mp4.*libnope") as caught:
        write(tmp_path / "out.mp4", [picture(64, 48)] * 100, encoding=EncodingConfig(encoder="libnope"))
    assert "--encoder" in caught.value.hint
    assert names(tmp_path) == []


def test_an_unknown_preset_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="preset"):
        write(tmp_path / "out.mp4", [picture(64, 48)] * 100, encoding=EncodingConfig(preset="hasty"))
    assert names(tmp_path) == []


def test_no_frames_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path / "out.mp4", [])
    assert names(tmp_path) == []


def test_sound_that_cannot_be_decoded_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "s.wav").write_text("no sound")
    with pytest.raises(OutputError, match="Invalid data"):
        write(tmp_path / "out.mp4", [picture(64, 48)] * 1000, audio_path=tmp_path / "s.wav")
    assert names(tmp_path) == ["s.wav"]


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX processes")
def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: ffmpeg meets the same failed write."""
    script = (
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from fractions import Fraction\n"
        "from musetalk.config import EncodingConfig\n"
        "from musetalk.errors import OutputError\n"
        "from musetalk.media.video import VideoWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)\n"
        "try:\n"
        "    with VideoWriter(sys.argv[1], 128, 96, Fraction(25), None, EncodingConfig(), 'bgr24') as file:\n"
        "        for _ in range(400):\n"
        "            file.write(noise)\n"
        "except OutputError as e:\n"
        "    print(e.message)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out.mp4")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert "out.mp4 can't be written" in told
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_encoder_is_an_output_error(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", 64, 48, Fraction(25), None, FAST, "bgr24")
    os.kill(writer._child._process.pid, signal.SIGKILL)
    with pytest.raises(OutputError, match=r"out\.mp4"), writer:
        while True:
            writer.write(picture(64, 48))
    assert names(tmp_path) == []


def test_a_wrong_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        write(tmp_path / "out.mp4", [picture(65, 48)])
    with pytest.raises(ValueError, match="float"):
        write(tmp_path / "out.mp4", [picture(64, 48).astype(np.float32)])
    with pytest.raises(ValueError, match="contiguous"):
        write(tmp_path / "out.mp4", [picture(128, 48)[:, ::2]])
    assert names(tmp_path) == []


def test_another_encoder_of_the_found_ffmpeg(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", [picture(64, 48)] * 5, encoding=EncodingConfig(encoder="mpeg4"))
    assert "Video: mpeg4" in describe(tmp_path / "out.mp4")


def test_a_webm_takes_another_encoder_than_h264() -> None:
    assert encoder_options(EncodingConfig(encoder="libx264"), ".webm")["vcodec"] == "libvpx-vp9"
    assert encoder_options(EncodingConfig(encoder="libsvtav1"), ".webm")["vcodec"] == "libsvtav1"


HELD_WRITER = """
import sys
from fractions import Fraction
from musetalk.config import EncodingConfig
from musetalk.media.video import VideoWriter
writer = VideoWriter(sys.argv[1], 64, 48, Fraction(25), None, EncodingConfig(), "bgr24")
print(writer._child._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs a handle on another's child (Linux)")
def test_a_killed_run_is_swept_by_the_next_one_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out [1].mp4"
    command = [sys.executable, "-c", HELD_WRITER, str(path)]
    runs = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    stranger = tmp_path / ".out [1].holiday.tmp.mp4"
    stranger.write_bytes(b"somebody's own")
    try:
        encoders = [int(run.stdout.readline()) for run in runs if run.stdout]
        assert len(names(tmp_path)) == 3
        for run, encoder, left in zip(runs, encoders, (3, 2), strict=True):
            run.kill()
            run.wait()
            assert ends(encoder)
            write(path, [picture(64, 48)] * 3)
            assert len(names(tmp_path)) == left
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert names(tmp_path) == sorted([stranger.name, path.name])


def test_output_path_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder 文" / "out.mp4"
    assert check_output_path(str(path)) == path
    assert path.parent.is_dir()
    assert names(path.parent) == []


@pytest.mark.parametrize("name", ["out.avi", "out", "out.mp4.txt"])
def test_output_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError) as caught:
        check_output_path(tmp_path / name)
    assert ".mp4, .mov, .mkv, .webm" in caught.value.hint


def test_output_path_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = tmp_path / "folder.mp4", tmp_path / "in.mp4"
    folder.mkdir()
    source.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for path, inputs in (
        (folder, []),
        (Path("in.mp4"), [source]),
        (source / "x.mp4", []),
        (Path("a\0.mp4"), []),
    ):
        with pytest.raises(OutputError) as caught:
            check_output_path(path, inputs)
        assert caught.value.hint
    os.link(source, tmp_path / "link.mp4")
    with pytest.raises(OutputError, match="input"):
        check_output_path(tmp_path / "link.mp4", [tmp_path / "other.wav", source])
    assert source.read_bytes() == b"x"


def test_output_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")  # what anybody but root meets, on every system

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="can't be written"):
        check_output_path(tmp_path / "out.mp4")


def numbered_video(
    path: Path, *options: object, n_frames: int = 10, size: str = "64x48", rate: str = "25"
) -> Path:
    """Frame i is grey level 20 × i."""
    source = f"color=s={size}:r={rate},format=gray,geq=lum=20*N,trim=end_frame={n_frames}"
    run_ffmpeg("-f", "lavfi", "-i", source, *options, path)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", ("-qp", 0)),
        ("v.mkv", ("-qp", 0)),
        ("v.mov", ("-c:v", "png")),
        ("v.webm", ("-lossless", 1)),
        ("v.avi", ("-c:v", "ffv1")),
    ],
)
def test_every_frame_once_and_in_order(tmp_path: Path, name: str, options: tuple[object, ...]) -> None:
    path = numbered_video(tmp_path / name, *options, "-pix_fmt", "rgb24" if "png" in options else "yuvj420p")
    levels = [int(frame.mean().round()) for frame in read_video(path)]
    assert np.abs(np.array(levels) - 20 * np.arange(10)).max() <= 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", ("-c:v", "libx264")),
        ("v.mkv", ("-c:v", "libx264")),
        ("v.ts", ("-c:v", "libx264")),
        ("late.ts", ("-c:v", "libx264", "-output_ts_offset", 700)),
        ("v.h264", ("-c:v", "libx264")),
        ("v.mpg", ("-c:v", "mpeg2video")),
        ("v.m2v", ("-c:v", "mpeg2video")),
    ],
)
def test_a_start_between_key_frames_is_kept(tmp_path: Path, name: str, options: tuple[object, ...]) -> None:
    every = ("-g", 100, "-bf", 0, "-q:v", 1, "-crf", 1, "-pix_fmt", "yuv420p")
    path = numbered_video(tmp_path / name, *options, *every, size="64x64")
    reader = VideoReader(path, start=0.159, seconds=0.16)
    levels = [int(frame.mean().round()) for frame in reader]
    assert len(levels) == 4
    assert np.abs(np.diff(levels) - 20).max() <= 6
    first = [int(frame.mean().round()) for frame in read_video(path)][4]
    assert abs(levels[0] - first) <= 3
    assert reader.times == pytest.approx([0, 0.04, 0.08, 0.12])


def test_frames_of_a_variable_rate_come_once_each(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    uneven = "color=s=64x48:r=25,format=gray,geq=lum=20*N,trim=end_frame=10,setpts=N*N/10/TB/25"
    run_ffmpeg(
        "-f", "lavfi", "-i", uneven, "-qp", 0, "-pix_fmt", "yuvj420p", "-enc_time_base", "1/1000", path
    )
    levels = np.array([frame.mean() for frame in read_video(path)])
    assert len(levels) == len(np.unique(levels.round()))
    assert 0 < probe_video(path).fps <= 240


def test_a_stream_that_changes_its_size_gives_frames_of_one_size(tmp_path: Path) -> None:
    parts = []
    for i, size in enumerate(("64x48", "96x72")):
        part = tmp_path / f"{i}.ts"
        source = f"color=c={('red', 'blue')[i]}:s={size}:r=10:d=1"
        run_ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-bf", 0, "-pix_fmt", "yuv420p", part)
        parts.append(part.read_bytes())
    (tmp_path / "joined.mp4").write_bytes(b"".join(parts))
    frames = list(read_video(tmp_path / "joined.mp4"))
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    blue = [int(frame[24, 32, 0]) > 128 for frame in frames]
    assert blue == sorted(blue) and blue.count(False) >= 9 and blue.count(True) == 10


def test_frames_are_arrays_of_their_own(tmp_path: Path) -> None:
    first, second = list(read_video(numbered_video(tmp_path / "v.mp4", n_frames=2)))
    assert first.shape == (48, 64, 3)
    assert first.dtype == np.uint8
    assert not np.shares_memory(first, second)
    first[:] = 0


@pytest.mark.parametrize("rate", ["24000/1001", "25", "30000/1001", "50", "60", "12"])
def test_probe(tmp_path: Path, rate: str) -> None:
    info = probe_video(numbered_video(tmp_path / "v.mp4", n_frames=12, rate=rate))
    assert (info.width, info.height, info.fps, info.frame_count) == (64, 48, Fraction(rate), 12)
    assert info.duration == pytest.approx(float(12 / Fraction(rate)), abs=0.01)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, degrees: int) -> None:
    frame = picture(64, 48)
    cv2.imwrite(str(tmp_path / "p.png"), frame)
    run_ffmpeg(
        "-i", tmp_path / "p.png", "-c:v", "libx264", "-qp", 0, "-pix_fmt", "yuv444p", tmp_path / "v.mp4"
    )
    turned = ("-display_rotation", degrees) if VERSION >= 6 else ()
    tagged = () if VERSION >= 6 else ("-metadata:s:v", f"rotate={degrees}")
    run_ffmpeg(*turned, "-i", tmp_path / "v.mp4", "-c", "copy", *tagged, tmp_path / "r.mp4")
    expected = np.rot90(frame, degrees // 90)
    (rotated,) = read_video(tmp_path / "r.mp4")
    assert rotated.shape == expected.shape
    assert np.abs(rotated.astype(int) - expected).mean() < 3
    info = probe_video(tmp_path / "r.mp4")
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize(("matrix", "levels"), [("bt709", "tv"), ("smpte170m", "tv"), ("smpte170m", "pc")])
def test_colour_tags_of_the_source_are_honoured(tmp_path: Path, matrix: str, levels: str) -> None:
    frame = picture(64, 48)
    cv2.imwrite(str(tmp_path / "p.png"), frame)
    scale = f"scale=out_color_matrix={matrix}:out_range={levels},format=yuv444p"
    tags = ("-colorspace", matrix, "-color_range", levels, "-color_primaries", matrix, "-color_trc", matrix)
    run_ffmpeg("-i", tmp_path / "p.png", "-vf", scale, "-c:v", "libx264", "-qp", 0, *tags, tmp_path / "v.mp4")
    difference = next(read_video(tmp_path / "v.mp4")).astype(int) - frame
    assert np.abs(difference.mean(axis=(0, 1))).max() < 1.5
    assert np.abs(difference).mean() < 2


def test_a_reader_that_stops_early_ends_the_child(tmp_path: Path, children: Callable[[], list[int]]) -> None:
    path = numbered_video(tmp_path / "v.mp4", n_frames=500, size="320x240")
    frames = read_video(path)
    next(frames)
    assert len(children()) == 1
    frames.close()  # type: ignore[attr-defined]
    assert children() == []


def assert_refused(path: Path, word: str) -> None:
    for read in (probe_video, lambda source: list(read_video(source))):
        with pytest.raises(InputError, match=word) as caught:
            read(path)
        assert caught.value.hint
        assert path.name in caught.value.message
        assert "\n" not in caught.value.message


def test_unusable_videos(tmp_path: Path, write_tone: WriteTone) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.mp4\n#EXT-X-ENDLIST\n"
    )
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=320x240:d=2", tmp_path / "v.mp4")
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "none.mp4", "not found")
    assert_refused(tmp_path, "folder")
    assert_refused(tmp_path / "empty.mp4", "empty")
    assert_refused(tmp_path / "text.mp4", "can't be decoded")
    assert_refused(tmp_path / "list.m3u8", "no video file")
    assert_refused(tmp_path / "half.mp4", "moov")
    assert_refused(write_tone(16_000), "no video")
    assert_refused(numbered_video(tmp_path / "tiny.mp4", size="8x8"), "8×8")


def test_what_a_truncated_but_readable_file_holds_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:d=4", "-g", 5, tmp_path / "v.mkv")
    whole = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "v.mkv").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert 10 < len(list(read_video(tmp_path / "v.mkv"))) < 90
    assert "v.mkv is damaged" in caplog.text
