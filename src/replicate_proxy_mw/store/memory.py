"""The store of a host with one process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from .contract import StoredPrediction


class MemoryPredictionStore:
    """Remembers predictions in this process, until it ends.

    Args:
        max_entries: the oldest is forgotten for one more. 100,000 take about 43 MB, and 79 MB with details of 250
            characters.
        max_age: seconds until an entry is forgotten. A week: trainings take days, and Replicate keeps no input and
            output of predictions for more than an hour.
        now: seconds that only grow.

    Attributes:
        evicted: entries that were forgotten for want of room, before their time.
    """

    def __init__(
        self,
        *,
        max_entries: int = 100_000,
        max_age: float = 7 * 86400.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_entries < 1:
            raise ValueError("max_entries: must be at least 1")
        if not max_age > 0:
            raise ValueError("max_age: must be more than 0 seconds")
        self._max_entries, self._max_age, self._now = max_entries, max_age, now
        self._entries: OrderedDict[str, tuple[float, StoredPrediction]] = OrderedDict()
        self._lock = threading.Lock()  # event loops in several threads may share it
        self.evicted = 0

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._entries)

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        with self._lock:
            self._forget()
            if id in self._entries:
                until, known = self._entries[id]
                self._entries[id] = until, _filled_in(known, prediction)
                return
            if len(self._entries) >= self._max_entries:
                self._entries.popitem(last=False)
                self.evicted += 1
            self._entries[id] = self._now() + self._max_age, prediction

    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        with self._lock:
            self._forget()
            return {id: self._entries[id][1] for id in ids if id in self._entries}

    async def read(self, id: str, status: str, /) -> StoredPrediction | None:
        with self._lock:
            self._forget()
            if id not in self._entries:
                return None
            until, known = self._entries[id]
            read = replace(known, reads=known.reads + 1)
            self._entries[id] = until, replace(read, status=status)
            return read

    async def claim(self, id: str, /) -> StoredPrediction | None:
        with self._lock:
            self._forget()
            until, prediction = self._entries.get(id, (0.0, None))
            if prediction is None or prediction.reported:
                return None
            self._entries[id] = until, replace(prediction, reported=True)
            return prediction

    def _forget(self) -> None:
        """Entries are in the order of their time, since each lives equally long."""
        now = self._now()
        while self._entries and next(iter(self._entries.values()))[0] <= now:
            self._entries.popitem(last=False)


def _filled_in(known: StoredPrediction, more: StoredPrediction) -> StoredPrediction:
    return replace(
        known,
        traceparent=more.traceparent if known.traceparent is None else known.traceparent,
        details=more.details if known.details is None else known.details,
        status=more.status if known.status is None else known.status,
    )
