"""What native code writes to the process's stderr: known chatter goes to the debug log, the rest through.

The decision a reader would question: descriptor 2 is replaced once, when a command starts, and stays so.
Replacing it round a noisy call would take other threads' messages away while that call lasts.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading

log = logging.getLogger(__name__)

STDERR = 2  # file descriptor
CHATTER = re.compile(
    rb"INFO: Created TensorFlow Lite|WARNING: All log messages before absl|[IW]\d{4} \d\d:\d\d:\d+\.\d+ "
)
"""Lines that MediaPipe's parts write whenever they start, and that no setting of theirs silences: notes and
warnings of its log, not errors."""
END_TIMEOUT = 0.5  # seconds for the last lines


class NativeMessages:
    """Descriptor 2 through a filter; Python's own stderr goes past it."""

    def __init__(self) -> None:
        self._stderr = os.dup(STDERR)
        incoming, outgoing = os.pipe()
        sys.stderr.flush()
        os.dup2(outgoing, STDERR)
        os.close(outgoing)
        sys.stderr = io.TextIOWrapper(
            os.fdopen(self._stderr, "wb", closefd=False),
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        self._thread = threading.Thread(
            target=self._pass_on, args=(os.fdopen(incoming, "rb"),), name="native-messages", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Gives descriptor 2 back, after the last line went through."""
        os.dup2(self._stderr, STDERR)
        self._thread.join(END_TIMEOUT)

    def _pass_on(self, lines: io.BufferedReader) -> None:
        for line in lines:
            if CHATTER.match(line):
                log.debug("native: %s", line.decode("utf-8", "replace").rstrip())
            else:
                os.write(self._stderr, line)
