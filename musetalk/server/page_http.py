"""The operator's page: plain files of this package, under a policy that allows nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

PAGE = Path(__file__).with_name("page")
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


def page_router() -> APIRouter:
    """`/` and the files it loads."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @router.get("/page/{name}")
    def file(name: str) -> FileResponse:
        if not FILE_NAME.fullmatch(name) or not (PAGE / name).is_file():
            raise HTTPException(404, f"the page has no file {name[:60]!r}")
        return FileResponse(PAGE / name, headers=HEADERS)

    return router
