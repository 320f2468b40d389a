"""A caller over a plain connection, who can stop anywhere and see whether an answer was ended."""

from __future__ import annotations

import asyncio
from types import TracebackType

from ..compare.scenarios import Wrong
from ..compare.traffic import REQUEST_HEADERS
from .upstream import reset


class Cut(Exception):
    """The connection was closed before the end of an answer."""


class Caller:
    """One connection to 127.0.0.1; dropped at the end of `async with`."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Caller:
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 16)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self, *, rudely: bool = False) -> None:
        if rudely and not self._writer.is_closing():
            reset(self._writer)
        self._writer.transport.abort()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def ask(self, method: str, target: str, content: bytes = b"", **fields: str) -> None:
        self.send(head(method, target, len(content), **fields) + content)

    async def answer(self) -> tuple[int, bytes]:
        """Status and content.

        Raises:
            Cut: the answer is not whole.
        """
        status, chunked, length = await self.begun()
        content = bytearray()
        try:
            while True:
                if chunked:
                    length = int(await self.reader.readuntil(b"\r\n"), 16)
                last = not chunked or not length
                while length:
                    piece = await self.reader.readexactly(min(length, 1 << 16))
                    length -= len(piece)
                    content += piece
                if chunked:
                    await self.reader.readuntil(b"\r\n")
                if last:
                    return status, bytes(content)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Cut from None

    async def begun(self) -> tuple[int, bool, int]:
        """Status, whether the content is chunked, and else its length, once the head is here."""
        try:
            received = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Wrong("no answer") from None
        lines = received.lower().split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
        return int(lines[0].split(b" ")[1]), not lengths, lengths[0] if lengths else 0


def head(method: str, target: str, length: int, **fields: str) -> bytes:
    every = {
        "host": "app.example",
        **REQUEST_HEADERS,
        **{name.replace("_", "-"): value for name, value in fields.items()},
    }
    if method == "POST" and "transfer-encoding" not in every:
        every["content-length"] = str(length)
    return "\r\n".join(
        [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items()), "", ""]
    ).encode()
