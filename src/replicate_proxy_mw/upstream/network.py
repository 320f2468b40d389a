"""Bytes to and from a host, in the shape of httpcore's network streams, with httpx's exceptions."""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from socket import SOCK_STREAM
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import httpx

from .contract import NotConnected

if TYPE_CHECKING:
    # A third of a second to import, and needed off asyncio only.
    import httpcore

# As much as asyncio's transports hold of an upload before they ask for a pause.
HIGH_WATER = 65536
# RFC 8305, 5: what a host with broken IPv6 costs.
ATTEMPT_DELAY = 0.25

Dialed: TypeAlias = "tuple[asyncio.Transport, AsyncioStream]"


class NetworkStream(Protocol):
    """One task at a time uses it. Seconds of None wait for ever."""

    async def read(self, max_bytes: int, seconds: float | None = None) -> bytes:
        """What has arrived, or what arrives next; empty at the end."""
        ...

    async def write(self, buffer: bytes, seconds: float | None = None) -> None:
        """Return when there is room for more."""
        ...

    async def aclose(self) -> None:
        """Drop the connection and what is not sent yet."""
        ...

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: whether there is something to read, be it the end; False where that cannot be told.
        `is_idle`: whether nothing at all has come, asked of the kernel too.
        `is_single_use`: whether that cannot be told, and a next answer could be a stray one."""
        ...


def left(deadline: float | None) -> float | None:
    """Seconds until `deadline`, which is one of `monotonic`.

    Raises:
        httpx.ReadTimeout: there are none.
    """
    if deadline is None:
        return None
    seconds = deadline - monotonic()
    if seconds <= 0:
        raise httpx.ReadTimeout("no answer in time")
    return seconds


async def connect(
    host: str, port: int, *, ssl_context: ssl.SSLContext | None, seconds: float | None = None
) -> NetworkStream:
    """Connect by TCP, and by TLS if there is a context, in so many seconds for all of it.

    Raises:
        NotConnected, httpx.ConnectTimeout: say nothing of the host's answer.
    """
    if not _on_asyncio():
        return await _connect_trio(host, port, ssl_context, seconds)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            _, stream = await _dial(loop, host, port)
            if ssl_context is not None:
                await stream.start_tls(ssl_context, host)
            return stream
    except TimeoutError:
        failure: httpx.TransportError = httpx.ConnectTimeout("not connected in time")
    except (OSError, UnicodeError) as error:
        failure = NotConnected(type(error).__name__)
    raise failure


def _on_asyncio() -> bool:
    """Not so within trio's guest mode, although a loop of asyncio runs there."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


async def _dial(loop: asyncio.AbstractEventLoop, host: str, port: int) -> Dialed:
    """The first address of a host that answers, each tried a little after the one before (RFC 8305).

    uvloop's `create_connection` tries them one after the other only.
    """
    addresses = deque(_interleaved(await loop.getaddrinfo(host, port, type=SOCK_STREAM)))
    running: set[asyncio.Task[Dialed]] = set()
    failure: BaseException | None = None
    try:
        while addresses or running:
            if addresses:
                running.add(loop.create_task(_attempt(loop, *addresses.popleft()[:2])))
            delay = ATTEMPT_DELAY if addresses else None
            done, _ = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.remove(task)
                failure = task.exception()
                if failure is None:
                    return task.result()
        raise failure or OSError("no address")
    finally:
        del failure
        for task in running:
            task.cancel()
            task.add_done_callback(_drop)


