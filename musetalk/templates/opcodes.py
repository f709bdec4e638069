"""A look at a pickle's opcodes before anything is built from them.

The decision a reader would question: Python's unpickler makes room for as many bytes, or as many memo
entries, as an opcode states, and only then looks whether the file has them. So what is stated is compared
with the file first: a pass over the opcodes that skips what they carry.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools

_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_ARGUMENTS = {ord(code.code): code.arg.n if code.arg else 0 for code in pickletools.opcodes}
_FIXED = {code: size for code, size in _ARGUMENTS.items() if size >= 0}  # bytes behind an opcode
_COUNTED = {code: _LENGTH_BYTES[size] for code, size in _ARGUMENTS.items() if size in _LENGTH_BYTES}
_LINES = {code: 1 for code, size in _ARGUMENTS.items() if size == pickletools.UP_TO_NEWLINE}
_LINES |= {ord(pickle.GLOBAL): 2, ord(pickle.INST): 2}
_FRAME, _STOP, _PUT = ord(pickle.FRAME), ord(pickle.STOP), ord(pickle.PUT)
_NUMBERED_MEMO = {_PUT, ord(pickle.BINPUT), ord(pickle.LONG_BINPUT)}
_MEMO = _NUMBERED_MEMO | {ord(pickle.MEMOIZE)}


def check_opcodes(content: mmap.mmap) -> None:
    """Reads the opcodes of a pickle up to its end.

    Raises:
        pickle.UnpicklingError: an opcode that there isn't, a length beyond the file's end, or a place in the
            memo that no pickler would have come to yet.
    """
    position, memoized = 0, 0
    while position < len(content):
        opcode = content[position]
        start = position + 1
        if opcode in _FIXED:
            position = start + _FIXED[opcode]
        elif opcode in _COUNTED:
            start += _COUNTED[opcode]
            position = start + int.from_bytes(content[start - _COUNTED[opcode] : start], "little")
        else:
            position = _after_lines(content, start, _LINES.get(opcode, 0))
        if opcode == _FRAME and int.from_bytes(content[start:position], "little") > len(content) - position:
            raise pickle.UnpicklingError("a frame beyond the end of the file")
        if opcode in _MEMO:
            if opcode in _NUMBERED_MEMO and _memo_place(opcode, content[start:position]) > memoized:
                raise pickle.UnpicklingError("a place in the memo that is not reached yet")
            memoized += 1
        elif opcode == _STOP:
            return
    raise pickle.UnpicklingError("it ends too early")


def _after_lines(content: mmap.mmap, position: int, lines: int) -> int:
    """Where the text of an opcode ends; opcodes that there aren't have none."""
    if not lines:
        raise pickle.UnpicklingError("an opcode that pickle doesn't have")
    for _ in range(lines):
        position = content.find(b"\n", position) + 1
        if not position:
            raise pickle.UnpicklingError("a line without an end")
    return position


def _memo_place(opcode: int, argument: bytes) -> int:
    return int(argument) if opcode == _PUT else int.from_bytes(argument, "little")
