"""Answers kept for a while in a storage of `hishel`: looked up, replaced and ended, in bounded time."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import TypeVar

import anyio
import hishel

from ..errors import ProxyError
from ..event_loops import OfLoop
from ..exchange import Chunks, ProxyResponse
from ..host_calls import HostFailed, ask, failure_of
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

# At a time: of redis-py's pool, 8.1 has 100 connections, and other stores may have calls on the same client. Those that
# end answers have turns of their own, since they matter more than reads, of which there may be many.
MAX_CALLS, MAX_ENDS = 20, 5

# Seconds between two lines about failures.
LOG_PAUSE = 10.0

_MAX_AGE = re.compile(r'(?:^|[\s,])max-age\s*=\s*"?\d+"?\s*(?:,|$)', re.IGNORECASE)
# Also where a time is stated that is none, or is for others.
_NOT_FRESH = re.compile(r"no-cache|no-store|max-?age", re.IGNORECASE)


def texts(response: ProxyResponse) -> Pairs:
    """Replicate's headers: those of Portkey are put in by layers for one answer."""
    return [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in response.headers
        if not name.startswith(b"x-portkey-")
    ]


def to_store(pairs: Pairs, since: float, lifetime: int) -> hishel.Headers:
    """The headers by which `hishel` decides, with what Replicate does not state: when, and for how long."""
    headers: dict[str, list[str]] = {AS_THEY_CAME: [json.dumps(pairs)]}
    for name, value in pairs:
        headers.setdefault(name, []).append(value)
    age = headers.pop("age", ["0"])[0]
    # The proxy drops Replicate's own. From the request on, since the answer may be that old (section 4.2.3).
    headers["date"] = [formatdate(since - (int(age) if age.isdecimal() and len(age) < 10 else 0), usegmt=True)]
    stated = ", ".join(headers.get("cache-control", ()))
    if "expires" not in headers and not _MAX_AGE.search(stated):
        seconds = 0 if _NOT_FRESH.search(stated) else lifetime
        headers["cache-control"] = [f"{stated}, max-age={seconds}" if stated else f"max-age={seconds}"]
    return hishel.Headers(headers)


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
        timeout: seconds for each call of a method, of which it may have to wait for its turn.

    Attributes:
        max_body: bytes of the longest body that is stored.

    Raises:
        ValueError: there is no such storage, or no such time.
    """

    def __init__(self, storage: hishel.AsyncBaseStorage, *, timeout: float) -> None:
        if not isinstance(storage, hishel.AsyncBaseStorage):
            raise ValueError("storage: must be a hishel.AsyncBaseStorage")
        if not timeout > 0:
            raise ValueError("timeout: must be more than 0 seconds")
        self._storage, self._timeout = storage, timeout
        self.max_body = min(MAX_SIZE, storage.max_stream_size or MAX_SIZE)
        # By the first byte of a key.
        self._generations = [0] * 256
        self._turns = OfLoop(lambda: anyio.Semaphore(MAX_CALLS, fast_acquire=True))
        self._turns_to_end = OfLoop(lambda: anyio.Semaphore(MAX_ENDS, fast_acquire=True))
        self._silent_until = 0.0

    def generation(self, key: str) -> int:
        """A number that grows when answers that were asked for before are out of date."""
        return self._generations[_slot(key)]

    def outdate(self, key: str) -> None:
        self._generations[_slot(key)] += 1

    async def look(self, key: str, request: hishel.Request) -> Looked | None:
        """What is stored for exactly this `request`, None if that cannot be told."""

        async def look() -> Looked:
            entries = await self._storage.get_entries(key)
            old = [entry for entry in entries if entry.request == request]
            others = [entry for entry in entries if entry.request != request]
            surplus = others[: max(0, len(others) + 1 - MAX_PER_KEY)]
            # There may be two, for a while, if two were asked for at the same time.
            return Looked(await _found(old[-1]) if old else None, old, surplus)

        return await self._ask(look)

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

        async def replace() -> None:
            for old in (*looked.old, *looked.surplus) if entry else looked.old:
                await self._storage.remove_entry(old.id)
            if entry is None or self.generation(key) != generation:
                return
            created = await self._storage.create_entry(*entry, key, ttl=ttl)
            async for _ in stream(created.response):
                pass  # it is stored as it is read
            if self.generation(key) != generation:
                await self._storage.remove_entry(created.id)

        await self._ask(replace)

    async def update(self, entry: hishel.Entry) -> None:
        """Store the headers that `entry` has."""
        await self._ask(lambda: self._storage.update_headers(entry.id, entry.response.headers))

    async def end(self, key: str) -> None:
        """Forget all under `key`, and what is on its way there. Even if the request is cancelled."""
        self.outdate(key)

        async def end() -> None:
            for entry in await self._storage.get_entries(key):
                await self._storage.remove_entry(entry.id)

        await self._ask(end, shield=True)

    async def _ask(self, call: Callable[[], Awaitable[T]], *, shield: bool = False) -> T | None:
        turns = (self._turns_to_end if shield else self._turns).get()

        async def in_turn() -> T:
            async with turns:
                return await call()

        try:
            return await ask(in_turn, seconds=self._timeout, shield=shield)
        except (HostFailed, ProxyError) as error:
            name = failure_of(error)
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + LOG_PAUSE
            logger.warning("cache storage failed: %s", name)
        return None


def _slot(key: str) -> int:
    return int(key[:2], 16)


async def _found(entry: hishel.Entry) -> Found:
    body = b"".join([chunk async for chunk in stream(entry.response)])
    return Found(entry, json.loads(entry.response.headers[AS_THEY_CAME]), body)


def stream(response: hishel.Response) -> AsyncIterator[bytes]:
    """Its body: of two kinds for hishel, of one in what is asynchronous."""
    assert isinstance(response.stream, AsyncIterator)
    return response.stream
