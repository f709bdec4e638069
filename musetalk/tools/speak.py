"""`… | python -m musetalk.tools.speak --session URL`: raw samples on stdin are spoken by a live session.

For streaming text-to-speech: samples are sent as they come, s16le, mono. Ctrl-C interrupts the face as well.
Events go to stderr; the one JSON on stdout tells how far the speech was shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from musetalk import cli
from musetalk.errors import EngineError, InputError, OutputError
from musetalk.media.audio import SAMPLE_RATE

PIECE_SECONDS = 0.1  # of speech sent at once, at most


def socket_address(session: str) -> str:
    """The address of a session's speech socket.

    Args:
        session: its address as `POST /v1/sessions` made it, "http://127.0.0.1:28888/v1/sessions/ID".

    Raises:
        InputError: it is no such address.
    """
    parts = urlsplit(session)
    if parts.scheme not in ("http", "https", "ws", "wss") or "/v1/sessions/" not in parts.path:
        raise InputError(
            f"{session} is no session 会话地址无效", "give http://HOST:PORT/v1/sessions/ID 请给出会话地址"
        )
    scheme = parts.scheme.replace("http", "ws")
    path = f"{parts.path.rstrip('/').removesuffix('/audio')}/audio"
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def speak(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Sends stdin to the session and waits until all of it was shown."""
    try:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect
    except ImportError as e:
        raise EngineError("websockets isn't installed", "run: pip install websockets") from e
    address = socket_address(arguments.session)
    try:
        with connect(address, max_size=None) as connection:
            return converse(connection, sys.stdin.buffer, arguments.sample_rate), 0
    except (OSError, WebSocketException) as e:
        raise OutputError(f"{address}: {e} 无法连接会话", "start the worker, and a session on it") from e


def converse(connection: Any, speech: BinaryIO, sample_rate: int) -> dict[str, Any]:
    """Sends `speech` and heeds events until the face rests; the answer of the command."""
    sent = [0]
    sending = threading.Thread(
        target=_send_all, args=(connection, speech, sample_rate, sent), name="speech", daemon=True
    )
    sending.start()
    shown = 0.0
    try:
        for text in connection:
            event = json.loads(text)
            shown = event.get("position", shown)
            cli.say(text)
            if event["type"] == "error":
                raise InputError(event["message"], event["hint"])
            if event["type"] == "ended" or event.get("done"):
                break
    except KeyboardInterrupt:
        connection.send(json.dumps({"type": "interrupt"}))
        raise
    seconds = round(sent[0] / 2 / sample_rate, 3)
    return {"success": True, "sent_seconds": seconds, "position": shown, "message": "✅ spoken 已播出"}


def _send_all(connection: Any, speech: BinaryIO, sample_rate: int, sent: list[int]) -> None:
    """Sends pieces as they come, then says that the utterance is complete."""
    from websockets.exceptions import ConnectionClosed

    size = 2 * max(1, int(PIECE_SECONDS * sample_rate))
    read = getattr(speech, "read1", speech.read)  # what is there, without waiting for a whole piece
    with contextlib.suppress(ConnectionClosed):  # why is told to who receives
        connection.send(json.dumps({"type": "config", "sample_rate": sample_rate}))
        while piece := read(size):
            sent[0] += len(piece)
            connection.send(piece)
        connection.send(json.dumps({"type": "speak_end"}))


def speak_main(argv: Sequence[str]) -> tuple[cli.Command, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m musetalk.tools.speak", description="Raw samples on stdin, spoken live 实时播报"
    )
    parser.add_argument("--session", required=True, help="http://HOST:PORT/v1/sessions/ID[?token=…]")
    parser.add_argument("--sample_rate", type=int, default=SAMPLE_RATE, help="Hz (default %(default)s)")
    parser.set_defaults(template_id=None, verbose=False)
    return speak, parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(speak_main)
