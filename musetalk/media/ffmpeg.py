"""The ffmpeg child process: found, started, drained and ended here and nowhere else.

ffmpeg runs as a separate program and not as a library, so that a hostile file can only hurt the
child. Inputs are restricted twice, to local files (`protocol_whitelist`) and to containers that hold
their own media (`format_whitelist`): a playlist named ``.mp4`` can't make ffmpeg open other files or
the network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from musetalk.errors import EngineError, InputError

if TYPE_CHECKING:
    import numpy as np

CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,loas,m4v,"
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,"
    "tak,truehd,tta,voc,w64,wav,wtv,wv,xwma,yuv4mpegpipe"
)
GLOBAL_OPTIONS = ("-nostdin", "-hide_banner", "-nostats")
PIPE_SIZE = 1 << 20  # bytes, the most an unprivileged Linux process may ask for
NOISE = ("Task finished", "Terminating thread", "Nothing was written", "Conversion failed")
TOLD_LINES = 3  # of the child's stderr that reach the user
KEPT_LINES = 200
END_TIMEOUT = 5.0  # seconds a killed child may take to vanish


def ffmpeg_path() -> str:
    """The ffmpeg to run: $FFMPEG_BINARY, else the system's, else the imageio-ffmpeg wheel's.

    Raises:
        EngineError: $FFMPEG_BINARY names no program, or there is no ffmpeg at all.
    """
    return _find_ffmpeg(os.environ.get("FFMPEG_BINARY", ""))


@lru_cache(maxsize=4)
def _find_ffmpeg(named: str) -> str:
    if named:
        found = shutil.which(named)
        if found is None:
            raise EngineError(
                f"FFMPEG_BINARY names {named}, which can't be run",
                "name a working ffmpeg in FFMPEG_BINARY or remove the variable",
            )
        return found
    found = shutil.which("ffmpeg")
    return found if found is not None else _bundled_ffmpeg()


def _bundled_ffmpeg() -> str:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as e:
        raise EngineError("no ffmpeg was found", "run: pip install imageio-ffmpeg") from e


def file_url(path: Path) -> str:
    """`path` as ffmpeg's ``file:`` URL, absolute, so that no name is taken for an option or a protocol."""
    return f"file:{Path(path).absolute()}"


def check_input_file(path: Path | str, kind: str) -> Path:
    """`path` when it is a file with bytes in it; `kind` ("audio", "image", "video") names it in errors.

    Raises:
        InputError: missing, a directory, a device, unreadable or empty.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{kind} {path} is a folder", f"give the path of one {kind} file")
        if not path.exists():
            raise InputError(f"{kind} file not found 文件不存在: {path}", "check the path 请检查路径")
        if not path.is_file():
            raise InputError(f"{kind} {path} is not a regular file", f"give the path of one {kind} file")
        with path.open("rb") as opened:
            if not opened.read(1):
                raise InputError(f"{kind} file is empty 文件为空: {path}", "export or copy the file again")
    except InputError:
        raise
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise InputError(f"{kind} {path} can't be read: {reason}", "check the path and its rights") from e
    return path


def input_stream(path: Path) -> Any:
    """An ffmpeg-python input on `path`, restricted to local files and self-contained media."""
    import ffmpeg

    return ffmpeg.input(file_url(path), protocol_whitelist="file,pipe", format_whitelist=CONTAINERS)


def _process_flags() -> dict[str, Any]:
    """A Ctrl-C on the terminal goes to us alone; we end the child. No console window on Windows."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def _widen(pipe: Any) -> None:
    """Let a pipe hold whole frames where the system allows it: fewer wake-ups on both sides."""
    if sys.platform != "linux":
        return
    import fcntl

    try:
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except (AttributeError, OSError):
        return


class Child:
    """One ffmpeg process: raw pipes for the media, a thread that drains stderr, no way to outlive us.

    A context manager: leaving it ends the process, whatever the reason. If we are killed, the
    child's pipes break and it ends by itself.
    """

    def __init__(
        self, arguments: Sequence[str], *, stdin: bool = False, stdout: bool = False, loglevel: str = "error"
    ) -> None:
        """Start ffmpeg with `arguments`; `stdin`/`stdout` say which media pipes are wanted.

        Raises:
            EngineError: there is no ffmpeg, or it can't be started.
        """
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        command = [ffmpeg_path(), *GLOBAL_OPTIONS, "-loglevel", loglevel, *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                **_process_flags(),
            )
        except OSError as e:
            raise EngineError(
                f"ffmpeg can't be started: {command[0]}: {e.strerror}",
                "name a working ffmpeg in FFMPEG_BINARY",
            ) from e
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _widen(pipe)
        self._drain = threading.Thread(target=self._drain_stderr, name="ffmpeg-stderr", daemon=True)
        self._drain.start()

    def _drain_stderr(self) -> None:
        assert self._process.stderr is not None
        pending = b""
        while block := self._process.stderr.read(65536):
            *lines, pending = (pending + block).replace(b"\r", b"\n").split(b"\n")
            self._lines.extend(line.decode("utf-8", "replace") for line in lines if line.strip())
            pending = pending[-4096:]
        if pending.strip():
            self._lines.append(pending.decode("utf-8", "replace"))

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def write(self, buffer: memoryview) -> None:
        """Write all of `buffer` (bytes) to the child's stdin without copying it.

        Raises:
            OSError: the child closed its end (BrokenPipeError, on Windows also EINVAL).
        """
        assert self._process.stdin is not None
        written = 0
        while written < len(buffer):
            written += self._process.stdin.write(buffer[written:])

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the child's stdout, fewer only at its end."""
        data = bytearray(size)
        return bytes(data[: self.read_into(memoryview(data))])

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` (bytes) from the child's stdout; the count is smaller only at its end."""
        assert self._process.stdout is not None
        filled = 0
        while filled < len(buffer):
            count = self._process.stdout.readinto(buffer[filled:])  # type: ignore[attr-defined]
            if not count:
                break
            filled += count
        return filled

    def read_array(self, array: np.ndarray) -> bool:
        """Fill a C-contiguous `array`; False when the stream ended first."""
        view = array.data.cast("B")
        return self.read_into(view) == len(view)

    def finish(self) -> int:
        """Close stdin, let the child complete its work, return its exit status."""
        if self._process.stdin is not None:
            _close_quietly(self._process.stdin)
        status = self._process.wait()
        self._drain.join()
        return status

    def kill(self) -> None:
        """Stop the child at once; safe from any thread, and when it has ended already."""
        self._process.kill()

    def end(self) -> None:
        """Kill the child if it still runs and give back every handle."""
        if self._process.poll() is None:
            self._process.kill()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            return
        self._drain.join(END_TIMEOUT)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                _close_quietly(pipe)

    @property
    def log(self) -> str:
        """The last lines of the child's stderr, complete once `finish` has returned."""
        return "\n".join(self._lines)

    @property
    def complaint(self) -> str:
        """What the child complained of, on one line, the cause first; "" when it said nothing."""
        lines = [without_address(line) for line in list(self._lines)]
        telling = [line for line in lines if line and not line.startswith(NOISE)]
        return "; ".join(dict.fromkeys((telling or lines)[:TOLD_LINES]))


def without_address(line: str) -> str:
    """A line of ffmpeg's log without the ``[module @ 0x55…]`` in front."""
    return re.sub(r"^(\[[^]]*\] ?)+", "", line).strip()


def _close_quietly(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # a write that the dead child will never take
        return
