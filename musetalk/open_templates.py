"""Templates that stay open between requests, each with its generator and compositor, bounded by their bytes.

The decision a reader would question: the metadata file is read at every request. It is small, and it is what
tells that a template was made anew by another process.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from musetalk.config import Defaults
from musetalk.engines.base import Engine
from musetalk.errors import CacheError
from musetalk.rendering import OpenedTemplate
from musetalk.templates.store import TemplateMetadata, TemplateStore

log = logging.getLogger(__name__)


class OpenTemplates:
    """The least recently used are closed first; renderings that still use one keep it until they end.

    Args:
        memory_limit: bytes of open templates, at most; the one opened last may exceed it alone.
    """

    def __init__(self, memory_limit: int = Defaults.memory_limit) -> None:
        self.memory_limit = memory_limit
        self._open: OrderedDict[tuple[str, str], OpenedTemplate] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[Hashable, threading.Lock] = {}

    def open(
        self, store: TemplateStore, template_id: str, engine_for: Callable[[TemplateMetadata], Engine]
    ) -> OpenedTemplate:
        """The template, ready to render; loaded again only when its cache or its engine has changed.

        Args:
            engine_for: the engine that a template's metadata asks for.

        Raises:
            CacheError: the cache is missing, damaged or made by another engine.
            WeightsError, EngineError: its engine can't run.
        """
        store.read_metadata(template_id)  # so that only templates that exist are remembered
        key = _key(store, template_id)
        with self._alone(key):
            metadata = store.read_metadata(template_id)
            engine = engine_for(metadata)
            identity = (store.identity(template_id, metadata), id(engine))
            with self._lock:
                kept = self._open.get(key)
            if kept is None or kept.identity != identity or kept.abandoned:
                kept = None  # the former state's memory is free before the new one takes its own
                self.close(store, template_id)
                kept = _opened(store, template_id, engine)
            with self._lock:
                self._open[key] = kept
                self._open.move_to_end(key)
                self._close_oldest()
            return kept

    def is_open(self, store: TemplateStore, template_id: str) -> bool:
        """Whether the template was opened and not closed since."""
        return _key(store, template_id) in self._open

    def close(self, store: TemplateStore, template_id: str) -> None:
        """Forgets a template, if it is open."""
        with self._lock:
            self._open.pop(_key(store, template_id), None)

    def templates(self) -> list[OpenedTemplate]:
        """Those that are open, the one used last at the end."""
        with self._lock:
            return list(self._open.values())

    @contextmanager
    def _alone(self, key: Hashable) -> Iterator[None]:
        """Lets one thread at a time open a template; the others find it open."""
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            yield

    def _close_oldest(self) -> None:
        while (
            len(self._open) > 1 and sum(opened.nbytes for opened in self._open.values()) > self.memory_limit
        ):
            (_, template_id), _ = self._open.popitem(last=False)
            log.info(
                "template %s is closed, open ones are limited to %d bytes", template_id, self.memory_limit
            )


def _key(store: TemplateStore, template_id: str) -> tuple[str, str]:
    return str(store.cache_dir.absolute()), template_id


def _opened(store: TemplateStore, template_id: str, engine: Engine) -> OpenedTemplate:
    from musetalk.compositor import FrameCompositor

    template, metadata = store.load(template_id)
    if metadata.get("engine_fingerprint", engine.fingerprint) != engine.fingerprint:
        raise CacheError(
            f"❌ template cache {template_id} was made with other weights 模板缓存与权重不匹配",
            "💡 请重新运行预处理 (run --preprocess again)",
        )
    generator = engine.open(dataclasses.replace(template, region_verdict=metadata.get("vae_region")))
    identity = (store.identity(template_id, metadata), id(engine))
    return OpenedTemplate(identity, template, engine, generator, FrameCompositor(template))
