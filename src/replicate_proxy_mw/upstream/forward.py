"""The last step: a `ProxyRequest` becomes bytes for Replicate, and what comes back a `ProxyResponse`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from functools import lru_cache
from uuid import uuid4

import httpx
from anyio.lowlevel import RunVar

from .. import headers
from ..config import ProxyConfig
from ..errors import (
    BadRequest,
    Overloaded,
    ProxyError,
    UpstreamAborted,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from ..exchange import ProxyRequest, ProxyResponse
from .transport import BoundedTransport

logger = logging.getLogger("replicate_proxy_mw")


class Upstream:
    """Replicate, reached by the given transport or by one of its own for each event loop.

    The transport is called, not a client: a client would keep cookies of one tenant and send them for another, follow
    redirects with the token, and read `.netrc`.
    """

    def __init__(self, config: ProxyConfig, transport: httpx.AsyncBaseTransport | None) -> None:
        self._config = config
        self._given = transport
        # anyio before 4.10 tells them apart by name alone.
        self._opened: RunVar[httpx.AsyncBaseTransport | None] = RunVar(f"replicate_proxy_mw.transport.{uuid4()}", None)
        self._origin = httpx.URL(config.upstream)
        self._host = (b"host", self._origin.netloc)
        self._cached_url = lru_cache(maxsize=1024)(self._parse)
        self._return_headers = frozenset(name.lower().encode() for name in config.return_headers)
        self.timeout = {
            "connect": config.connect_timeout,
            "read": config.read_timeout,
            "write": config.write_timeout,
            "pool": config.connection_wait,
        }

    def _url(self, target: str) -> httpx.URL:
        # Parsing costs as much as sending; long targets would fill the memory, and queries may hold signatures.
        return self._parse(target) if len(target) > 128 or "?" in target else self._cached_url(target)

    def _parse(self, target: str) -> httpx.URL:
        try:
            url = httpx.URL(self._config.upstream + target)
        except httpx.InvalidURL:
            raise BadRequest("The target is too long for a URL, or is none.") from None
        # Targets are checked before; this is the last look before the token goes out.
        if (url.scheme, url.netloc, url.userinfo) != (self._origin.scheme, self._origin.netloc, b""):
            raise UpstreamFailed()
        return url

    def _transport(self) -> httpx.AsyncBaseTransport:
        if self._given is not None:
            return self._given
        opened = self._opened.get()
        if opened is None:
            config = self._config
            opened = BoundedTransport(max_connections=config.max_connections, wait=config.connection_wait)
            self._opened.set(opened)
        return opened

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request that is not for the API, and so without a token."""
        return await self._transport().handle_async_request(request)

    async def forward(self, request: ProxyRequest) -> ProxyResponse:
        """Send `request` once and return as soon as the head of the answer is there.

        Raises:
            UpstreamUnreachable, Overloaded: not one byte was sent.
            UpstreamTimeout, UpstreamFailed: it may have been received, and is not sent again.
        """
        url = self._url(request.target)
        answer = await self._sent(request, url)
        if isinstance(answer, ProxyError):
            raise answer
        return answer

    async def _sent(self, request: ProxyRequest, url: httpx.URL) -> ProxyResponse | ProxyError:
        """Errors are returned: the traceback of one that is raised would show the token, and so would the transport's
        own as its context."""
        sent = headers.with_token((self._host, *_framing(request), *request.headers), request.key)
        body = _NoBody() if request.content_length == 0 else _Body(request.body)
        try:
            response = await self._transport().handle_async_request(
                httpx.Request(request.method, url, headers=sent, stream=body, extensions={"timeout": self.timeout})
            )
        except Exception as error:
            return error.with_traceback(None) if isinstance(error, ProxyError) else classify(error)
        return await self._answer(response)

    async def _answer(self, response: httpx.Response) -> ProxyResponse | ProxyError:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        body = Answer(response.stream)
        try:
            # Servers drop the connection when they are asked to send another status, and 101 was not asked for.
            if not 200 <= response.status_code < 600:
                raise UpstreamFailed()
            kept = headers.down(response.headers.raw, response.status_code, self._return_headers)
        except ProxyError as error:
            await body.aclose()
            return error.with_traceback(None)
        return ProxyResponse(status=response.status_code, headers=kept, body=body, aclose=body.aclose)

    async def aclose(self) -> None:
        """Close what was opened in this event loop. A given transport stays its owner's."""
        opened = self._opened.get()
        if opened is not None:
            self._opened.set(None)
            await opened.aclose()


def _framing(request: ProxyRequest) -> tuple[tuple[bytes, bytes], ...]:
    """One of length and chunks, never both; neither where a method without content has none (RFC 9110, 8.6)."""
    if request.content_length is None:
        return ((b"transfer-encoding", b"chunked"),)
    if request.content_length or request.method in ("POST", "PUT", "PATCH"):
        return ((b"content-length", str(request.content_length).encode()),)
    return ()


def classify(error: Exception) -> ProxyError:
    if isinstance(error, httpx.PoolTimeout):
        return Overloaded()
    if isinstance(error, httpx.TimeoutException):
        return UpstreamTimeout()
    if isinstance(error, httpx.ConnectError):
        return UpstreamUnreachable()
    # By name, since h11's own gets through httpcore as it is.
    if type(error).__name__ == "LocalProtocolError":
        logger.error("request failed: a layer made it one that cannot be sent (does content_length fit the body?)")
        return ProxyError()
    return UpstreamFailed()


class _NoBody(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""


class _Body(httpx.AsyncByteStream):
    """The caller's body as httpx wants it."""

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.__aiter__()


class Answer:
    """The answer's body, undecoded. Whatever ends it too early is one exception that says nothing of the wire."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream
        self._chunks = stream.__aiter__()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._chunks.__anext__()
        except StopAsyncIteration:
            raise
        except Exception:
            pass
        raise UpstreamAborted()

    async def aclose(self) -> None:
        # A generator that is left half-way is closed late, and warned of under trio.
        for part in (self._chunks, self._stream):
            with suppress(Exception):
                if close := getattr(part, "aclose", None):
                    await close()
