"""`python -m musetalk.benchmark.load`: a worker under the calls of many clients, every output checked.

It starts a worker of its own, in a temporary folder, and prints one JSON object. The decision a reader would
question: outputs are told apart by their length. Each request's sound has a length of its own, so a video
that belongs to another request, or to two, has the wrong number of frames.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.config import REPOSITORY
from musetalk.files import remove_file, remove_folder
from musetalk.measurement import hardware
from musetalk.media.audio import SAMPLE_RATE
from musetalk.media.video import probe_video
from musetalk.tools.demo import PORTRAIT

READY = re.compile(r"http://127\.0\.0\.1:(\d+) · tcp 127\.0\.0\.1:(\d+)")
TEMPLATES = ("load a", "load b", "load c")
FPS = 25
CALL_SECONDS = 120.0
CONTRACTS = ("http", "lines", "framed", "job")


@dataclass(frozen=True)
class Target:
    """A running worker and a folder for its sounds and videos."""

    http_port: int
    line_port: int
    pid: int
    folder: Path


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Target]:
    """A worker with its templates made."""
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--serve"]
    command += ["--http_port", "0", "--port", "0", "--max_sessions", "32", "--cache_dir", str(folder / "c")]
    command += ["--videos_dir", str(folder / "videos"), "--engine", "lite", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = next(filter(None, map(READY.search, process.stderr or ())))
            threading.Thread(target=list, args=(process.stderr,), daemon=True).start()
            target = Target(int(found[1]), int(found[2]), process.pid, folder)
            for name in TEMPLATES:
                _post(target, "/api/preprocess_template", {"template_id": name, "image_path": str(PORTRAIT)})
            yield target
        finally:
            process.terminate()


def _request(target: Target, method: str, path: str, body: bytes | None, kind: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", target.http_port, timeout=CALL_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def _post(target: Target, path: str, body: Any = None) -> dict[str, Any]:
    content = None if body is None else json.dumps(body).encode()
    status, answer = _request(target, "POST", path, content, "application/json" if content else "")
    if status != 200:
        raise RuntimeError(f"{path}: {status} {answer[:200]!r}")
    return dict(json.loads(answer))


def write_sound(path: Path, frames: int) -> Path:
    """A wav that gives `frames` frames and half a frame more."""
    import wave

    n_samples = (2 * frames + 1) * SAMPLE_RATE // (2 * FPS)
    samples = np.random.default_rng(frames).integers(-6000, 6000, n_samples).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return path


def call_http(target: Target, template_id: str, sound: Path, output: Path) -> Path:
    """A session of one segment."""
    session = secrets.token_hex(8)
    _post(target, "/api/start_session", {"session_id": session, "template_id": template_id})
    body = {"session_id": session, "audio_path": str(sound), "segment_index": 0, "is_final": True}
    answer = _post(target, "/api/process_segment", body)
    _post(target, f"/api/end_session/{session}")
    return Path(answer["video_path"])


def call_lines(target: Target, template_id: str, sound: Path, output: Path) -> Path:
    """One line on a connection of its own."""
    request = {"command": "inference", **_rendering(template_id, sound, output)}
    with socket.create_connection(("127.0.0.1", target.line_port), CALL_SECONDS) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Path(json.loads(connection.makefile("rb").readline())["resultPath"])


def call_framed(target: Target, template_id: str, sound: Path, output: Path) -> Path:
    """One request behind its length."""
    body = json.dumps(_rendering(template_id, sound, output)).encode()
    with socket.create_connection(("127.0.0.1", target.http_port), CALL_SECONDS) as connection:
        connection.sendall(struct.pack("<I", len(body)) + body)
        return Path(json.loads(connection.makefile("rb").read()[4:])["OutputPath"])


def _rendering(template_id: str, sound: Path, output: Path) -> dict[str, Any]:
    paths = {"audio_path": str(sound), "output_path": str(output)}
    return {"template_id": template_id, **paths, "batch_size": 8, "fps": FPS}


def call_job(target: Target, template_id: str, sound: Path, output: Path) -> Path:
    """A job, its content taken while it renders."""
    boundary = secrets.token_hex(8)
    field = f'--{boundary}\r\nContent-Disposition: form-data; name="template_id"\r\n\r\n{template_id}\r\n'
    file = f'--{boundary}\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n'
    body = field.encode() + file.encode() + sound.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    status, answer = _request(target, "POST", "/v1/videos", body, f"multipart/form-data; boundary={boundary}")
    if status != 201:
        raise RuntimeError(f"/v1/videos: {status} {answer[:200]!r}")
    job = json.loads(answer)
    status, content = _request(target, "GET", job["content_url"], None)
    _request(target, "GET", job["events_url"], None)
    output.write_bytes(content)
    _request(target, "DELETE", f"/v1/videos/{job['id']}", None)
    return output


CALLS: dict[str, Callable[[Target, str, Path, Path], Path]] = {
    "http": call_http,
    "lines": call_lines,
    "framed": call_framed,
    "job": call_job,
}


def mixed(target: Target, requests: int, clients: int, seconds: tuple[float, float]) -> dict[str, Any]:
    """`requests` by `clients` at once, contracts and templates in turn; each output's frames are counted."""
    low, high = (round(FPS * bound) for bound in seconds)
    times: dict[str, list[float]] = {name: [] for name in CONTRACTS}
    wrong: list[str] = []

    def one(number: int) -> None:
        contract = CONTRACTS[number % len(CONTRACTS)]
        frames = low + number * 7 % max(1, high - low)
        sound = write_sound(target.folder / f"{number}.wav", frames)
        output = target.folder / f"{number}.mp4"
        began = time.perf_counter()
        try:
            made = CALLS[contract](target, TEMPLATES[number % len(TEMPLATES)], sound, output)
            times[contract].append(time.perf_counter() - began)
            found = probe_frames(made)
            if found != frames:
                wrong.append(f"{number} by {contract}: {found} frames, not {frames}")
            remove_file(made)
        except (OSError, RuntimeError, ValueError, KeyError) as e:
            wrong.append(f"{number} by {contract}: {e}")
        remove_file(sound)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    spread = {name: percentiles(found) for name, found in times.items()}
    return {"requests": requests, "clients": clients, "wrong": wrong[:20], "seconds": spread}


