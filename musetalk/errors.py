"""The error tree: every failure a user can meet, with its code, its exit code and what to do about it.

Each class is also the builtin exception a Python caller would catch, so ``except ValueError``
keeps working for programs written against the original scripts.
"""

from __future__ import annotations


class MuseTalkError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        error_code: stable identifier for programs, e.g. ``"no_face"``.
        exit_code: process exit status of the commands.
        message: one sentence of what happened, to which file.
        hint: one sentence of what to do next.
    """

    error_code = "internal"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MuseTalkError, ValueError):
    """The command line doesn't make sense."""

    error_code = "usage"
    exit_code = 2


class InputError(MuseTalkError, ValueError):
    """An input file or value can't be used."""

    error_code = "bad_input"
    exit_code = 3


class NoFaceError(MuseTalkError, ValueError):
    """No frame of the template shows a usable face."""

    error_code = "no_face"
    exit_code = 4


class WeightsError(MuseTalkError, RuntimeError):
    """Model weights are missing, damaged or of another model."""

    error_code = "weights"
    exit_code = 5


class EngineError(MuseTalkError, RuntimeError):
    """The engine or one of its packages can't run here."""

    error_code = "engine"
    exit_code = 5


class DeviceError(EngineError):
    """The requested device is missing or out of memory."""

    error_code = "device"


class CacheError(MuseTalkError, RuntimeError):
    """A template cache is corrupt, unsafe or made by another engine."""

    error_code = "cache_invalid"
    exit_code = 6


class CacheMissingError(CacheError, LookupError):
    """There is no cache for the template."""

    error_code = "cache_missing"


class OutputError(MuseTalkError, OSError):
    """The output can't be written."""

    error_code = "output"
    exit_code = 7


class BusyError(MuseTalkError, RuntimeError):
    """The resident worker has no place free, or takes no more work.

    Attributes:
        retry_after: seconds after which asking again makes sense.
    """

    error_code = "busy"

    def __init__(self, message: str, hint: str = "", retry_after: int = 1) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class ClientLimitError(BusyError):
    """One caller has as much open as one may have."""


class CancelledRun(MuseTalkError, RuntimeError):
    """Somebody who may do so ended the request."""

    error_code = "cancelled"
    exit_code = 130


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C or a termination signal ended the run; outside the tree, so that nothing swallows it.

    Attributes:
        exit_code: 128 + the signal's number.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("interrupted 已中断")
        self.exit_code = exit_code
