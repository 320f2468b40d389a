"""The default transport: httpx's own, with the queue for connections taken out of its pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import httpx


class BoundedTransport(httpx.AsyncBaseTransport):
    """httpx's transport, bounded in front of its pool instead of inside it.

    httpcore loses a slot of its pool for good when a request is cancelled while it queues for a connection
    (encode/httpcore#830), and a proxy cancels whenever a caller leaves: so its pool has no bound and no queue.
    The process environment is not read: proxies and certificates from there would steer the token's way.

    Args:
        max_connections: at most so many at a time.
        wait: seconds to wait for one, then `httpx.PoolTimeout`.
    """

    def __init__(self, *, max_connections: int, wait: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_connections, keepalive_expiry=5.0)
        self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        self._slots = anyio.Semaphore(max_connections, fast_acquire=True)
        self._wait = wait

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            self._slots.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.move_on_after(self._wait) as waiting:
                await self._slots.acquire()
            if waiting.cancelled_caught:
                raise httpx.PoolTimeout("no free connection") from None
        try:
            response = await self._transport.handle_async_request(request)
        except BaseException:
            self._slots.release()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Slot(response.stream, self._slots)
        return response

    async def aclose(self) -> None:
        await self._transport.aclose()


class _Slot(httpx.AsyncByteStream):
    """A response body that gives its slot back when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, slots: anyio.Semaphore) -> None:
        self._stream = stream
        self._slots: anyio.Semaphore | None = slots
        self._chunks: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._chunks is None:
            self._chunks = self._stream.__aiter__()
        return await self._chunks.__anext__()

    async def aclose(self) -> None:
        slots, self._slots = self._slots, None
        if slots is None:
            return
        try:
            await self._stream.aclose()
            if self._chunks is not None:
                # httpcore reads through generators within generators; left half-way, trio warns of each. With the
                # connection closed they come to their end at once.
                with suppress(Exception):
                    async for _ in self._chunks:
                        pass
        finally:
            slots.release()
