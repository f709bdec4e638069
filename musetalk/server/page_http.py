"""The operator's page: plain files of this package, under a policy that allows nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from musetalk.config import LITE_MODELS
from musetalk.server.worker import Worker

if TYPE_CHECKING:
    import numpy as np

EXAMPLE = LITE_MODELS / "portraits" / "astronaut.jpg"
PAGE = Path(__file__).with_name("page")
PICTURE_SIDE = 1280  # pixels, the longer side at most
PICTURE_QUALITY = 88  # of the JPEG
FILE_NAME = re.compile(r"[a-z_]+\.(html|css|js|svg)")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router(worker: Worker) -> APIRouter:
    """`/`, the files it loads, and what a template looks like."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @router.get("/page/example.jpg")
    def example() -> FileResponse:
        return FileResponse(EXAMPLE, headers=HEADERS)

    @router.get("/page/{name}")
    def file(name: str) -> FileResponse:
        if not FILE_NAME.fullmatch(name) or not (PAGE / name).is_file():
            raise HTTPException(404, f"the page has no file {name[:60]!r}")
        return FileResponse(PAGE / name, headers=HEADERS)

    @router.get("/v1/templates/{template_id}/picture")
    def picture(template_id: str) -> Response:
        """The template's first frame as it is, a JPEG; the template is opened for it."""
        opened = worker.place_for(template_id).service.renderer().open(template_id)
        headers = {"Cache-Control": "private, max-age=60"}
        return Response(_jpeg(opened.template.frames[0]), media_type="image/jpeg", headers=headers)

    return router


def _jpeg(frame: np.ndarray) -> bytes:
    import cv2

    scale = min(1.0, PICTURE_SIDE / max(frame.shape[:2]))
    shown = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])[1].tobytes()
