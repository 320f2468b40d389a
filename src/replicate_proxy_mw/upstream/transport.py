"""The default transport: h11 on connections of our own, for one origin or for many."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterable, Coroutine, Mapping, Sequence
from typing import Any

import httpx

from .contract import Received
from .http11 import Http11Connection
from .network import connect
from .pool import Origin, Pool

_PORTS = {"http": 80, "https": 443}


class PooledTransport(httpx.AsyncBaseTransport):
    """Keeps connections and bounds their number. One instance serves one event loop.

    The process environment is not read: proxies and certificates from there would steer the token's way.

    Args:
        origin: scheme, host and port that `exchange` sends to; None where only `handle_async_request` is used.
        max_connections: at a time, over all origins.
        keepalive: seconds that a connection may be idle: shorter than any server's own, so that it seldom closes one
            while a request is on its way.
        ssl_context: by default certifi's roots, and HTTP/1.1 only.
    """

    def __init__(
        self,
        *,
        origin: str | None = None,
        max_connections: int,
        keepalive: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._origin = None if origin is None else _origin(httpx.URL(origin))
        self._ssl_context = ssl_context
        self._pool = Pool(self._connect, max_connections=max_connections, keepalive=keepalive)

    def exchange(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        timeouts: Mapping[str, float],
    ) -> Coroutine[Any, Any, Received]:
        assert self._origin is not None
        return self._exchange(self._origin, method, target, headers, body, timeouts)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, stream = request.url, request.stream
        assert isinstance(stream, AsyncIterable)
        received = await self._exchange(
            _origin(url),
            request.method,
            url.raw_path,
            request.headers.raw,
            request.read() if isinstance(stream, httpx.ByteStream) else stream,
            request.extensions.get("timeout", {}),
        )
        body = received.body
        assert isinstance(body, bytes | _Body)
        return httpx.Response(
            received.status,
            headers=received.headers,
            stream=body if isinstance(body, _Body) else httpx.ByteStream(body),
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        """Close what is idle. What is in use is closed when it is done."""
        await self._pool.aclose()

    async def _exchange(
        self,
        origin: Origin,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        timeouts: Mapping[str, float | None],
    ) -> Received:
        connection = await self._pool.acquire(origin, timeouts)
        try:
            status, fields, content, whole = await connection.exchange(method, target, headers, body, timeouts)
        except BaseException:
            await self._pool.release(connection, origin, reusable=False)
            raise
        if whole:
            await self._pool.release(connection, origin, reusable=connection.is_reusable())
            return Received(status, fields, content)
        return Received(status, fields, _Body(self._pool, origin, connection, content, timeouts.get("read")))

    async def _connect(self, origin: Origin, seconds: float | None) -> Http11Connection:
        secure = origin.scheme == "https"
        if secure and self._ssl_context is None:
            # Tens of milliseconds, so once, and not before it is needed.
            self._ssl_context = httpx.create_ssl_context(trust_env=False)
            self._ssl_context.set_alpn_protocols(["http/1.1"])
        return Http11Connection(
            await connect(origin.host, origin.port, ssl_context=self._ssl_context if secure else None, seconds=seconds)
        )


def _origin(url: httpx.URL) -> Origin:
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol("neither http nor https")
    return Origin(url.scheme, url.raw_host.decode(), url.port or _PORTS[url.scheme])


class _Body(httpx.AsyncByteStream):
    """The rest of an answer. Its connection is given back at its end, or closed."""

    __slots__ = ("_connection", "_content", "_origin", "_pool", "_seconds")

    def __init__(
        self,
        pool: Pool[Http11Connection],
        origin: Origin,
        connection: Http11Connection,
        content: bytes,
        seconds: float | None,
    ) -> None:
        self._pool = pool
        self._origin = origin
        self._connection: Http11Connection | None = connection
        self._content = content
        self._seconds = seconds

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        content, self._content = self._content, b""
        if content:
            return content
        if self._connection is None:
            raise StopAsyncIteration
        try:
            content, ended = await self._connection.more(self._seconds)
        except BaseException:
            await self.aclose()
            raise
        if self._connection is None:
            # The end of what another task has closed looks like that of a body.
            raise httpx.ReadError("closed while it was read")
        if ended:
            await self._release(self._connection.is_reusable())
        if content:
            return content
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._connection is not None:
            await self._release(False)

    async def _release(self, reusable: bool) -> None:
        connection, self._connection = self._connection, None
        assert connection is not None
        await self._pool.release(connection, self._origin, reusable=reusable)
