"""Whose a prediction is: the store, bounded in time, and what it has not taken yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import anyio

from ..errors import ProxyError, StoreFailed
from ..host_calls import HostFailed, ask, failure_of
from .contract import PredictionStore, StoredPrediction
from .memory import MemoryPredictionStore

T = TypeVar("T")

logger = logging.getLogger("replicate_proxy_mw")

# No id of Replicate's: written before a create goes up, since a store may read and not write (a replica, a full disk).
PROBE = "-"

# Seconds that an answer which is paid waits to be recorded: Replicate's client for Python gives a create that was held
# for a minute half a second more.
PAID_TIMEOUT = 0.4

# Seconds between attempts to write what a store did not take, while the exchange ends; then with the next requests.
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

# About 5 MB, for a store that takes the probe and no creation; then the oldest is given up.
MAX_UNWRITTEN = 10_000


class Ledger:
    """Tells whose something is, and records it.

    Args:
        store: who created what.
        timeout: seconds for each call of the store; then it counts as out of order.

    Attributes:
        in_memory: the store is that of this process.
    """

    def __init__(self, store: PredictionStore, *, timeout: float) -> None:
        self._store = store
        # Memory neither waits nor fails, so that there is nothing to bound and to probe.
        self.in_memory = type(store) is MemoryPredictionStore
        self._timeout = timeout
        # As a rule, no more than there are creates under way when a store fails, since then none go up.
        self._unwritten: dict[str, StoredPrediction] = {}
        self._next_attempt = 0.0

    async def own(self, tenant: str, ids: Collection[str]) -> Collection[str]:
        """Those of `ids` that are the tenant's.

        Raises:
            StoreFailed: it cannot be told.
        """
        await self._catch_up()
        unwritten = {id for id in ids if id in self._unwritten and self._unwritten[id].tenant == tenant}
        if len(unwritten) == len(ids):
            return unwritten
        known = await self.call(lambda store: store.get(ids))
        return {id for id in ids if id in unwritten or (id in known and known[id].tenant == tenant)}

    async def writable(self) -> None:
        """Return if what is created now can be recorded.

        Raises:
            StoreFailed: it could not.
        """
        if self.in_memory:
            return
        await self._catch_up()
        await self.call(lambda store: store.put(PROBE, StoredPrediction(tenant=None)))

    async def write(self, id: str, prediction: StoredPrediction) -> bool:
        """Whether it is written; if not, it will be. Even if the caller leaves: the prediction is paid."""
        if self.in_memory:
            await self._store.put(id, prediction)
            return True
        self._unwritten[id] = prediction
        if len(self._unwritten) > MAX_UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]
        return await self._put(id, prediction)

    async def write_later(self, id: str) -> None:
        for pause in PAUSES:
            await anyio.sleep(pause)
            prediction = self._unwritten.get(id)
            if prediction is None or await self._put(id, prediction):
                return

    async def _catch_up(self) -> None:
        if not self._unwritten or time.monotonic() < self._next_attempt:
            return
        self._next_attempt = time.monotonic() + PAUSES[-1]
        for id, prediction in list(self._unwritten.items()):
            if not await self._put(id, prediction):
                # Another one first next time: it may be this one that the store does not take.
                self._unwritten[id] = self._unwritten.pop(id, prediction)
                return

    async def _put(self, id: str, prediction: StoredPrediction) -> bool:
        try:
            await self.call(lambda store: store.put(id, prediction), paid=True)
        except StoreFailed:
            return False
        self._unwritten.pop(id, None)
        return True

    async def call(self, f: Callable[[PredictionStore], Awaitable[T]], *, paid: bool = False) -> T:
        """What `f` returns of the store. If it is `paid`, the caller may leave, and has less time to wait.

        Raises:
            StoreFailed: it failed or took too long.
        """
        if self.in_memory:
            return await f(self._store)
        seconds = min(self._timeout, PAID_TIMEOUT) if paid else self._timeout
        try:
            return await ask(lambda: f(self._store), seconds=seconds, shield=paid)
        except (HostFailed, ProxyError) as error:
            failure = failure_of(error)
        logger.error("prediction store failed: %s", failure)
        raise StoreFailed()
