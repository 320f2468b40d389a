"""Threads for what checks compute: the host's own work, which may fill anyio's threads, keeps none of them waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from ..event_loops import OfLoop

T = TypeVar("T")

# At a time, in each event loop: enough for small texts to pass beside large ones. Nothing in them waits, and most of it
# is Python, so that more would only take turns.
MAX_THREADS = 8

_places = OfLoop(lambda: anyio.CapacityLimiter(MAX_THREADS))


async def in_thread(call: Callable[[], T]) -> T:
    """What `call` returns; it is left alone when the time is up, and other requests go on meanwhile."""
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=_places.get())