def _interleaved(found: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Addresses, the families taking turns, each once."""
    families: dict[Any, dict[Any, None]] = {}
    for family, _, _, _, address in found:
        families.setdefault(family, {})[address] = None
    return (address for address in chain(*zip_longest(*families.values())) if address is not None)


async def _attempt(loop: asyncio.AbstractEventLoop, address: str, port: int) -> Dialed:
    return await loop.create_connection(lambda: AsyncioStream(loop), address, port)


def _drop(late: asyncio.Task[Dialed]) -> None:
    if not late.cancelled() and late.exception() is None:
        late.result()[0].abort()


class AsyncioStream(asyncio.Protocol):
    """A connection of asyncio or uvloop: nothing suspends unless it has to wait, and closing never does."""

    __slots__ = (
        "_chunks",
        "_deadline",
        "_ended",
        "_failed",
        "_full",
        "_loop",
        "_lost",
        "_paused",
        "_size",
        "_timer",
        "_transport",
        "_waiter",
    )

    _transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: list[bytes] = []
        self._size = 0
        self._paused = False
        self._full = False
        self._ended = False
        self._failed = False
        self._lost = False
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0

    async def start_tls(self, ssl_context: ssl.SSLContext, host: str) -> None:
        try:
            # What was said in the clear must not pass for a part of what is secured.
            if self._ended or self._chunks:
                raise ConnectionResetError
            wrapped = await self._loop.start_tls(self._transport, self, ssl_context, server_hostname=host)
        except BaseException:
            # Its own protocol was told, not this one.
            if not self._transport.is_closing():
                self._transport.abort()
            raise
        self._transport = cast(asyncio.Transport, wrapped)

    async def read(self, max_bytes: int, seconds: float | None = None) -> bytes:
        while not self._chunks:
            if self._failed:
                raise httpx.ReadError("connection lost")
            if self._ended:
                return b""
            if not await self._wait(self._after(seconds)):
                raise httpx.ReadTimeout("nothing received in time")
        data = b"".join(self._chunks)
        self._chunks.clear()
        if self._size > max_bytes:
            self._chunks.append(data[max_bytes:])
            data = data[:max_bytes]
        self._size -= len(data)
        if self._paused and self._size <= HIGH_WATER:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def write(self, buffer: bytes, seconds: float | None = None) -> None:
        # In pieces, since what a transport cannot send at once it copies.
        for start in range(0, len(buffer), HIGH_WATER):
            if not self._ended:
                self._transport.write(buffer[start : start + HIGH_WATER])
            # One for the whole piece: what is received meanwhile gives no more time.
            deadline = self._after(seconds) if self._full else None
            while self._full and not self._ended:
                if not await self._wait(deadline):
                    raise httpx.WriteTimeout("nothing sent in time")
            # A failed send is told to the protocol only later.
            if self._ended or self._transport.is_closing():
                raise httpx.WriteError("connection lost")

    async def aclose(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # asyncio's fails when it is done already.
        if not self._lost:
            self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._ended or bool(self._chunks)
        if info == "is_idle":
            # An end that the loop has not handed on yet is an end, too.
            return not (self._ended or self._chunks or _has_come(self._transport.get_extra_info("socket").fileno()))
        return self._transport.get_extra_info(info)

    def _after(self, seconds: float | None) -> float | None:
        return None if seconds is None else self._loop.time() + seconds

    async def _wait(self, deadline: float | None) -> bool:
        """Until something happens; False if nothing has by then.

        A timer outlives the wait and serves the next: most never come to their end.
        """
        if deadline is not None:
            self._deadline = deadline
            if self._timer is None or self._timer.when() > deadline:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(deadline, self._late)
        else:
            self._deadline = float("inf")
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._waiter = waiter
        try:
            return await waiter
        finally:
            self._waiter = None

    def _late(self) -> None:
        self._timer = None
        if self._waiter is None or self._deadline == float("inf"):
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._late)
        else:
            self._wake(False)

    def _wake(self, happened: bool = True) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(happened)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are none of asyncio's by class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """A host that says no more takes no more either: the rest of an upload is not sent."""
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = self._lost = True
        self._failed = exc is not None
        self._wake()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()


def _has_come(fileno: int) -> bool:
    # Windows has no poll, and its select has no highest number.
    if not hasattr(select, "poll"):
        return bool(select.select([fileno], [], [], 0)[0])
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    return bool(poll.poll(0))


async def _connect_trio(
    host: str, port: int, ssl_context: ssl.SSLContext | None, seconds: float | None
) -> NetworkStream:
    import httpcore

    deadline = None if seconds is None else monotonic() + seconds
    try:
        tcp = await httpcore.TrioBackend().connect_tcp(host, port, seconds)
        if ssl_context is None:
            return _TrioStream(tcp, secure=False)
        left = None if deadline is None else max(0, deadline - monotonic())
        try:
            return _TrioStream(await tcp.start_tls(ssl_context, host, left), secure=True)
        except BaseException:
            # A handshake that is cancelled leaves it open.
            await tcp.aclose()
            raise
    except Exception as error:
        failure = _as_httpx(error, httpx.ConnectError)
        if isinstance(failure, httpx.ConnectError):
            failure = NotConnected(_cause(error))
    raise failure


def _cause(error: BaseException) -> str:
    """The class of what httpcore's and trio's own errors stand for; of several addresses the first."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return type(error).__name__


class _TrioStream:
    """httpcore's stream, with httpx's exceptions."""

    __slots__ = ("_secure", "_stream")

    def __init__(self, stream: httpcore.AsyncNetworkStream, *, secure: bool) -> None:
        self._stream = stream
        self._secure = secure

    async def read(self, max_bytes: int, seconds: float | None = None) -> bytes:
        try:
            return await self._stream.read(max_bytes, seconds)
        except Exception as error:
            failure = _as_httpx(error, httpx.ReadError)
        raise failure

    async def write(self, buffer: bytes, seconds: float | None = None) -> None:
        try:
            return await self._stream.write(buffer, seconds)
        except Exception as error:
            failure = _as_httpx(error, httpx.WriteError)
        raise failure

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        # Only the socket can be asked: it has session tickets, which are no answer, and lacks what TLS holds already.
        if info == "is_single_use":
            return self._secure
        readable = not self._secure and self._stream.get_extra_info("is_readable")
        if info == "is_readable":
            return readable
        return not readable if info == "is_idle" else self._stream.get_extra_info(info)


def _as_httpx(error: Exception, otherwise: type[httpx.TransportError]) -> httpx.TransportError:
    named: type[httpx.TransportError] = getattr(httpx, type(error).__name__, otherwise)
    return named(type(error).__name__)
