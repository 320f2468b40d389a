"""What limits count with: a storage of the package `limits`, that of this process or one that several share."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import sha256
from heapq import heapify, heappop, heappush
from typing import TypeVar

import anyio
import limits
from limits.aio.storage import MemoryStorage, MovingWindowSupport, Storage

from ..errors import StoreFailed
from ..host_calls import HostFailed, ask
from ..keys import ReplicateKey

T = TypeVar("T")

logger = logging.getLogger("replicate_proxy_mw")

# At a time: of redis-py's pool, 8.1 has 100 connections, and whoever asks for one more fails at once.
MAX_CALLS = 50

# Steps that a call's time is waited for in.
_STEPS = 20

# Seconds between two lines about the same outage.
LOG_PAUSE = 10.0


class MemoryCounters(Storage, MovingWindowSupport):
    """The memory of this process, under any event loop: nothing in it waits.

    The storage that `limits` has for that looks through all keys in a thread of its own, up to a hundred times a
    second, and forgets no key of a moving window.

    Args:
        max_keys: for one more, the key that ends next is forgotten. 200,000 take about 85 MB.
        now: seconds since the epoch.
    """

    def __init__(self, *, max_keys: int = 200_000, now: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._max_keys, self._now = max_keys, now
        self._lock = threading.Lock()  # event loops in several threads may share it
        self._counts: dict[str, tuple[int, float]] = {}
        self._windows: dict[str, tuple[deque[float], int]] = {}
        self._ends: list[tuple[float, str]] = []  # a heap; a window that was used since ends later than it says

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        with self._lock:
            now = self._forget()
            if key not in self._counts:
                self._counts[key] = 0, self._begin(key, now + expiry)
            count, end = self._counts[key]
            self._counts[key] = count + amount, end
            return count + amount

    async def get(self, key: str) -> int:
        with self._lock:
            self._forget()
            return self._counts.get(key, (0, 0.0))[0]

    async def get_expiry(self, key: str) -> float:
        with self._lock:
            now = self._forget()
            return self._counts.get(key, (0, now))[1]

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        if amount > limit:
            return False
        with self._lock:
            now = self._forget()
            if key not in self._windows:
                self._begin(key, now + expiry)
                self._windows[key] = deque(maxlen=limit), expiry
            window, _ = self._windows[key]
            if len(window) > limit - amount and window[amount - limit - 1] >= now - expiry:
                return False
            window.extend([now] * amount)
            return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        with self._lock:
            now = self._forget()
            window, _ = self._windows.get(key, ((), 0))
            for before, moment in enumerate(window):
                if moment >= now - expiry:
                    return moment, len(window) - before
            return now, 0

    async def clear(self, key: str) -> None:
        with self._lock:
            self._counts.pop(key, None)
            self._windows.pop(key, None)
            self._ends = [entry for entry in self._ends if entry[1] != key]
            heapify(self._ends)

    async def reset(self) -> int:
        with self._lock:
            known = len(self._ends)
            for each in (self._counts, self._windows, self._ends):
                each.clear()
            return known

    async def check(self) -> bool:
        return True

    def _begin(self, key: str, end: float) -> float:
        if len(self._ends) >= self._max_keys:
            self._drop(heappop(self._ends)[1])
        heappush(self._ends, (end, key))
        return end

    def _forget(self) -> float:
        now = self._now()
        while self._ends and self._ends[0][0] < now:
            key = heappop(self._ends)[1]
            used = self._windows.get(key)
            if used is not None and (end := used[0][-1] + used[1]) >= now:
                heappush(self._ends, (end, key))
            else:
                self._drop(key)
        return now

    def _drop(self, key: str) -> None:
        self._counts.pop(key, None)
        self._windows.pop(key, None)


class Counters:
    """A storage, asked in bounded time.

    Args:
        name: of the layer that counts, for logs and texts.
        storage: None is memory of this process.
        timeout: seconds for each call. Waiting for a turn is not counted, nor is what holds up the event loop: many
            requests at once are no outage.
        rest: seconds after a failure in which it is not asked again.
        now: seconds since the epoch, for memory.

    Raises:
        ValueError: names the option and what is wrong with it.
    """

    def __init__(
        self,
        name: str,
        storage: Storage | None,
        *,
        timeout: float,
        rest: float = 0.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        if not timeout > 0:
            raise ValueError("timeout: must be more than 0 seconds")
        if isinstance(storage, (limits.storage.Storage, MemoryStorage)):
            raise ValueError("storage: must be asynchronous, such as limits.aio.storage.RedisStorage; None is memory")
        if storage is not None and not (isinstance(storage, Storage) and isinstance(storage, MovingWindowSupport)):
            raise ValueError("storage: must be one of limits.aio.storage that has moving windows, such as RedisStorage")
        self._name, self._timeout, self._rest = name, timeout, rest
        self._in_memory = storage is None
        self.storage: Storage = MemoryCounters(now=now) if storage is None else storage
        self._turns = anyio.Semaphore(MAX_CALLS, fast_acquire=True)
        self._failures = 0
        self._rests_until = self._silent_until = 0.0

    async def call(self, f: Callable[[Storage], Awaitable[T]], *, shield: bool = False) -> T:
        """What `f` returns of the storage; if `shield` is set, even if the request is cancelled when it has begun.

        Raises:
            StoreFailed: it failed or took too long.
        """
        # Memory neither waits nor fails, so that there is nothing to bound.
        if self._in_memory:
            return await f(self.storage)
        if time.monotonic() >= self._rests_until:
            failures = self._failures
            async with self._turns:
                # After a failure, those who have waited for their turns would wait for the storage one after another.
                if failures == self._failures:
                    try:
                        return await ask(lambda: self._in_time(f), seconds=math.inf, shield=shield)
                    except HostFailed as error:
                        self._failed(error.name)
        raise StoreFailed(f"{self._name}: this could not be counted, and nothing was sent; try again.")

    async def _in_time(self, f: Callable[[Storage], Awaitable[T]]) -> T:
        result: list[T] = []
        failure: Exception = TimeoutError()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end, tasks.cancel_scope)
            try:
                result.append(await f(self.storage))
            except Exception as error:
                failure = error
            tasks.cancel_scope.cancel()
        if not result:
            raise failure
        return result[0]

    async def _end(self, call: anyio.CancelScope) -> None:
        # In steps, each of which the event loop has to get to: one that is held up is late with answers, too.
        for _ in range(_STEPS):
            await anyio.sleep(self._timeout / _STEPS)
        call.cancel()

    def _failed(self, failure: str) -> None:
        self._failures += 1
        now = time.monotonic()
        self._rests_until = now + self._rest
        if now >= self._silent_until:
            self._silent_until = now + LOG_PAUSE
            logger.error("%s: storage failed: %s", self._name, failure)


def owner(key: ReplicateKey) -> str:
    """Whose counters those of `key` are, in hex: no character of a name runs into another part of a storage's key."""
    return key.identity() if key.tenant is None else of_tenant(key.tenant)


def of_tenant(tenant: str) -> str:
    return sha256(f"tenant\n{tenant}".encode("utf-8", "surrogatepass")).hexdigest()