def probe_frames(path: Path) -> int:
    """Frames in a video, decoded one by one."""
    from musetalk.media.video import read_video

    probe_video(path)
    return sum(1 for _ in read_video(path))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p95."""
    if not seconds:
        return {}
    return {f"p{part}": round(float(np.percentile(seconds, part)), 3) for part in (50, 95)}


def usage(pid: int) -> dict[str, int]:
    """Resident memory in MB, threads and descriptors of a process, as Linux tells them."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return {"mb": int(fields["VmRSS"]) // 1024, "threads": int(fields["Threads"]), "descriptors": descriptors}


def endurance(target: Target, requests: int) -> dict[str, Any]:
    """Memory, threads and descriptors before, in the middle of and after many short requests."""
    mixed(target, max(40, requests // 20), 8, (0.2, 0.4))
    found = [usage(target.pid)]
    wrong: list[str] = []
    for _ in range(4):
        wrong += mixed(target, requests // 4, 8, (0.2, 0.4))["wrong"]
        found.append(usage(target.pid))
    left = sum(1 for path in target.folder.rglob("*") if ".tmp" in path.name)
    return {"requests": requests, "usage": found, "temporary_files": left, "wrong": wrong[:20]}


def warm(target: Target, runs: int = 9) -> dict[str, Any]:
    """Seconds for 2 s of speech, alone, by each contract."""
    sound, answers = write_sound(target.folder / "warm.wav", 50), {}
    for name, call in CALLS.items():
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            call(target, TEMPLATES[0], sound, target.folder / "warm.mp4")
            seconds.append(time.perf_counter() - began)
        answers[name] = percentiles(seconds)
    return answers


def main() -> None:
    """Runs what is asked for and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m musetalk.benchmark.load", description=__doc__)
    parser.add_argument("--mixed", type=int, default=500, help="requests from 8 clients; 0 leaves it out")
    parser.add_argument("--endurance", type=int, default=2000, help="short requests; 0 leaves it out")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="musetalk-load-"))
    try:
        with started(folder) as target:
            found: dict[str, Any] = {"hardware": hardware(), "warm": warm(target)}
            if arguments.mixed:
                found["mixed"] = mixed(target, arguments.mixed, 8, (0.5, 2.0))
            if arguments.endurance:
                found["endurance"] = endurance(target, arguments.endurance)
    finally:
        remove_folder(folder)
    sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
