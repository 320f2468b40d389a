"""In Replicate's place: answers, holds, streams or fails as the query says, and knows what became of each request.

`python -m benchmarks.soak.upstream PORT`. Whoever sends another key than Replicate's is a 401.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from urllib.parse import parse_qsl

from ..compare.traffic import ID, PREDICTION, TOKEN
from ..compare.upstream import PIECE, body, write

EVENT = b"event: output\ndata: word\n\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FILE = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n"


@dataclass(frozen=True)
class Fault:
    """What upstream sends before it goes, and what the caller may then get: a status, or an answer without an end."""

    sent: bytes
    expected: tuple[int | str, ...] = (502,)
    reset: bool = False
    stays: bool = False


_OK = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"
# Unless its end comes along with its beginning.
_CUT = ("cut", 502)

FAULTS = {
    "closed": Fault(b""),
    "reset": Fault(b"", reset=True),
    "half-a-head": Fault(_OK),
    "reset-in-the-head": Fault(_OK, reset=True),
    "garbage": Fault(b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    "endless-head": Fault(_OK + b"x-filler: " + b"a" * 300_000),
    "two-lengths": Fault(_OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab"),
    "switching": Fault(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"),
    "interim-flood": Fault(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 200),
    "short": Fault(_OK + b"content-length: 100\r\n\r\nabc", _CUT),
    "reset-in-the-body": Fault(_OK + b"content-length: 100\r\n\r\nabc", _CUT, reset=True),
    "cut-chunks": Fault(_OK + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", _CUT),
    "corrupt-gzip": Fault(_OK + b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\n\x1f\x8bxxx", (200,), stays=True),
    "surplus": Fault(_OK + b"content-length: 2\r\n\r\n{}HTTP/1.1 500 Of nobody\r\ncontent-length: 0\r\n\r\n", (200,)),
}


@dataclass
class Seen:
    """What upstream knows of one request, which its callers gave a number."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    whole: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at: float = 0.0


class Upstream:
    """Listens on a port of 127.0.0.1 within `async with`.

    Attributes:
        seen: by `n` of a request's query.
        open: connections.
        busy: connections with a request that is not answered.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.seen: defaultdict[str, Seen] = defaultdict(Seen)
        self.open = self.busy = 0
        self._ids = count()

    async def __aenter__(self) -> Upstream:
        # Small buffers: a caller who reads slowly is felt here.
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=4096, limit=1 << 18)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in rest)}
        method, target, _ = line.split(" ")
        path, _, query = target.partition("?")
        wanted = dict(parse_qsl(query))
        seen = self.seen[wanted["n"]] if "n" in wanted else Seen()
        self.busy += 1
        try:
            seen.begun.set()
            size = 0
            async for piece in body(headers, reader):
                size += len(piece)
            seen.whole = True
            if headers.get("authorization") != f"Bearer {TOKEN}":
                write(writer, 401, b"{}")
                return True
            return await self._play(wanted, method, path, size, reader, writer)
        finally:
            self.busy -= 1
            seen.ended_at = monotonic()
            seen.ended.set()

    async def _play(
        self,
        wanted: dict[str, str],
        method: str,
        path: str,
        size: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        match wanted:
            case {"fault": name}:
                return await _fail(FAULTS[name], writer)
            case {"held": seconds}:
                if not await _stays(reader, float(seconds)):
                    return False
            case {"events": number, "every": seconds}:
                writer.write(STREAM)
                for _ in range(int(number)):
                    writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                    if not await _stays(reader, float(seconds)):
                        return False
                writer.write(b"0\r\n\r\n")
                return True
            case {"pieces": number}:
                writer.write(FILE % (int(number) * PIECE))
                piece = bytes(PIECE)
                for _ in range(int(number)):
                    writer.write(piece)
                    await writer.drain()
                return True
        if path == "/v1/files":
            write(writer, 201, b'{"size": %d}' % size)
        elif method == "GET" and path == "/v1/predictions":
            write(writer, 200, b'{"next": null, "previous": null, "results": [%b]}' % PREDICTION.encode())
        elif method == "GET":
            write(writer, 200, PREDICTION.replace(ID, path.rpartition("/")[2]).encode())
        else:
            write(writer, 201, PREDICTION.replace(ID, f"{next(self._ids):026d}").encode())
        return True


async def _stays(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the proxy keeps the connection for so long; it sends nothing meanwhile."""
    try:
        async with asyncio.timeout(seconds):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def _fail(fault: Fault, writer: asyncio.StreamWriter) -> bool:
    writer.write(fault.sent)
    if fault.reset:
        await asyncio.sleep(0.005)  # what was sent is to arrive
        reset(writer)
    else:
        await writer.drain()
    return fault.stays


def reset(writer: asyncio.StreamWriter) -> None:
    """Drop a connection without a word of farewell."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main() -> None:
    async with Upstream(int(sys.argv[1])):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main())
