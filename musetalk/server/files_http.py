"""Files and `HEAD` over HTTP: what the framework answers in its own words is told as every other error is."""

from __future__ import annotations

from typing import Any

from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException


class MediaFile(FileResponse):
    """A file with ranges; a range that can't be given, or a file that was swept meanwhile, is an error."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the file.

        Raises:
            HTTPException: 400 or 416 for a range, 404 for a file that is gone.
        """
        refused: dict[str, Any] = {}

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused.update(message)
            if not refused:
                await send(message)

        try:
            await super().__call__(scope, receive, told)
        except (RuntimeError, FileNotFoundError) as e:
            raise HTTPException(404, "the file is gone 文件已删除") from e
        if refused:
            kept = {b"content-range": "Content-Range"}
            headers = {kept[name]: value.decode() for name, value in refused["headers"] if name in kept}
            raise HTTPException(refused["status"], "the range can't be given 范围无效", headers)


class AnswersHead:
    """ASGI middleware: `HEAD` is answered as `GET` is, without the body.

    Args:
        app: what knows `GET`.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a call on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def begun(message: Any) -> None:
            """Ends the answer with its headers; what streams sees its client gone then."""
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        await self._app({**scope, "method": "GET"}, receive, begun)
