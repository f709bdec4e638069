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
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from musetalk.errors import EngineError, InputError
from musetalk.media.kind import demuxer_of

if TYPE_CHECKING:
    import numpy as np

CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,loas,m4v,"
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,"
    "tak,truehd,tta,voc,w64,wav,wtv,wv,xwma,yuv4mpegpipe"
)
GLOBAL_OPTIONS = ("-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info")
PIPE_SIZE = 1 << 20  # bytes, the most an unprivileged Linux process may ask for
LEVEL = re.compile(r"^(?:\[[^]]* @ [^]]*\] ?)*\[(\w+)\] ?")  # [module @ 0x55…] [error] text
NOISE = (
    "Task finished",
    "Terminating thread",
    "Nothing was written",
    "Conversion failed",
    "Error opening input file",
    "Error sending frames",
    "Last message repeated",
)
TOLD_LINES = 2  # of the child's errors that reach the user
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHIFT = 0x800  # from the surrogates into the private use area behind them
_MARK = "\ufdd0"  # never a character, so in no name
_MARKED = re.compile("\ufdd0([\ue000-\ue7ff])")
KEPT_LINES = 200
KEPT_BYTES = 4096  # of a line without an end
KINDS = {"audio": "音轨", "video": "视频轨"}


def ffmpeg_path() -> str:
    """The ffmpeg to run: $FFMPEG_BINARY, else the imageio-ffmpeg wheel's, else the system's.

    The wheel's comes before the system's so that one known version runs everywhere; the system's is
    taken only where the wheel's is missing or can't start.

    Raises:
        EngineError: $FFMPEG_BINARY names no program, or there is no ffmpeg at all.
    """
    return _find_ffmpeg(os.environ.get("FFMPEG_BINARY", ""))


@lru_cache(maxsize=4)
def _find_ffmpeg(named: str) -> str:
    if named:
        found = find_program(named)
        if found is None:
            raise EngineError(
                f"FFMPEG_BINARY names {named}, which can't be run",
                "name a working ffmpeg in FFMPEG_BINARY or remove the variable",
            )
        return found
    found = _bundled_ffmpeg() or find_program("ffmpeg")
    if found is None:
        raise EngineError("no ffmpeg was found", "run: pip install imageio-ffmpeg")
    return found


def find_program(name: str) -> str | None:
    """A program by its path, or by its bare name in the absolute folders of $PATH; None when it isn't there.

    Never in the working directory, where Windows looks first: callers choose that folder, and a stranger may
    have put a file into it.
    """
    if Path(name).name != name:
        return shutil.which(name)
    if os.name == "nt" and not name.lower().endswith(".exe"):
        name += ".exe"
    folders = map(Path, os.environ.get("PATH", os.defpath).split(os.pathsep))
    found = (shutil.which(str(folder / name)) for folder in folders if folder.is_absolute())
    return next(filter(None, found), None)


def _bundled_ffmpeg() -> str | None:
    """The wheel's program where it can start; None where there is none for this system."""
    try:
        import imageio_ffmpeg

        bundled = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None
    return shutil.which(bundled) if Path(bundled).is_absolute() else None


def file_url(path: Path) -> str:
    """`path` as ffmpeg's ``file:`` URL, absolute, so that no name is taken for an option or a protocol.

    The package that builds command lines writes UTF-8: what isn't, a lone surrogate in Python, is marked, and
    `Child` names the file by its own bytes again.
    """
    return _SURROGATE.sub(lambda found: _MARK + chr(ord(found[0]) + _SHIFT), f"file:{Path(path).absolute()}")


def _own_bytes(argument: str) -> str:
    """An argument with marked characters as the lone surrogates that they were."""
    return _MARKED.sub(lambda found: chr(ord(found[1]) - _SHIFT), argument)


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


def input_stream(path: Path, reinit_filter: int = 1, **options: Any) -> Any:
    """An ffmpeg-python input on `path`, restricted to local files and self-contained media.

    Args:
        reinit_filter: 1 makes the filters anew when the stream changes its size or format half-way, 0 not.
        options: further input options of ffmpeg, ``ss`` say.
    """
    import ffmpeg

    demuxer = demuxer_of(path)
    if demuxer is not None:
        options["format"] = demuxer
    return ffmpeg.input(
        file_url(path),
        protocol_whitelist="file,pipe",
        format_whitelist=CONTAINERS,
        reinit_filter=reinit_filter,
        **options,
    )


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
        self,
        arguments: Sequence[str],
        *,
        stdin: bool = False,
        stdout: bool = False,
        listener: Callable[[str], None] | None = None,
    ) -> None:
        """Start ffmpeg with `arguments`; `stdin`/`stdout` say which media pipes are wanted.

        Args:
            listener: hears every line of the log that is no error, on the draining thread.

        Raises:
            EngineError: there is no ffmpeg, or it can't be started.
        """
        self._listener = listener
        self._log: list[str] = []
        self._errors: list[str] = []
        command = [ffmpeg_path(), *GLOBAL_OPTIONS, *map(_own_bytes, arguments)]
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
        while block := self._process.stderr.read(1 << 16):
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                self._note(line.decode("utf-8", "replace").strip())
            pending = pending[-KEPT_BYTES:]
        self._note(pending.decode("utf-8", "replace").strip())

    def _note(self, line: str) -> None:
        """Keep a line of the log; the first ones, because a cause comes before its consequences."""
        level = LEVEL.match(line)
        text = line[level.end() :].strip() if level else line
        kept = self._errors if level and level[1] in ("error", "fatal", "panic") else self._log
        if self._listener is not None and kept is self._log:
            self._listener(text)
        if text and len(kept) < KEPT_LINES:
            kept.append(text)

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

    def end(self, grace: float = 0.0) -> None:
        """Kill the child if it still runs after `grace` seconds and give back every handle."""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                _close_quietly(pipe)

    @property
    def log(self) -> str:
        """What the child said of its inputs and outputs, complete once `finish` has returned."""
        return "\n".join(self._log)

    @property
    def complaint(self) -> str:
        """The child's first errors on one line; "" when it had none."""
        errors = list(self._errors)
        telling = [line for line in errors if not line.startswith(NOISE)]
        return "; ".join(dict.fromkeys((telling or errors)[:TOLD_LINES]))


def undecodable(path: Path, kind: str, child: Child) -> InputError:
    """Why `child`, which has finished, could take nothing out of `path`."""
    if "whitelist" in child.complaint:
        return InputError(
            f"{path} is no {kind} file that can be read", f"give a usual {kind} file, no playlist"
        )
    if "matches no streams" in child.complaint:
        return InputError(f"there is no {kind} in {path} 没有{KINDS[kind]}", f"give a file with {kind} in it")
    reason = child.complaint or "ffmpeg ended early"
    return InputError(
        f"{kind} {path} can't be decoded 无法解码: {reason}",
        "check that the file is complete, or export it again 请检查文件是否完整",
    )


def _close_quietly(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # a write that the dead child will never take
        return
