"""`/v1/videos` and `/v1/templates`: renderings as jobs and templates from uploads, for callers of today.

The decision a reader would question: a video's content can be asked for while it is rendered. It then comes
as fragmented mp4 from its beginning, as fast as it is made, and a browser's `<video>` plays it from its first
second; afterwards the same address is an ordinary file with ranges.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Header, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from musetalk.config import Defaults, EncodingConfig, ParsingMode, PreprocessingConfig
from musetalk.errors import CacheError, CacheMissingError, MuseTalkError, UsageError
from musetalk.files import remove_folder
from musetalk.server.files_http import MediaFile
from musetalk.server.jobs import (
    Asked,
    ElsewhereError,
    Job,
    Jobs,
    RunningJob,
    digest_of,
    read_stream,
    template_of,
)
from musetalk.server.uploads import keep_portrait, save_upload
from musetalk.server.worker import Worker
from musetalk.templates.store import check_template_id

MAX_UPLOAD = 1 << 30  # bytes of one file
READ_BLOCK = 1 << 16  # bytes
EVENT_SECONDS = 15.0  # after which a silent stream of events sends a sign of life
STREAM_SECONDS = 1.0  # between two looks at whether a job has ended
JOB_PATTERN = "^video_[0-9a-f]{24}$"


def job_answer(job: Job) -> dict[str, Any]:
    """A job as callers see it."""
    shown = dataclasses.asdict(job)
    for secret in ("client", "key", "digest"):
        del shown[secret]
    finished = {"content_url": f"/v1/videos/{job.id}/content", "events_url": f"/v1/videos/{job.id}/events"}
    return {"object": "video", **shown, **finished}


def videos_router(worker: Worker, jobs: Jobs) -> APIRouter:
    """Renderings as jobs."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post("", status_code=201)
    def create_video(
        request: Request,
        response: Response,
        audio: Annotated[UploadFile, File(description="any file with sound 音频")],
        template_id: Annotated[str, Form(description="a template that is there; else send a portrait")] = "",
        portrait: Annotated[UploadFile | None, File(description="a picture or short video 图片")] = None,
        fps: Annotated[str, Form()] = str(Defaults.fps),
        articulation: Annotated[float, Form(description="how far the mouth moves")] = Defaults.articulation,
        bbox_shift: Annotated[int, Form()] = PreprocessingConfig.bbox_shift,
        parsing_mode: Annotated[ParsingMode, Form()] = PreprocessingConfig.parsing_mode,
        idle_motion: Annotated[bool, Form()] = PreprocessingConfig.idle_motion,
        crf: Annotated[int, Form(ge=0, le=51)] = EncodingConfig.crf,
        idempotency_key: Annotated[str, Header(max_length=200)] = "",
    ) -> dict[str, Any]:
        """Renders speech onto a template, or onto a portrait that comes with it; answers with the job.

        The same `Idempotency-Key` with the same request gives the same job again, with status 200.
        """
        if not template_id and portrait is None:
            raise UsageError("neither template_id nor portrait was sent 缺少参数", "send one of them")
        if template_id and portrait is None:
            _require_template(worker, template_id)
        settings = dataclasses.replace(
            worker.service.settings, bbox_shift=bbox_shift, parsing_mode=parsing_mode, idle_motion=idle_motion
        )
        encoding = dataclasses.replace(worker.service.encoding, crf=crf)
        client = (request.client.host if request.client else "") or "?"
        with _uploads_in(jobs.new_folder()) as folder:
            sound, face, face_sha = folder / "audio", None, ""
            sound_sha = save_upload(audio.file, sound, "sound", MAX_UPLOAD)
            if portrait is not None:
                face = folder / "portrait"
                face_sha = save_upload(portrait.file, face, "picture", MAX_UPLOAD)
            name = check_template_id(template_id or template_of(digest_of(face_sha, settings)))
            digest = digest_of(sound_sha, face_sha, name, fps, articulation, settings, encoding)
            key = idempotency_key and digest_of(client, idempotency_key)
            asked = Asked(
                folder, sound, face, name, fps, articulation, settings, encoding, digest, client, key
            )
            job, new = jobs.submit(asked)
        if not new:
            response.status_code = 200
        response.headers["Location"] = f"/v1/videos/{job.id}"
        return job_answer(job)

    @router.get("")
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str, Query(description="id of the last job of the page before")] = "",
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """Jobs, the newest first unless `order` says otherwise."""
        found = jobs.newest_first()
        if order == "asc":
            found.reverse()
        names = [job.id for job in found]
        found = found[names.index(after) + 1 if after in names else 0 :]
        page = [job_answer(job) for job in found[:limit]]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return {"object": "list", "data": page, "has_more": len(found) > limit, **ends}

    @router.get("/{job_id}")
    def read_video(job_id: str) -> dict[str, Any]:
        """How far a job is."""
        return job_answer(_known(jobs, job_id))

    @router.delete("/{job_id}")
    def delete_video(job_id: str) -> dict[str, Any]:
        """Cancels a job that runs; removes one that has ended, with its files."""
        job = _known(jobs, job_id)
        try:
            removed = jobs.remove(job_id)
        except KeyError as e:  # another call removed it meanwhile
            raise HTTPException(404, f"no video {job_id} 任务不存在") from e
        except ElsewhereError as e:
            raise HTTPException(409, f"{e.message}: {e.hint}") from e
        if removed:
            return {"object": "video.deleted", "id": job_id, "deleted": True}
        return job_answer(job)

    @router.get("/{job_id}/content", response_class=Response)
    async def video_content(job_id: str) -> Any:
        """The video: fragmented mp4 while it is rendered, afterwards the file, with ranges."""
        job, running = _known(jobs, job_id), jobs.running(job_id)
        if running is not None and not job.final:
            return await _while_it_renders(jobs, running)
        return _finished(jobs, job)

    @router.get("/{job_id}/events", response_class=Response)
    async def video_events(job_id: str) -> Any:
        """Server-sent events: the job at each change, up to its end."""
        job = _known(jobs, job_id)
        return StreamingResponse(
            _events(jobs, job), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    return router


def templates_router(worker: Worker) -> APIRouter:
    """Templates from uploads."""
    router = APIRouter(prefix="/v1/templates", tags=["templates"])
    store = worker.service.store

    @router.post("", status_code=201)
    def create_template(
        file: Annotated[UploadFile, File(description="a picture or short video 图片或视频")],
        template_id: Annotated[str, Form()],
        bbox_shift: Annotated[int, Form()] = PreprocessingConfig.bbox_shift,
        parsing_mode: Annotated[ParsingMode, Form()] = PreprocessingConfig.parsing_mode,
        idle_motion: Annotated[bool, Form()] = PreprocessingConfig.idle_motion,
        force: Annotated[bool, Form(description="make it again")] = False,
    ) -> dict[str, Any]:
        """Makes a template of an upload; answers when it is made."""
        check_template_id(template_id)
        settings = dataclasses.replace(
            worker.service.settings, bbox_shift=bbox_shift, parsing_mode=parsing_mode, idle_motion=idle_motion
        )
        source = keep_portrait(file.file, worker.server.temp_dir, MAX_UPLOAD)
        with _told_as_sent(source, file.filename):
            worker.preprocess(template_id, source, settings, force)
        return template_answer(worker, template_id)

    @router.get("")
    def list_templates() -> dict[str, Any]:
        """All templates."""
        return {"object": "list", "data": [template_answer(worker, name) for name in store.template_ids()]}

    @router.get("/{template_id}")
    def read_template(template_id: str) -> dict[str, Any]:
        """One template."""
        _require_template(worker, template_id)
        return template_answer(worker, template_id)

    @router.delete("/{template_id}")
    def delete_template(template_id: str) -> dict[str, Any]:
        """Removes a template; renderings that use it go on to their end."""
        _require_template(worker, template_id, sound=False)
        for place in worker.places:
            place.service.templates.close(store, template_id)
        store.clean(template_id)
        return {"object": "template.deleted", "id": template_id, "deleted": True}

    @router.get("/{template_id}/preview", response_class=Response)
    def template_preview(template_id: str) -> Any:
        """The picture for operators: box, landmarks and mask drawn on the first face."""
        path = store.preview_path(template_id)
        if not path.is_file():
            raise HTTPException(404, f"no preview of template {template_id[:80]!r} 没有预览")
        return MediaFile(path, media_type="image/jpeg")

    return router


def template_answer(worker: Worker, template_id: str) -> dict[str, Any]:
    """A template as callers see it: no path of this machine."""
    store = worker.service.store
    check = store.check(template_id, full=False)
    metadata = check.metadata or {}
    shown = ("engine", "bbox_shift", "parsing_mode", "bbox", "frame_count", "frame_size", "processed_at")
    opened = any(place.has_open(template_id) for place in worker.places)
    return {
        "object": "template",
        "id": template_id,
        "valid": check.valid,
        "message": check.message,
        **{key: metadata.get(key) for key in shown},
        "parameters": metadata.get("parameters"),
        "bytes": store.size(template_id),
        "open": opened,
        "preview_url": f"/v1/templates/{template_id}/preview",
    }


@contextlib.contextmanager
def _told_as_sent(path: Path, name: str | None) -> Iterator[None]:
    """Has errors name an upload as its sender does, not by where it lies here."""
    try:
        yield
    except MuseTalkError as e:
        e.message = e.message.replace(str(path), name or "the upload")
        raise


def _require_template(worker: Worker, template_id: str, *, sound: bool = True) -> None:
    """Raises CacheError unless the template is there and, where it must be `sound`, can be used."""
    check = worker.service.store.check(template_id, full=False)
    if not check.exists:
        raise CacheMissingError(check.message, "make it by POST /v1/templates 请先创建模板")
    if sound and not check.valid:
        raise CacheError(check.message, "make it again by POST /v1/templates 请重新创建模板")


@contextlib.contextmanager
def _uploads_in(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    except BaseException:
        remove_folder(folder)
        raise


def _known(jobs: Jobs, job_id: str) -> Job:
    job = jobs.get(job_id)
    if job is None:
        raise HTTPException(404, f"no video {job_id[:60]!r} 任务不存在")
    return job


def _finished(jobs: Jobs, job: Job) -> Response:
    path = jobs.video(job.id)
    if job.status != "completed" or not path.is_file():
        told = job.error or {"message": "it is rendered by another worker 由其他服务渲染"}
        raise HTTPException(409, f"video {job.id} is {job.status}: {told['message']}")
    return MediaFile(
        path, media_type="video/mp4", filename=f"{job.id}.mp4", content_disposition_type="inline"
    )


async def _while_it_renders(jobs: Jobs, running: RunningJob) -> Response:
    """The stream, once it has begun; whether it ends well shows only at its end."""
    with running.changes.watched() as watch:
        while not running.streamed and not running.job.final:
            await watch.change(STREAM_SECONDS)
    stream = read_stream(running)
    if stream is None:
        return _finished(jobs, running.job)

    async def content() -> AsyncIterator[bytes]:
        with stream, running.changes.watched() as watch:
            while True:
                ended = running.job.final
                while block := stream.read(READ_BLOCK):
                    yield block
                if ended:
                    return
                await watch.change(STREAM_SECONDS)

    return StreamingResponse(content(), media_type="video/mp4", headers={"Cache-Control": "no-store"})


async def _events(jobs: Jobs, job: Job) -> AsyncIterator[str]:
    running = jobs.running(job.id)
    if running is None:
        yield _event(job)
        return
    with running.changes.watched() as watch:
        told = ""
        while True:
            ended, event = running.job.final, _event(running.job)
            if event != told:
                yield event
                told = event
            if ended:
                return
            if not await watch.change(EVENT_SECONDS):
                yield ": alive\n\n"
            await asyncio.sleep(0)


def _event(job: Job) -> str:
    return f"event: {job.status}\ndata: {json.dumps(job_answer(job))}\n\n"
