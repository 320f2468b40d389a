"""The time by which predictions live, so that a test need not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from starlette.types import Receive

POLL = 0.005  # real seconds between two looks at a clock, which another thread may have advanced


class Clock:
    """Real time, plus whatever a test adds. May be advanced from any thread."""

    def __init__(self) -> None:
        self._added = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self._added

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass at once; raises `ValueError` if negative, since predictions do not live backwards."""
        if seconds < 0:
            raise ValueError("time cannot go back")
        with self._lock:
            self._added += seconds


class ManualClock(Clock):
    """Stands still at `start` (seconds since the epoch) until a test advances it."""

    def __init__(self, start: float = 1_790_000_000.0) -> None:
        super().__init__()
        self._start = start

    def now(self) -> float:
        return self._start + self._added


async def until(condition: Callable[[], bool], receive: Receive) -> bool:
    """Wait until `condition` holds; False if the caller of the request that `receive` reads has left before."""
    left, watching = False, anyio.CancelScope()

    async def watch() -> None:
        nonlocal left
        with watching:
            while (await receive())["type"] != "http.disconnect":
                pass
            left = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        while not (left or condition()):  # noqa: ASYNC110 - other threads advance clocks
            await anyio.sleep(POLL)
        watching.cancel()
    return not left
