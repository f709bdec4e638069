"""How much one address may have open at once, so that no single caller takes all there is."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from musetalk.config import ServerConfig
from musetalk.errors import ClientLimitError

Kind = Literal["connections", "uploads", "jobs", "sessions"]


class Clients:
    """What each address has open.

    Args:
        server: the limits.
    """

    def __init__(self, server: ServerConfig) -> None:
        self._limits: dict[Kind, int | None] = {
            "connections": server.client_connections,
            "uploads": server.client_uploads,
            "jobs": server.client_jobs,
            "sessions": server.client_sessions,
        }
        self._open: Counter[tuple[str, Kind]] = Counter()
        self._lock = threading.Lock()

    def check(self, client: str, kind: Kind, count: int) -> None:
        """Refuses one more to a client who has `count` of them.

        Raises:
            ClientLimitError: he may not have more.
        """
        limit = self._limits[kind]
        if limit is not None and count >= limit:
            raise ClientLimitError(
                f"{count} {kind} of this address are open already 该地址的请求过多", "try again later", 10
            )

    @contextlib.contextmanager
    def counted(self, client: str, kind: Kind) -> Iterator[None]:
        """Counts one while the block lasts.

        Raises:
            ClientLimitError: he may not have more.
        """
        with self._lock:
            self.check(client, kind, self._open[client, kind])
            self._open[client, kind] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[client, kind] -= 1
                if not self._open[client, kind]:
                    del self._open[client, kind]
