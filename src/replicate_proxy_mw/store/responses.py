"""Answers stored for a while, by the contract of `hishel`: in memory, and in any storage, bounded in time."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID, uuid4

import hishel

from ..errors import ProxyError
from ..exchange import Chunks, ProxyResponse
from ..host_calls import HostFailed, ask
from ..json_bodies import MAX_SIZE

T = TypeVar("T")
Pairs = Sequence[tuple[str, str]]

logger = logging.getLogger("replicate_proxy_mw")

# In what is stored: the headers as they came, since others are changed for storage.
AS_THEY_CAME = "x-portkey-cache-headers"

# Fields that a 304 does not change, since it has no content.
_OF_THE_CONTENT = frozenset(("content-encoding", "content-length", "content-range", "content-type"))

# Answers under one key: a storage looks at all of them for one.
MAX_PER_KEY = 32

# Bytes that an entry takes beside its texts and its body, as measured.
ENTRY_SIZE = 4500

# Seconds between two looks for what has expired and was not asked for.
SWEEP = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """A stored answer: its entry, its headers as they came, its body."""

    entry: hishel.Entry
    pairs: Pairs
    body: bytes

    def freshened(self, newer: Pairs) -> Found:
        """With the headers of a 304 (RFC 9111, section 3.2)."""
        newer = [pair for pair in newer if pair[0] not in _OF_THE_CONTENT]
        replaced = {"age", *(name for name, _ in newer)}
        return replace(self, pairs=[*(pair for pair in self.pairs if pair[0] not in replaced), *newer])

    def again(self, stored: hishel.Headers) -> ProxyResponse:
        """The answer as it came, as far as `stored` has its fields: some must not be stored."""
        pairs = [pair for pair in self.pairs if pair[0] in stored and pair[0] != "age"]
        pairs.append(("age", stored.get("age", "0")))
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs)
        return ProxyResponse(status=200, headers=headers, body=Chunks([self.body]))


@dataclass(frozen=True, slots=True)
class Looked:
    """What is stored for a request. `old` goes when there is a new answer, `surplus` when that is kept."""

    found: Found | None
    old: Sequence[hishel.Entry]
    surplus: Sequence[hishel.Entry]


class Responses:
    """Answers to requests, several under a key. Nothing of it raises: what a storage does not do is not done.

    Args:
        storage: where they are.
        timeout: seconds for each call of a method.

    Attributes:
        max_body: bytes of the longest body that is stored.

    Raises:
        ValueError: there is no such storage, or no such time.
    """

    def __init__(self, storage: hishel.AsyncBaseStorage, *, timeout: float) -> None:
        if not isinstance(storage, hishel.AsyncBaseStorage):
            raise ValueError("storage: must be a hishel.AsyncBaseStorage")
        encoder = getattr(getattr(storage, "_client", None), "get_encoder", None)
        if encoder is not None and encoder().decode_responses:
            raise ValueError("storage: its Redis client must have decode_responses=False, since answers are bytes")
        if not timeout > 0:
            raise ValueError("timeout: must be more than 0 seconds")
        self._storage, self._timeout = storage, timeout
        self.max_body = min(MAX_SIZE, storage.max_stream_size or MAX_SIZE)
        # By the first byte of a key.
        self._generations = [0] * 256

    def generation(self, key: str) -> int:
        """A number that grows when answers that were asked for before are out of date."""
        return self._generations[_slot(key)]

    def outdate(self, key: str) -> None:
        self._generations[_slot(key)] += 1

    async def look(self, key: str, request: hishel.Request) -> Looked | None:
        """What is stored for exactly this `request`, None if that cannot be told."""
        return await self._bounded(self._look(key, request))

    async def _look(self, key: str, request: hishel.Request) -> Looked:
        entries = await self._storage.get_entries(key)
        old = [entry for entry in entries if entry.request == request]
        others = [entry for entry in entries if entry.request != request]
        surplus = others[: max(0, len(others) + 1 - MAX_PER_KEY)]
        if not old:
            return Looked(None, old, surplus)
        # There may be two, for a while, if two were asked for at the same time.
        newest = old[-1]
        body = b"".join([chunk async for chunk in _stream(newest.response)])
        return Looked(Found(newest, json.loads(newest.response.headers[AS_THEY_CAME]), body), old, surplus)

    async def replace(
        self,
        key: str,
        looked: Looked,
        entry: tuple[hishel.Request, hishel.Response] | None,
        *,
        generation: int,
        ttl: float,
    ) -> None:
        """Store `entry` in the place of what was `looked` up, for `ttl` seconds, unless it is out of date."""
        await self._bounded(self._replace(key, looked, entry, generation, ttl))

    async def _replace(
        self,
        key: str,
        looked: Looked,
        entry: tuple[hishel.Request, hishel.Response] | None,
        generation: int,
        ttl: float,
    ) -> None:
        for old in (*looked.old, *looked.surplus) if entry else looked.old:
            await self._storage.remove_entry(old.id)
        if entry is None or self.generation(key) != generation:
            return
        created = await self._storage.create_entry(*entry, key, ttl=ttl)
        async for _ in _stream(created.response):
            pass  # it is stored as it is read
        if self.generation(key) != generation:
            await self._storage.remove_entry(created.id)

    async def update(self, entries: Sequence[hishel.Entry]) -> None:
        """Store the headers that `entries` have."""
        for entry in entries:
            await self._bounded(self._storage.update_headers(entry.id, entry.response.headers))

    async def end(self, key: str) -> None:
        """Forget all under `key`, and what is on its way there. Even if the request is cancelled."""
        self.outdate(key)
        await self._bounded(self._end(key), shield=True)

    async def _end(self, key: str) -> None:
        for entry in await self._storage.get_entries(key):
            await self._storage.remove_entry(entry.id)

    async def _bounded(self, call: Awaitable[T], *, shield: bool = False) -> T | None:
        async def called() -> T:
            return await call

        try:
            return await ask(called, seconds=self._timeout, shield=shield)
        except (HostFailed, ProxyError) as error:
            name = error.name if isinstance(error, HostFailed) else type(error).__name__
        logger.warning("cache storage failed: %s", name)
        return None


def _slot(key: str) -> int:
    return int(key[:2], 16)


def _stream(response: hishel.Response) -> AsyncIterator[bytes]:
    assert isinstance(response.stream, AsyncIterator)
    return response.stream


class MemoryResponses(hishel.AsyncBaseStorage):
    """Keeps answers in this process, until it ends. It works in any event loop, and in several.

    Args:
        max_size: bytes of all answers; the one that was used least recently goes for one more. 64 MiB: the largest page
            of models that was recorded has 2 MB, a model some 10 kB. One answer may take an eighth of it.
        max_entries: answers, likewise.
        default_ttl, default_tti: seconds until an answer is forgotten, and from its last use, where `create_entry` is
            told none; None for no such limit. An hour, as hishel's own for Redis.
        now: seconds that only grow.

    Raises:
        ValueError: an option is out of range; the text names it.

    Attributes:
        size: bytes that are in use.
        evicted: entries that were forgotten for want of room, before their time.
    """

    def __init__(
        self,
        *,
        max_size: int = 64 << 20,
        max_entries: int = 10_000,
        default_ttl: float | None = 3600.0,
        default_tti: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_size < 8 * ENTRY_SIZE:
            raise ValueError(f"max_size: must be at least {8 * ENTRY_SIZE} bytes")
        if max_entries < 1:
            raise ValueError("max_entries: must be at least 1")
        super().__init__(default_ttl=default_ttl, default_tti=default_tti, max_stream_size=max_size // 8)
        self._max_size, self._max_entry, self._max_entries, self._now = max_size, max_size // 8, max_entries, now
        self._entries: OrderedDict[UUID, _Kept] = OrderedDict()
        self._ids: dict[str, dict[UUID, None]] = {}
        self._lock = threading.Lock()  # event loops in several threads may share it
        self._swept = now()
        self.size = 0
        self.evicted = 0

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
        ttl = self.default_ttl if ttl is None else ttl
        tti = self.default_tti if tti is None else tti
        ends = float("inf") if ttl is None else self._now() + ttl
        entry = hishel.Entry(id=uuid4(), request=request, response=replace(response, stream=None))
        stream = self._saving(response, _Kept(entry=entry, key=key, ends=ends, idle=tti))
        return replace(entry, response=replace(response, stream=stream))

    async def _saving(self, response: hishel.Response, kept: _Kept) -> AsyncIterator[bytes]:
        """The body as it comes; at its end it is kept, if it is not too long."""
        body = bytearray()
        async for chunk in _stream(response):
            if len(body) <= self._max_entry:
                body += chunk
            yield chunk
        kept.body = bytes(body)
        if kept.size <= self._max_entry:
            with self._lock:
                self._put(kept)

    def _put(self, kept: _Kept) -> None:
        now = self._now()
        if now - self._swept >= SWEEP:
            self._swept = now
            for id in [id for id, other in self._entries.items() if other.until <= now]:
                self._forget(id)
        while self._entries and (len(self._entries) >= self._max_entries or self.size + kept.size > self._max_size):
            self._forget(next(iter(self._entries)))
            self.evicted += 1
        kept.used(now)
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
                kept.used(now)
                response = replace(kept.entry.response, stream=aiter(Chunks([kept.body])))
                found.append(replace(kept.entry, response=response))
        return found

    async def update_headers(self, id: UUID, headers: hishel.Headers) -> None:
        with self._lock:
            if kept := self._entries.get(id):
                self.size -= kept.size
                kept.entry = replace(kept.entry, response=replace(kept.entry.response, headers=headers))
                self.size += kept.size

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


@dataclass(kw_only=True, slots=True)
class _Kept:
    """`ends` and `until` are times, `idle` the seconds it is kept unused."""

    entry: hishel.Entry
    key: str
    ends: float
    idle: float | None
    body: bytes = b""
    until: float = 0.0

    def used(self, now: float) -> None:
        self.until = self.ends if self.idle is None else min(self.ends, now + self.idle)

    @property
    def size(self) -> int:
        headers = [self.entry.request.headers, self.entry.response.headers]
        texts = [text for one in headers for pair in one.items() for text in pair]
        return ENTRY_SIZE + len(self.body) + len(self.entry.request.url) + sum(map(len, texts))
