"""What operators and balancers ask: alive, ready, how much, how busy; and the page that lists all calls."""

from __future__ import annotations

import html
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from starlette.exceptions import HTTPException

from musetalk import __version__
from musetalk.config import OUTPUT_SUFFIXES, PreprocessingConfig
from musetalk.server.capacity import SESSION_FPS
from musetalk.server.worker import Worker

if TYPE_CHECKING:
    from musetalk.server.jobs import Jobs

PREFIX = "musetalk"


class WorkerCollector:
    """The worker's own counts, read when they are asked for.

    Args:
        worker: whose they are.
        jobs: that wait or run.
    """

    def __init__(self, worker: Worker, jobs: Jobs) -> None:
        self._worker = worker
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        worker = self._worker
        gauges = {
            "sessions": ("sessions that hold a place", worker.sessions),
            "capacity": ("sessions at 25 frames/s that fit", worker.capacity),
            "running": ("pieces of work under way or waiting", len(worker.line)),
            "queue_depth": (
                "faces that wait for their device",
                sum(place.scheduler.depth for place in worker.places),
            ),
            "jobs_open": ("jobs that haven't ended", self._jobs.open_count),
            "templates_open": (
                "templates in memory",
                sum(len(place.service.templates.templates()) for place in worker.places),
            ),
            "gpu_memory_bytes": ("allocated on the cards by torch", _gpu_bytes()),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", words, value)
        yield CounterMetricFamily(f"{PREFIX}_frames", "frames rendered", worker.frames)
        yield CounterMetricFamily(f"{PREFIX}_refused", "requests refused for lack of room", worker.refused)
        stages = SummaryMetricFamily(f"{PREFIX}_stage_seconds", "work of each stage", labels=["stage"])
        for stage, (runs, seconds) in worker.stages.copy().items():
            stages.add_metric([stage], runs, seconds)
        yield stages


def _gpu_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))


class Metered:
    """ASGI middleware that counts requests and their seconds, by route and status.

    Args:
        app: what is measured; its routes' paths are the labels, so that ids don't make a label each.
        registry: gets the histogram.
    """

    def __init__(self, app: FastAPI, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "HTTP requests, to the end of their answers",
            ["method", "route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a call on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 499, time.perf_counter()

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
            route = str(getattr(scope.get("route"), "path", "other"))
            labels = (method, route, str(status))
            self._seconds.labels(*labels).observe(time.perf_counter() - began)


def operations_router(app: FastAPI, worker: Worker, registry: CollectorRegistry) -> APIRouter:
    """Health, readiness, metrics, capabilities, drain and the page of all calls."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def alive() -> dict[str, Any]:
        """That the process answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def ready(response: Response) -> dict[str, Any]:
        """Whether it takes work: 503 while it is being stopped."""
        response.status_code = 503 if worker.draining else 200
        return {"status": "draining" if worker.draining else "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @router.get("/capabilities")
    def capabilities() -> dict[str, Any]:
        """What this worker can do, and how much of it."""
        status = worker.status()
        return {
            "version": __version__,
            "sessions": {"capacity": worker.capacity, "active": worker.sessions, "fps": float(SESSION_FPS)},
            "devices": status["config"]["devices"],
            "engines": status["config"]["engines"],
            "output_suffixes": list(OUTPUT_SUFFIXES),
            "parsing_modes": ["jaw", "neck", "raw"],
            "defaults": {"bbox_shift": PreprocessingConfig.bbox_shift},
        }

    @router.post("/worker/drain")
    def drain(request: Request) -> dict[str, Any]:
        """Takes no more work, for a rolling restart; what runs goes on, and a signal ends the process."""
        if not request.scope["state"].get("operator"):
            raise HTTPException(403, "only operators may drain: from this machine, or with the token 无权限")
        worker.draining = True
        return {"success": True, "status": "draining", "running": len(worker.line)}

    @router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def docs() -> str:
        """All calls on one page that fetches nothing."""
        return docs_page(app.openapi())

    return router


def make_registry(worker: Worker, jobs: Jobs) -> CollectorRegistry:
    """The metrics of one worker."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(worker, jobs))  # type: ignore[arg-type]
    ProcessCollector(registry=registry)
    return registry


def docs_page(schema: dict[str, Any]) -> str:
    """The OpenAPI description as plain HTML."""
    sections: dict[str, list[str]] = {}
    for path, calls in schema["paths"].items():
        for method, call in calls.items():
            fields = _body_fields(call, schema)
            sections.setdefault(call.get("tags", ["other"])[0], []).append(
                _docs_entry(method, path, call, fields)
            )
    body = "".join(f"<h2>{html.escape(name)}</h2>{''.join(rows)}" for name, rows in sections.items())
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        "<style>body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "code{font-size:.95em}dt{font-weight:600}section{border-top:1px solid #8884;padding:.5rem 0}</style>"
        f'<h1>{title}</h1><p><a href="openapi.json">openapi.json</a></p>{body}</html>'
    )


def _docs_entry(method: str, path: str, call: dict[str, Any], fields: list[dict[str, Any]]) -> str:
    parameters = [_docs_item(item, item["in"]) for item in call.get("parameters", [])]
    kinds = ", ".join(call.get("requestBody", {}).get("content", {}))
    sent = f"<p>body: <code>{html.escape(kinds)}</code></p>" if kinds else ""
    items = "".join([*parameters, *(_docs_item(field, field["type"]) for field in fields)])
    listed = f"<ul>{items}</ul>" if items else ""
    words = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(call.get("description", "")))
    return f"<section><code>{method.upper()} {html.escape(path)}</code><p>{words}</p>{sent}{listed}</section>"


def _docs_item(item: dict[str, Any], kind: str) -> str:
    told = [kind]
    if item.get("required"):
        told.append("required")
    if item.get("default") not in (None, ""):
        told.append(f"default {json.dumps(item['default'])}")
    words = html.escape(f"({', '.join(told)}) {item.get('description', '')}".strip())
    return f"<li><code>{html.escape(item['name'])}</code> {words}</li>"


def _body_fields(call: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a call's body, each with its name, its type in words and whether it must be there."""
    content = call.get("requestBody", {}).get("content", {})
    bodies = [_resolved(kind.get("schema", {}), schema) for kind in content.values()]
    return [
        {**field, "name": name, "type": _type_in_words(field), "required": name in body.get("required", [])}
        for body in bodies
        for name, field in body.get("properties", {}).items()
    ]


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else part


def _type_in_words(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "anyOf" in field:
        kinds = [_type_in_words(kind) for kind in field["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    return "file" if "contentMediaType" in field else str(field.get("type", "any"))
