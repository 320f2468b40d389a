"""In Replicate's place: nginx for small answers, and this program for what is held, streamed or large.

`python -m benchmarks.compare.upstream PORT`. Whoever sends another key than Replicate's is a 401 in either.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from .processes import LOAD_CORE, Process, free_port, started
from .traffic import PREDICTION, RESPONSE_HEADERS, TOKEN

EVENTS = "/v1/events"
DOWNLOAD = "/v1/files/bcwr-3okdfv3o2wehstv5f2okyftwxy57hhypqsi6osiim5iaq5k7u24a/download"
UPLOAD = "/v1/files"
PIECE = 256 * 1024


@contextmanager
def small(folder: Path) -> Iterator[Process]:
    """nginx, which answers every request with a prediction."""
    headers = "".join(f"add_header {name} '{value}' always; " for name, value in RESPONSE_HEADERS.items())
    location = f"""
        location / {{
            if ($http_authorization != 'Bearer {TOKEN}') {{ return 401; }}
            default_type application/json; {headers}
            return 201 '{PREDICTION.replace(chr(92), chr(92) * 2)}';
        }}"""
    with nginx(folder, LOAD_CORE, location) as running:
        yield running


@contextmanager
def nginx(folder: Path, core: int, location: str, beside: str = "") -> Iterator[Process]:
    port = free_port()
    folder.mkdir()
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in TEMPORARY)
    folder.joinpath("nginx.conf").write_text(
        f"""
daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid {folder}/pid; error_log stderr warn;
events {{ worker_connections 9000; }}
http {{
    access_log off; {temporary} client_max_body_size 0; keepalive_requests 1000000000; keepalive_timeout 300s;
    {beside}
    server {{ listen 127.0.0.1:{port} backlog=4096; {location} }}
}}"""
    )
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
    with started(command, core=core, port=port, log=folder / "log") as running:
        yield running


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def held_streamed_large(folder: Path) -> Iterator[Process]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.compare.upstream", str(port)]
    with started(command, core=LOAD_CORE, port=port, log=folder / "upstream.log") as running:
        yield running


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await answer(await reader.readuntil(b"\r\n\r\n"), reader, writer):
            pass
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection stays."""
    line, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in rest)}
    path, _, query = line.split(" ")[1].partition("?")
    if headers.get("authorization") != f"Bearer {TOKEN}":
        write(writer, 401, b"{}")
    elif path == EVENTS:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(3):
            event = b"event: output\nid: %d\ndata: word\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(0.02)
        writer.write(b"0\r\n\r\n")
    elif path == DOWNLOAD:
        pieces, piece = int(query.removeprefix("pieces=")), bytes(PIECE)
        length = pieces * PIECE
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n" % length)
        for _ in range(pieces):
            writer.write(piece)
            await writer.drain()
    else:
        received = 0
        async for piece in body(headers, reader):
            received += len(piece)
        if path == UPLOAD:
            write(writer, 201, b'{"size": %d}' % received)
        else:
            wanted = re.fullmatch(r"wait=(\d+)", headers["prefer"])
            assert wanted is not None, headers
            await asyncio.sleep(int(wanted[1]))
            write(writer, 201, PREDICTION.encode())
    return headers.get("connection") != "close"


async def body(headers: dict[str, str], reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    chunked = "chunked" in headers.get("transfer-encoding", "")
    left = 0 if chunked else int(headers.get("content-length", 0))
    while True:
        if chunked:
            left = int(await reader.readuntil(b"\r\n"), 16)
            if not left:
                await reader.readuntil(b"\r\n")
        if not left:
            return
        while left:
            piece = await reader.read(min(left, PIECE))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece
        if chunked:
            await reader.readexactly(2)


def write(writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
    head = b"HTTP/1.1 %d Answer\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % (status, len(content)) + content)


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=4096, limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
