"""The last step: a `ProxyRequest` becomes bytes for Replicate, and what comes back a `ProxyResponse`."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import httpx

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
from ..event_loops import OfLoop
from ..exchange import Chunks, ProxyRequest, ProxyResponse, nothing_to_close
from .contract import NotConnected, ResponseBody

if TYPE_CHECKING:
    from .transport import PooledTransport

logger = logging.getLogger("replicate_proxy_mw")

# A target that httpx would send as it stands.
_AS_IT_IS = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+(?:\?[A-Za-z0-9._~=&-]+)?")
_LONG = 2048


class Upstream:
    """Replicate, reached by the given transport or by one of its own for each event loop.

    The transport is called, not a client: a client would keep cookies of one tenant and send them for another, follow
    redirects with the token, and read `.netrc`.
    """

    def __init__(self, config: ProxyConfig, transport: httpx.AsyncBaseTransport | None) -> None:
        self._upstream = config.upstream
        self._given = transport
        if transport is None:
            _own(config)  # imported now, so that the first request need not wait for it
        self._opened = OfLoop(partial(_open, config))
        self._origin = httpx.URL(config.upstream)
        self._base = self._origin.raw_path.rstrip(b"/")
        self._host = (b"host", self._origin.netloc)
        self._cached_url = lru_cache(maxsize=1024)(self._parse)
        self._return_headers = frozenset(name.lower().encode() for name in config.return_headers)
        self.timeout = {
            "connect": config.connect_timeout,
            "read": config.read_timeout,
            "write": config.write_timeout,
            "pool": config.connection_wait,
        }

    def _raw_target(self, target: str) -> bytes:
        """Path and query as they are sent; what httpx would encode otherwise is left to it."""
        if len(target) < _LONG and _AS_IT_IS.fullmatch(target):
            return self._base + target.encode()
        return self._url(target).raw_path

    def _url(self, target: str) -> httpx.URL:
        # Parsing costs as much as sending; long targets would fill the memory, and queries may hold signatures.
        return self._parse(target) if len(target) > 128 or "?" in target else self._cached_url(target)

    def _parse(self, target: str) -> httpx.URL:
        try:
            url = httpx.URL(self._upstream + target)
        except httpx.InvalidURL:
            raise BadRequest("The target is too long for a URL, or is none.") from None
        # Targets are checked before; this is the last look before the token goes out.
        if (url.scheme, url.netloc, url.userinfo) != (self._origin.scheme, self._origin.netloc, b""):
            raise UpstreamFailed()
        return url

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request that is not for the API, and so without a token."""
        return await (self._given or self._opened.get()).handle_async_request(request)

    async def forward(self, request: ProxyRequest) -> ProxyResponse:
        """Send `request` once and return as soon as the head of the answer is there.

        Raises:
            UpstreamUnreachable, Overloaded: not one byte was sent.
            UpstreamTimeout, UpstreamFailed: it may have been received, and is not sent again.
        """
        if self._given is None:
            answer = await self._exchanged(self._opened.get(), request, self._raw_target(request.target))
        else:
            answer = await self._sent(self._given, request, self._url(request.target))
        if isinstance(answer, ProxyError):
            raise answer
        if isinstance(answer.body, Answer):
            # Whatever the layers do with it.
            request.opened.append(answer.body)
        return answer

    # Both return errors: the traceback of one that is raised would show the token, and so would the transport's own as
    # its context.

    async def _exchanged(
        self, transport: PooledTransport, request: ProxyRequest, target: bytes
    ) -> ProxyResponse | ProxyError:
        sent = self._headers(request)
        # What is derived from it wants to know when its reading begins, which is when there is a connection.
        body = request.body.at_hand if type(request.body) is Chunks else None
        try:
            received = await transport.exchange(
                request.method, target, sent, request.body if body is None else body, self.timeout
            )
        except BaseException as error:
            del sent  # a host that cancels may look into the frames
            return _failure(error)
        if isinstance(received.body, bytes):
            return self._answer(received.status, received.headers, Chunks((received.body,)), nothing_to_close)
        answer = Answer(received.body)
        return await self._open_answer(received.status, received.headers, answer)

    async def _sent(
        self, transport: httpx.AsyncBaseTransport, request: ProxyRequest, url: httpx.URL
    ) -> ProxyResponse | ProxyError:
        """By a transport that knows httpx's contract alone."""
        sent = self._headers(request)
        body = _NoBody() if request.content_length == 0 else _Body(request.body)
        try:
            response = await transport.handle_async_request(
                httpx.Request(request.method, url, headers=sent, stream=body, extensions={"timeout": self.timeout})
            )
        except BaseException as error:
            del sent  # a host that cancels may look into the frames
            return _failure(error)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        return await self._open_answer(response.status_code, response.headers.raw, Answer(response.stream))

    def _headers(self, request: ProxyRequest) -> list[tuple[bytes, bytes]]:
        return headers.with_token((self._host, *_framing(request), *request.via, *request.headers), request.key)

    async def _open_answer(
        self, status: int, raw: Sequence[tuple[bytes, bytes]], body: Answer
    ) -> ProxyResponse | ProxyError:
        answer = self._answer(status, raw, body, body.aclose)
        if isinstance(answer, ProxyError):
            await body.aclose()
        return answer

    def _answer(
        self,
        status: int,
        raw: Sequence[tuple[bytes, bytes]],
        body: AsyncIterable[bytes],
        aclose: Callable[[], Awaitable[None]],
    ) -> ProxyResponse | ProxyError:
        # Servers drop the connection when they are asked to send another status, and 101 was not asked for.
        if not 200 <= status < 600:
            return UpstreamFailed()
        try:
            kept = headers.down(raw, status, self._return_headers)
        except ProxyError as error:
            return error.with_traceback(None)
        return ProxyResponse(status=status, headers=kept, body=body, aclose=aclose)

    async def aclose(self) -> None:
        """Close what was opened in this event loop. A given transport stays its owner's."""
        opened = self._opened.take()
        if opened is not None:
            await opened.aclose()


