"""What the programs that use the toolkit today may ask of a resident process, whatever protocol they speak.

Each answer is the documented dict, or the failure with the error's code and hint.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musetalk import __version__
from musetalk.config import Defaults, EngineConfig, PreprocessingConfig, parse_articulation
from musetalk.errors import InputError, MuseTalkError, UsageError
from musetalk.server.jobs import JOBS_FOLDER, Jobs
from musetalk.server.paths import check_output, find_cache, find_input
from musetalk.server.segments import SegmentSessions
from musetalk.server.uploads import sweep_uploads
from musetalk.server.worker import Worker
from musetalk.service import CheckAnswer, template_source
from musetalk.templates.store import TemplateStore, check_template_id

WHOLE = re.compile(r"[0-9]{1,9}")

log = logging.getLogger(__name__)


class Callers:
    """The worker as its callers know it.

    Args:
        worker: does the work.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.sessions = SegmentSessions(worker, worker.server.videos_dir)
        self.sessions.videos_dir.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs(worker, worker.server.videos_dir / JOBS_FOLDER)

    def find(self, text: object, name: str, trusted: bool) -> Path:
        """The input file that a request names; `trusted` callers may name any.

        Raises:
            InputError: it isn't a path, or lies where the caller may not look.
        """
        server = self.worker.server
        shared = (server.temp_dir, server.videos_dir, *server.allow_dirs)
        return find_input(_text(text, name), shared, None if trusted else self._allowed)

    def output(self, text: object, name: str, trusted: bool) -> Path:
        """The output file that a request names."""
        return check_output(_text(text, name), None if trusted else self._allowed)

    def cache(self, request: Mapping[str, Any], trusted: bool) -> Path:
        """The cache folder that a request names; the worker's own where it names none.

        Raises:
            InputError: it isn't a path, or lies where the caller may not look.
        """
        own = self.worker.service.store.cache_dir
        if not request.get("cache_dir"):
            return own
        text = _text(request.get("cache_dir"), "cache_dir")
        return find_cache(text, own, str(request.get("template_id")), None if trusted else self._allowed)

    def _found_cache(self, template_id: str, named: Path, template_dir: Path | None) -> Path:
        """`named` where it has the template or is to get it, else the worker's own folder if that has it.

        Callers name a folder when they render and none when they preprocess.
        """
        own = self.worker.service.store
        makes_it = template_dir is not None and template_source(template_dir, template_id) is not None
        if named == own.cache_dir or makes_it or TemplateStore(named).check(template_id, full=False).exists:
            return named
        return own.cache_dir if own.check(template_id, full=False).exists else named

    @property
    def _allowed(self) -> tuple[Path, ...]:
        server = self.worker.server
        return (server.temp_dir, server.videos_dir, *server.allow_dirs)

    def preprocess(self, request: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
        """Makes a template of `image_path` or `template_image_path`."""
        given = request.get("image_path") or request.get("template_image_path")
        source = self.find(given, "image_path", trusted)
        settings = self._settings(request)
        force = bool(request.get("force") or request.get("force_refresh"))
        template_id = check_template_id(_text(request.get("template_id"), "template_id"))
        cache_dir = self.cache(request, trusted)
        return dict(self.worker.preprocess(template_id, source, settings, force, cache_dir=cache_dir))

    def inference(self, request: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
        """Renders `audio_path` onto a template into `output_path`; preprocesses first when asked to."""
        template_id = check_template_id(_text(request.get("template_id"), "template_id"))
        audio = self.find(request.get("audio_path"), "audio_path", trusted)
        output = self.output(request.get("output_path"), "output_path", trusted)
        folder = request.get("template_dir")
        template_dir = self.find(folder, "template_dir", trusted) if folder else None
        answer = self.worker.render_file(
            template_id,
            audio,
            output,
            str(request.get("fps") or Defaults.fps),
            articulation=parse_articulation(request.get("articulation", Defaults.articulation)),
            batch_size=_whole(request.get("batch_size") or EngineConfig.batch_size),
            template_dir=template_dir,
            settings=self._settings(request),
            cache_dir=self._found_cache(template_id, self.cache(request, trusted), template_dir),
        )
        return dict(answer)

    def _settings(self, request: Mapping[str, Any]) -> PreprocessingConfig:
        """How a template is made that a request asks for."""
        known = {key: request[key] for key in ("bbox_shift", "parsing_mode") if request.get(key) is not None}
        return _replaced(self.worker.service.settings, known)

    def check(self, request: Mapping[str, Any], trusted: bool) -> tuple[CheckAnswer, TemplateStore]:
        """Whether a template can be used, and where it would be."""
        template_id = check_template_id(_text(request.get("template_id"), "template_id"))
        folder = self._found_cache(template_id, self.cache(request, trusted), None)
        service = self.worker.service.sharing(cache_dir=folder)
        return service.check_template_cache(template_id), service.store

    def keep_house(self) -> None:
        """Ends silent sessions and removes old files; to be called now and then."""
        self.sessions.end_idle()
        self.sessions.sweep()
        self.jobs.sweep()
        server = self.worker.server
        sweep_uploads(server.temp_dir, time.time() - 3600 * server.keep)

    def end_overdue(self) -> None:
        """Ends what takes longer than a job may."""
        self.jobs.end_overdue()
        self.worker.line.end_overdue()

    def ping(self) -> dict[str, Any]:
        """That the worker is there."""
        return {"success": True, "message": "pong", "timestamp": time.time(), "model_loaded": True}


def failure(error: MuseTalkError, template_id: object = None) -> dict[str, Any]:
    """The documented dict of a failure."""
    return {
        "success": False,
        "error_code": error.error_code,
        "error": error.message,
        "message": error.message,
        "hint": error.hint,
        "template_id": template_id if isinstance(template_id, str) else None,
        "version": __version__,
    }


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} is missing 缺少参数", f"send {name} as text")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or not WHOLE.fullmatch(str(value)):
        raise InputError(f"batch_size is {str(value)[:40]!r}", "batch_size is a whole number")
    return int(value)


def _replaced(settings: PreprocessingConfig, changes: dict[str, Any]) -> PreprocessingConfig:
    try:
        return dataclasses.replace(settings, **changes)
    except TypeError as e:
        raise InputError(f"settings {changes} can't be used", "see --help for their kinds") from e
