"""What layers that keep creates from being paid twice remember: digests, ids and times. No body, no key, no token."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyedCreate:
    """A create with an `Idempotency-Key`.

    Attributes:
        mark: random, of the one who has begun it.
        fingerprint: a digest of what is created.
        left: seconds in which what came of it may yet be told; 0 or less where it is not known and will not be.
        status, id: what came of it; None until then, and where that is not known.
    """

    mark: str
    fingerprint: str
    left: float
    status: int | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class EarlierResult:
    """The prediction that a create made, and how many seconds ago that was."""

    id: str
    age: float


class OnceStore(Protocol):
    """From digests to creates that were begun, and to predictions that an identical create may have again.

    Every method is atomic, in all processes that share the store. Whatever it raises, or if it takes too long for the
    layer, the store counts as out of order. `lifetime` is in seconds, and counts from the call.
    """

    async def begin(self, key: str, create: KeyedCreate, lifetime: float, /) -> KeyedCreate | None:
        """Remember that `create` is about to be sent, unless there is one for `key` already: then that one. None if it
        is remembered now, or was before, with the same mark."""
        ...

    async def end(self, key: str, create: KeyedCreate, lifetime: float, /) -> None:
        """Remember what came of `create`, also where nothing is remembered any more; nothing if another mark is."""
        ...

    async def forget(self, key: str, mark: str, /) -> None:
        """Forget the create of `key`, which has made nothing, if it has this mark."""
        ...

    async def put_result(self, key: str, id: str, lifetime: float, /) -> None:
        """Remember the prediction that was made just now, in the place of an earlier one."""
        ...

    async def result(self, key: str, /) -> EarlierResult | None:
        """The prediction remembered last, None where there is none."""
        ...


class MemoryOnceStore:
    """Remembers in this process, until it ends.

    Args:
        max_entries: of creates, and again of results. The oldest is forgotten for one more, and a create whose key is
            forgotten is sent again with it. 100,000 creates take about 60 MB, as many results 45 MB.
        now: seconds that only grow.

    Attributes:
        evicted: entries that were forgotten for want of room, before their time.
    """

    def __init__(self, *, max_entries: int = 100_000, now: Callable[[], float] = time.monotonic) -> None:
        if max_entries < 1:
            raise ValueError("max_entries: must be at least 1")
        self._max_entries, self._now = max_entries, now
        # With the time when each is forgotten. The time left of a create is kept as the moment when it is over, the age
        # of a result as that when it began.
        self._creates: OrderedDict[str, tuple[float, KeyedCreate]] = OrderedDict()
        self._results: OrderedDict[str, tuple[float, EarlierResult]] = OrderedDict()
        self._lock = threading.Lock()  # event loops in several threads may share it
        self.evicted = 0

    def __len__(self) -> int:
        with self._lock:
            now = self._now()
            return sum(until > now for entries in (self._creates, self._results) for until, _ in entries.values())

    async def begin(self, key: str, create: KeyedCreate, lifetime: float, /) -> KeyedCreate | None:
        with self._lock:
            now = self._now()
            known = _alive(self._creates, key, now)
            if known is None:
                self._put(self._creates, key, now + lifetime, replace(create, left=now + create.left))
            elif known.mark != create.mark:
                return replace(known, left=known.left - now)
            return None

    async def end(self, key: str, create: KeyedCreate, lifetime: float, /) -> None:
        with self._lock:
            now = self._now()
            known = _alive(self._creates, key, now)
            if known is None or known.mark == create.mark:
                self._put(self._creates, key, now + lifetime, replace(create, left=now + create.left))

    async def forget(self, key: str, mark: str, /) -> None:
        with self._lock:
            known = _alive(self._creates, key, self._now())
            if known is not None and known.mark == mark:
                del self._creates[key]

    async def put_result(self, key: str, id: str, lifetime: float, /) -> None:
        with self._lock:
            now = self._now()
            self._put(self._results, key, now + lifetime, EarlierResult(id, now))

    async def result(self, key: str, /) -> EarlierResult | None:
        with self._lock:
            now = self._now()
            known = _alive(self._results, key, now)
            return None if known is None else EarlierResult(known.id, now - known.age)

    def _put(self, entries: OrderedDict[str, tuple[float, T]], key: str, until: float, entry: T) -> None:
        entries.pop(key, None)
        now = self._now()
        # Those that live equally long, as all of one layer do, are in the order of their end.
        while entries and ((is_over := next(iter(entries.values()))[0] <= now) or len(entries) >= self._max_entries):
            entries.popitem(last=False)
            self.evicted += not is_over
        entries[key] = until, entry


T = TypeVar("T")


def _alive(entries: OrderedDict[str, tuple[float, T]], key: str, now: float) -> T | None:
    until, entry = entries.get(key, (-math.inf, None))
    return entry if until > now else None