def _open(config: ProxyConfig) -> PooledTransport:
    return _own(config)(origin=config.upstream, max_connections=config.max_connections)


def _own(config: ProxyConfig) -> type[PooledTransport]:
    # Imported where one is wanted: h11 takes long, and `fast` is of an extra.
    if config.fast:
        from .fast import FastTransport

        return FastTransport
    from .transport import PooledTransport

    return PooledTransport


def _framing(request: ProxyRequest) -> tuple[tuple[bytes, bytes], ...]:
    """One of length and chunks, never both; neither where a method without content has none (RFC 9110, 8.6)."""
    if request.content_length is None:
        return ((b"transfer-encoding", b"chunked"),)
    if request.content_length or request.method in ("POST", "PUT", "PATCH"):
        return ((b"content-length", str(request.content_length).encode()),)
    return ()


def _failure(error: BaseException) -> ProxyError:
    """What it is for the caller, without the frames that know the token; what cancels is raised again."""
    error.__traceback__ = None
    if isinstance(error, Exception) and not isinstance(error, ProxyError):
        return classify(error)
    # On trio closing the connection raises another, whose context has the frames.
    error.__context__ = None
    if isinstance(error, ProxyError):
        return error
    raise error


def classify(error: Exception) -> ProxyError:
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        # By class: what another transport says may hold anything.
        because = error.because if isinstance(error, NotConnected) else type(error).__name__
        logger.warning("Replicate could not be reached: %s", because)
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

    def __init__(self, stream: httpx.AsyncByteStream | ResponseBody) -> None:
        self._stream = stream
        self._chunks = stream.__aiter__()
        self._closed = False

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
        if self._closed:
            return
        self._closed = True
        # A generator that is left half-way is closed late, and warned of under trio.
        for part in (self._chunks, self._stream):
            with suppress(Exception):
                if close := getattr(part, "aclose", None):
                    await close()
