"""The transport of the extra `fast`: answers are read by httptools, the compiled parser that uvicorn has for requests.

Only heads of requests are written here, from names and values that were looked at.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Mapping, Sequence
from time import monotonic

import httptools
import httpx

from .http11 import Answered
from .network import NetworkStream, left
from .pool import Origin
from .transport import PooledTransport

# As much as a read of asyncio's transports gives at once.
READ_SIZE = 262144
# Bytes of an answer without one of its body: what is longer is no head, or one that nobody should keep.
MAX_HEAD = 65536
# More 1xx before an answer than any server has reason for.
MAX_INTERIM = 10
# With more than this the head goes first, and the last so many bytes of the body alone.
SMALL_BODY = 65536

CHUNKED = -1

_FRAMING = (b"content-length", b"transfer-encoding")
# Names that are well-formed and say nothing of the body, as they have been sent. Callers cannot add to them.
MAX_NAMES = 256
_names: set[bytes] = set()

_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]++")
_START = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]++ [\x21-\x7e]++ HTTP/1\.1")


class FastTransport(PooledTransport):
    """The default transport with another parser: the same options, errors and pool."""

    async def _connect(self, origin: Origin, seconds: float | None) -> FastConnection:  # type: ignore[override]
        return FastConnection((await super()._connect(origin, seconds))._stream)


class FastConnection:
    """One request after the other: `exchange`, `more` until its end."""

    __slots__ = (
        "_early",
        "_ended",
        "_failed",
        "_headers",
        "_interim",
        "_no_content",
        "_parser",
        "_pieces",
        "_reusable",
        "_silent",
        "_single_use",
        "_status",
        "_stream",
    )

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream
        self._single_use = stream.get_extra_info("is_single_use")
        self._parser = httptools.HttpResponseParser(self)

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
        head, length = _head(method, target, headers)
        # Without a body, whatever the head says of one.
        self._no_content = method == "HEAD"
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._status = self._interim = self._silent = 0
        self._ended = self._failed = self._early = False
        self._reusable = not self._single_use
        seconds = timeouts.get("read")
        try:
            if isinstance(body, bytes):
                await self._send_whole(head, body, length, timeouts.get("write"))
            else:
                await self._stream.write(head, timeouts.get("write"))
                await self._send(body, length, timeouts)
        except (httpx.WriteError, httpx.WriteTimeout):
            # Servers answer, and take no more, before an upload ends: the answer is there to be read.
            self._reusable = False
            if not self._stream.get_extra_info("is_readable"):
                raise
        if not self._status:
            # One for the whole head: neither interim answers nor single bytes of it give more time.
            deadline = None if seconds is None else monotonic() + seconds
            await self._receive(seconds)
            while not self._status:
                await self._receive(left(deadline))
        return Answered(self._status, self._headers, self._taken(), self._ended)

    async def more(self, seconds: float | None) -> tuple[bytes, bool]:
        """What comes next of the body, and whether that is its end.

        Raises:
            httpx.RemoteProtocolError: it is malformed or cut off.
        """
        while not self._pieces and not self._ended:
            await self._receive(seconds)
        return self._taken(), self._ended

    def is_reusable(self) -> bool:
        """Whether another request can follow: both sides have ended theirs, and no byte is left over."""
        return self._reusable and self._ended and not self._early

    async def _send_whole(self, head: bytes, body: bytes, length: int, seconds: float | None) -> None:
        if length == CHUNKED:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        elif len(body) != length:
            raise httpx.LocalProtocolError("the body has another length than announced")
        if len(body) <= SMALL_BODY:
            await self._stream.write(head + body, seconds)
        else:
            await self._stream.write(head, seconds)
            await self._stream.write(body[:-SMALL_BODY], seconds)
            await self._write_on(body[-SMALL_BODY:], seconds)

    async def _send(self, body: AsyncIterable[bytes], length: int, timeouts: Mapping[str, float | None]) -> None:
        """Send the body until its end, or until there is an answer: who has answered does not wait for the rest."""
        seconds = timeouts.get("write")
        left = length
        pieces = aiter(body)
        try:
            async for piece in pieces:
                if not piece:
                    # As a chunk it would be the last one.
                    continue
                if left and await self._is_answered(timeouts):
                    return
                if length == CHUNKED:
                    piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                else:
                    left -= len(piece)
                    if left < 0:
                        raise httpx.LocalProtocolError("the body is longer than announced")
                await self._write_on(piece, seconds)
        finally:
            # A generator that is left half-way is closed late, and warned of under trio.
            if (close := getattr(pieces, "aclose", None)) is not None:
                await close()
        if left > 0:
            raise httpx.LocalProtocolError("the body is shorter than announced")
        if length == CHUNKED and not await self._is_answered(timeouts):
            await self._write_on(b"0\r\n\r\n", seconds)

    async def _write_on(self, data: bytes, seconds: float | None) -> None:
        """Who has answered before the last of a body may close instead of reading it."""
        self._early = not self._stream.get_extra_info("is_idle")
        await self._stream.write(data, seconds)

    async def _is_answered(self, timeouts: Mapping[str, float | None]) -> bool:
        if not self._stream.get_extra_info("is_readable"):
            return False
        await self._receive(timeouts.get("read"))
        if self._status:
            self._reusable = False
        return self._status > 0

    def _taken(self) -> bytes:
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _receive(self, seconds: float | None) -> None:
        if self._failed:
            raise httpx.RemoteProtocolError("a malformed answer")
        data = await self._stream.read(READ_SIZE, seconds)
        if not data:
            self._reusable = False
            if not self._until_close():
                raise httpx.RemoteProtocolError("the connection was closed before the end of the answer")
            self._ended = True
            return
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # What was whole before is good, the connection is not.
            self._reusable = False
            self._failed = not self._ended
        else:
            self._failed = self._silent > MAX_HEAD and not self._ended

    def _until_close(self) -> bool:
        return self._status > 0 and not any(name.lower() in _FRAMING for name, _ in self._headers)

    # What httptools calls. An exception from here is an HttpParserError for `_receive`.

    def on_message_begin(self) -> None:
        if self._ended:
            raise ValueError("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._status:
            # A trailer: the headers are with the caller already.
            return
        # Not by its stripped value: with a tab at its end the parser takes it for another coding.
        if len(name) == 17 and name.lower() == b"transfer-encoding" and not self._is_chunked(value.strip(b" ")):
            raise ValueError("a transfer coding that was not asked for")
        self._headers.append((name, value.strip()))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._interim += 1
            if status < 100 or status == 101 or self._interim > MAX_INTERIM:
                raise ValueError("no answer, but an interim one that was not asked for")
            self._headers = []
            return
        if self._silent > MAX_HEAD and sum(len(name) + len(value) for name, value in self._headers) > MAX_HEAD:
            raise ValueError("too long")
        self._status = status
        if self._no_content:
            # The parser cannot be told, and would wait for a body.
            self._ended = True
            raise ValueError("no content")

    def on_body(self, piece: bytes) -> None:
        self._silent = 0
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._status:
            self._ended = True
            if not self._parser.should_keep_alive():
                self._reusable = False

    def _is_chunked(self, value: bytes) -> bool:
        return value.lower() == b"chunked" and self._parser.get_http_version() == "1.1"


def _head(method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """The head of a request, and the length of its body or `CHUNKED`."""
    start = b"%b %b HTTP/1.1" % (method.encode(), target)
    lines = list(map(b": ".join, headers))
    checked = b"".join(lines)
    # CR, LF and NUL; as numbers they are found ten times as fast.
    if not _START.fullmatch(start) or 13 in checked or 10 in checked or 0 in checked:
        raise httpx.LocalProtocolError("a head that is not allowed")
    length: int | None = None
    for name, value in [pair for pair in headers if pair[0] not in _names]:
        lower = name.lower()
        if lower in _FRAMING:
            if length is not None:
                raise httpx.LocalProtocolError("more than one length")
            length = _length(lower, value)
        elif not _NAME.fullmatch(name):
            raise httpx.LocalProtocolError("a head that is not allowed")
        elif len(_names) < MAX_NAMES:
            _names.add(name)
    return b"\r\n".join((start, *lines, b"", b"")), length or 0


def _length(name: bytes, value: bytes) -> int:
    if name == b"content-length" and value.isdigit() and len(value) < 19:
        return int(value)
    if name == b"transfer-encoding" and value.lower() == b"chunked":
        return CHUNKED
    raise httpx.LocalProtocolError("a length that is not allowed")
