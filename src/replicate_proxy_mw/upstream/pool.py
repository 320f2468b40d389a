"""Connections that are kept for the next request: a bounded pool, whose cost does not grow with what it holds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Generic, NamedTuple, Protocol, TypeVar

import anyio
import httpx

from ..event_loops import asyncio_task


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Poolable(Protocol):
    def is_usable(self) -> bool:
        """Whether an idle connection can take a request: open, and with nothing left to read."""
        ...

    async def aclose(self) -> None:
        """Close it, even if this is cancelled."""
        ...


C = TypeVar("C", bound=Poolable)


class Pool(Generic[C]):
    """Connections to any number of origins, the last used first.

    Args:
        connect: opens one to an origin, within so many seconds.
        max_connections: at a time, in use and idle.
        keepalive: seconds that one may be idle. On asyncio it is closed then; elsewhere when a later request comes.
    """

    def __init__(
        self,
        connect: Callable[[Origin, float | None], Awaitable[C]],
        *,
        max_connections: int,
        keepalive: float,
    ) -> None:
        self._connect = connect
        self._keepalive = keepalive
        self._free = max_connections
        self._waiters: deque[anyio.Event] = deque()
        # All that are idle, the oldest first, and those of each origin.
        self._idle: OrderedDict[C, tuple[Origin, float]] = OrderedDict()
        self._stacks: dict[Origin, deque[C]] = {}
        self._sweep: asyncio.TimerHandle | asyncio.Task[None] | None = None
        self._closed = False

    async def acquire(self, origin: Origin, timeouts: Mapping[str, float | None]) -> C:
        """A connection, which `release` has to be called with.

        Raises:
            httpx.PoolTimeout: none became free in `timeouts["pool"]` seconds.
            httpx.ConnectError, httpx.ConnectTimeout: a new one was needed.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait(timeouts.get("pool"))
        try:
            return await self._reused(origin) or await self._opened(origin, timeouts.get("connect"))
        except BaseException:
            self._free_slot()
            raise

    async def release(self, connection: C, origin: Origin, *, reusable: bool) -> None:
        """Give a connection back, once."""
        try:
            if reusable and not self._closed:
                self._idle[connection] = (origin, monotonic() + self._keepalive)
                self._stacks.setdefault(origin, deque()).append(connection)
                if self._sweep is None and asyncio_task() is not None:
                    self._sweep_later(asyncio.get_running_loop())
            else:
                await connection.aclose()
        finally:
            self._free_slot()

    async def aclose(self) -> None:
        """Close what is idle. What is in use is closed when it is given back."""
        self._closed = True
        if isinstance(self._sweep, asyncio.TimerHandle):
            self._sweep.cancel()
        with anyio.CancelScope(shield=True):
            while self._idle:
                await self._oldest().aclose()

    async def _wait(self, seconds: float | None) -> None:
        waiter = anyio.Event()
        self._waiters.append(waiter)
        try:
            with anyio.move_on_after(seconds):
                await waiter.wait()
        except BaseException:
            if waiter.is_set():
                self._free_slot()
            else:
                self._waiters.remove(waiter)
            raise
        if not waiter.is_set():
            self._waiters.remove(waiter)
            raise httpx.PoolTimeout("no free connection")

    def _free_slot(self) -> None:
        if self._waiters:
            self._waiters.popleft().set()
        else:
            self._free += 1

    async def _reused(self, origin: Origin) -> C | None:
        if not self._idle:
            return None
        now = monotonic()
        # Two for each one that may come: after a burst their number falls.
        for _ in range(2):
            if self._idle and next(iter(self._idle.values()))[1] <= now:
                await self._oldest().aclose()
        while stack := self._stacks.get(origin):
            connection = stack.pop()
            if not stack:
                del self._stacks[origin]
            _, expires = self._idle.pop(connection)
            if now < expires and connection.is_usable():
                return connection
            await connection.aclose()
        return None

    async def _opened(self, origin: Origin, seconds: float | None) -> C:
        # Those of other origins make room.
        while len(self._idle) > self._free:
            await self._oldest().aclose()
        return await self._connect(origin, seconds)

    def _sweep_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """Or the sockets of a burst would stay as long as nobody comes."""
        expires = next(iter(self._idle.values()))[1]
        self._sweep = loop.call_later(max(0.0, expires - monotonic()), self._begin_to_sweep, loop)

    def _begin_to_sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweep = loop.create_task(self._close_expired(loop))

    async def _close_expired(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._idle and next(iter(self._idle.values()))[1] <= monotonic():
                await self._oldest().aclose()
        finally:
            self._sweep = None
            if self._idle and not self._closed:
                self._sweep_later(loop)

    def _oldest(self) -> C:
        connection, (origin, _) = self._idle.popitem(last=False)
        stack = self._stacks[origin]
        stack.popleft()
        if not stack:
            del self._stacks[origin]
        return connection
