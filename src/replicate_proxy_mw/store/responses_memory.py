"""The storage of a host with one process, by the contract of `hishel`."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import hishel

from ..exchange import Chunks
from .responses import stream

# Bytes that an entry takes beside its texts and its body, as measured.
ENTRY_SIZE = 4500


class MemoryResponses(hishel.AsyncBaseStorage):
    """Keeps answers in this process, until it ends. It works in any event loop, and in several.

    Args:
        max_size: bytes of all answers; the one that was used least recently goes for one more. 64 MiB: the largest page
            of models that was recorded has 2 MB, a model some 10 kB. One answer may take an eighth of it.
        now: seconds that only grow.

    Raises:
        ValueError: `max_size` is too small; the text says so.

    Attributes:
        size: bytes that are in use.
    """

    def __init__(self, *, max_size: int = 64 << 20, now: Callable[[], float] = time.monotonic) -> None:
        if max_size < 8 * ENTRY_SIZE:
            raise ValueError(f"max_size: must be at least {8 * ENTRY_SIZE} bytes")
        super().__init__(max_stream_size=max_size // 8)
        self._max_size, self._now = max_size, now
        self._entries: OrderedDict[UUID, _Kept] = OrderedDict()
        self._ids: dict[str, dict[UUID, None]] = {}
        self._lock = threading.Lock()  # event loops in several threads may share it
        self.size = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    async def create_entry(
        self,
        request: hishel.Request,
        response: hishel.Response,
        key: str,
        *,
        ttl: float | None = None,
        tti: float | None = None,
    ) -> hishel.Entry:
        """`tti` has no meaning here: what is not used goes first in any case."""
        until = math.inf if ttl is None else self._now() + ttl
        entry = hishel.Entry(id=uuid4(), request=request, response=replace(response, stream=None))
        saving = self._saving(response, _Kept(entry, key, until))
        return replace(entry, response=replace(response, stream=saving))

    async def _saving(self, response: hishel.Response, kept: _Kept) -> AsyncIterator[bytes]:
        """The body as it comes; at its end it is kept, if it is not too long."""
        max_size = self._max_size // 8
        body = bytearray()
        async for chunk in stream(response):
            if len(body) <= max_size:
                body += chunk
            yield chunk
        kept = replace(kept, body=bytes(body))
        if kept.size <= max_size:
            with self._lock:
                self._put(kept)

    def _put(self, kept: _Kept) -> None:
        while self.size + kept.size > self._max_size:
            self._forget(next(iter(self._entries)))
        self._entries[kept.entry.id] = kept
        self._ids.setdefault(kept.key, {})[kept.entry.id] = None
        self.size += kept.size

    async def get_entries(self, key: str) -> list[hishel.Entry]:
        found = []
        with self._lock:
            now = self._now()
            for id in list(self._ids.get(key, ())):
                kept = self._entries[id]
                if kept.until <= now:
                    self._forget(id)
                    continue
                self._entries.move_to_end(id)
                response = replace(kept.entry.response, stream=aiter(Chunks([kept.body])))
                found.append(replace(kept.entry, response=response))
        return found

    async def update_headers(self, id: UUID, headers: hishel.Headers) -> None:
        with self._lock:
            if old := self._entries.get(id):
                entry = replace(old.entry, response=replace(old.entry.response, headers=headers))
                self._entries[id] = new = replace(old, entry=entry)
                self.size += new.size - old.size

    async def remove_entry(self, id: UUID) -> None:
        with self._lock:
            if id in self._entries:
                self._forget(id)

    def _forget(self, id: UUID) -> None:
        kept = self._entries.pop(id)
        self.size -= kept.size
        ids = self._ids[kept.key]
        del ids[id]
        if not ids:
            del self._ids[kept.key]


@dataclass(frozen=True, slots=True)
class _Kept:
    entry: hishel.Entry
    key: str
    until: float
    body: bytes = b""

    @property
    def size(self) -> int:
        headers = [self.entry.request.headers, self.entry.response.headers]
        texts = [text for one in headers for pair in one.items() for text in pair]
        return ENTRY_SIZE + len(self.body) + len(self.entry.request.url) + sum(map(len, texts))
