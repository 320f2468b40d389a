"""HTTP/1.1 on one connection. h11 reads what comes and keeps the rules; only heads of requests are written here."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from typing import NamedTuple

import h11
import httpx

from .network import NetworkStream, left

# Both as in httpcore.
READ_SIZE = 65536
MAX_HEAD = 100 * 1024
# More 1xx before an answer than any server has reason for.
MAX_INTERIM = 10
# With more than this the head goes first, and the last so many bytes of the body alone.
SMALL_BODY = 65536

_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
_HOST = (b"host", b"-")
# h11's own rules for method, target, names and values, but for spaces around a value.
_TCHAR = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]"
_NAMES = re.compile(_TCHAR + rb"*+")
_HEAD = re.compile(rb"%b++ [\x21-\x7e]++ HTTP/1\.1\r\n(?:%b++: [^\x00\n\v\f\r]*+\r\n)*+\r\n" % (_TCHAR, _TCHAR))


class Answered(NamedTuple):
    """A head, what came of the body along with it, and whether that is all of it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    whole: bool


class Http11Connection:
    """One exchange after the other: `exchange`, and `more` until the end."""

    __slots__ = ("_early", "_h11", "_sent", "_single_use", "_stream")

    _h11: h11.Connection

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream
        self._single_use = stream.get_extra_info("is_single_use")
        self._sent = self._early = False

    def is_usable(self) -> bool:
        return bool(self._stream.get_extra_info("is_idle"))

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def exchange(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        timeouts: Mapping[str, float | None],
    ) -> Answered:
        """Send a request and read the head of its answer.

        Raises:
            httpx.LocalProtocolError: the request cannot be sent as it is.
            httpx.TransportError: anything else.
        """
        # A new one costs less than to start the next cycle.
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._sent = self._early = False
        try:
            await self._send(method, target, headers, body, timeouts.get("write"))
        except (httpx.WriteError, httpx.WriteTimeout) as error:
            # Servers answer before an upload ends, and close or take no more: the answer is there to be read.
            if isinstance(error, httpx.WriteTimeout) and not self._stream.get_extra_info("is_readable"):
                raise
        except h11.LocalProtocolError:
            raise httpx.LocalProtocolError("a head that is not allowed, or a body of another length") from None
        seconds = timeouts.get("read")
        # One for the whole head: neither interim answers nor single bytes of it give more time.
        deadline = None if seconds is None else monotonic() + seconds
        interim = 0
        data = await self._stream.read(READ_SIZE, seconds)
        # h11 would wait for a blank line, and takes any version.
        while data[:7] == b"HTTP/1."[: len(data)]:
            if len(data) >= 7 or not (more := await self._stream.read(READ_SIZE, left(deadline))):
                break
            data += more
        else:
            raise httpx.RemoteProtocolError("no answer of HTTP/1.1")
        size = len(data)
        self._h11.receive_data(data)
        try:
            while type(event := self._h11.next_event()) is not h11.Response:
                if event is h11.NEED_DATA:
                    data = await self._stream.read(READ_SIZE, left(deadline))
                    size += len(data)
                    self._h11.receive_data(data)
                else:
                    interim += 1
                    if interim > MAX_INTERIM:
                        raise httpx.RemoteProtocolError("interim answers without end")
        except h11.RemoteProtocolError:
            raise httpx.RemoteProtocolError("no answer, or none of HTTP/1.1") from None
        # h11 looks at the size of what is incomplete only.
        if size > MAX_HEAD and size - len(self._h11.trailing_data[0]) > MAX_HEAD:
            raise httpx.RemoteProtocolError("a head that is too large")
        return Answered(event.status_code, event.headers.raw_items(), *self._available())

    async def more(self, seconds: float | None) -> tuple[bytes, bool]:
        """What comes next of the body, and whether that is its end.

        Raises:
            httpx.RemoteProtocolError: it is malformed or cut off.
        """
        while self._h11.their_state is not h11.ERROR:
            self._h11.receive_data(await self._stream.read(READ_SIZE, seconds))
            content, ended = self._available()
            if content or ended:
                return content, ended
        raise httpx.RemoteProtocolError("malformed or incomplete body")

    def is_reusable(self) -> bool:
        """Whether another exchange can follow: both sides have ended theirs in turn, and no byte is left over."""
        if self._single_use or self._early or not self._sent:
            return False
        return self._h11.their_state is h11.DONE and self._h11.trailing_data == (b"", False)

    async def _send(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        seconds: float | None,
    ) -> None:
        # h11 checks each header by itself, at a quarter of the cost of an exchange. It is told what it needs, and the
        # head is checked at once, as strictly.
        head = b"\r\n".join((b"%b %b HTTP/1.1" % (method.encode(), target), *map(b": ".join, headers), b"", b""))
        names = b"".join([name for name, _ in headers])
        if not (_HEAD.fullmatch(head) and _NAMES.fullmatch(names) and head.count(b"\r\n") == len(headers) + 2):
            raise httpx.LocalProtocolError("a head that is not allowed")
        framing = [pair for pair in headers if pair[0].lower() in _FRAMING]
        name, value = framing[0] if framing else (b"content-length", b"0")
        # One of them and that plainly, or two servers see two bodies.
        chunked = name.lower() == b"transfer-encoding"
        if len(framing) > 1 or not (chunked or value.isdigit()):
            raise httpx.LocalProtocolError("no single length")
        if isinstance(body, bytes) and not chunked:
            if value != b"%d" % len(body):
                raise httpx.LocalProtocolError("a body of another length")
            self._h11.send(_announced(method))
            if len(body) <= SMALL_BODY:
                await self._stream.write(head + body, seconds)
            else:
                await self._stream.write(head, seconds)
                await self._stream.write(body[:-SMALL_BODY], seconds)
                await self._write_on(body[-SMALL_BODY:], seconds)
            self._sent = True
            return
        self._h11.send(h11.Request(method=method, target=b"/", headers=[_HOST, *framing]))
        await self._stream.write(head, seconds)
        pieces = aiter(_once(body) if isinstance(body, bytes) else body)
        try:
            async for piece in pieces:
                await self._write_on(self._h11.send(h11.Data(data=piece)), seconds)
        finally:
            # Left half-way it is closed late, and warned of under trio.
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()
        await self._write_on(self._h11.send(h11.EndOfMessage()), seconds)
        self._sent = True

    async def _write_on(self, data: bytes | None, seconds: float | None) -> None:
        """Who has answered before the last of a body may close instead of reading it."""
        if data:
            self._early = not self._stream.get_extra_info("is_idle")
            await self._stream.write(data, seconds)

    def _available(self) -> tuple[bytes, bool]:
        """The body as far as it has been received. An error behind it is found in the state of h11."""
        parts: list[bytes] = []
        ended = False
        try:
            while type(event := self._h11.next_event()) is h11.Data:
                parts.append(bytes(event.data))
            ended = type(event) is h11.EndOfMessage
        except h11.RemoteProtocolError:
            pass
        return b"".join(parts), ended


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


@lru_cache(maxsize=32)
def _announced(method: str) -> h11.Request:
    """A request with a body of known length, as h11 sees it when it is sent in one go."""
    return h11.Request(method=method, target=b"/", headers=[_HOST])
