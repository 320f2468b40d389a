"""Instructions per exchange, which no other process disturbs: `python -m benchmarks.instructions`; needs valgrind.

Whole exchanges in one process, without a server: with a transport that answers at once, and with real ones to an
upstream in another process. What an exchange takes is the difference between few and many in fresh interpreters.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from replicate_proxy_mw import ProxyConfig, ReplicateProxyMiddleware, StaticKeyResolver
from replicate_proxy_mw.upstream import forward
from replicate_proxy_mw.upstream.contract import Received

from .compare import page
from .compare.traffic import BODY, ID, KEY, PREDICTION, REQUEST_HEADERS, RESPONSE_HEADERS, TOKEN

ROOT = Path(__file__).parents[1]
FEW, MANY = 20, 120
EXCHANGES = ("create", "poll", "host's own")
REFERENCE = "reference"
NO_MIDDLEWARE = "no middleware"
NULL, TRANSPORTS = "answers at once", ("default", "fast", "httpx")

CONTENT = PREDICTION.encode()
ANSWER = [
    (b"server", b"cloudflare"),
    (b"date", b"Sun, 22 Nov 2026 09:20:54 GMT"),
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(CONTENT)),
    (b"connection", b"keep-alive"),
    *((name.encode(), value.encode()) for name, value in RESPONSE_HEADERS.items()),
]
ASKED = [
    (b"host", b"app.example"),
    (b"content-length", b"%d" % len(BODY)),
    *((name.encode(), value.encode()) for name, value in REQUEST_HEADERS.items()),
]


def counted(kinds: Sequence[str], port: int = 9, many: int = MANY) -> dict[str, float]:
    """Instructions per exchange of each kind, of `kinds` like `create/default`."""
    fewest = dict.fromkeys(kinds, FEW)
    _run([], dict.fromkeys(kinds, 1), port)  # what is compiled once is not to be counted
    runs = [fewest, *(fewest | {kind: many} for kind in kinds)]
    with ThreadPoolExecutor(2) as two:
        base, *others = two.map(lambda counts: _total(counts, port), runs)
    return {kind: (total - base) / (many - FEW) for kind, total in zip(kinds, others, strict=True)}


def _total(counts: Mapping[str, int], port: int) -> int:
    """Cachegrind counts what callgrind does, in half the time."""
    with tempfile.NamedTemporaryFile() as log:
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        _run(["setarch", "--addr-no-randomize", *valgrind, f"--log-file={log.name}"], counts, port)
        found = re.search(rb"I +refs: +([\d,]+)", log.read())
    assert found is not None
    return int(found[1].replace(b",", b""))


def _run(under: Sequence[str], counts: Mapping[str, int], port: int) -> None:
    arguments = [str(port), *(f"{kind}={count}" for kind, count in counts.items())]
    command = [*under, sys.executable, "-m", "benchmarks.instructions", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"}, timeout=300)


# In the interpreter that is counted.


class AtOnce:
    """In the place of the transports that come along."""

    async def exchange(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        timeout: Mapping[str, float],  # noqa: ASYNC109
    ) -> Received:
        assert isinstance(body, bytes)
        return Received(201, ANSWER, CONTENT)

    async def aclose(self) -> None:
        pass


def middleware(transport: str, port: int) -> ReplicateProxyMiddleware:
    with patch.object(forward, "_open", lambda config: AtOnce()) if transport == NULL else nullcontext():
        return ReplicateProxyMiddleware(
            host,
            key_resolver=StaticKeyResolver(TOKEN, api_keys=[KEY]),
            config=ProxyConfig(upstream=f"http://127.0.0.1:{port}/v1", fast=transport == "fast"),
            transport=httpx.AsyncHTTPTransport() if transport == "httpx" else None,
        )


async def host(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": CONTENT})


def scope_of(exchange: str) -> dict[str, Any]:
    path = {"create": "/v1/predictions", "poll": f"/v1/predictions/{ID}", "host's own": "/health"}[exchange]
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST" if exchange == "create" else "GET",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": ASKED if exchange == "create" else [field for field in ASKED if field[0] != b"content-length"],
        "client": ("192.0.2.1", 1234),
        "server": ("app.example", 443),
    }


async def once(app: Callable[..., Any], scope: dict[str, Any]) -> None:
    messages = [{"type": "http.request", "body": BODY.encode() if scope["method"] == "POST" else b""}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.get_running_loop().create_future()
        return messages.pop()

    size = status = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal size, status
        status = message.get("status", status)
        size += len(message.get("body", b""))

    await app({**scope, "headers": [*scope["headers"]]}, receive, send)
    assert status == 201, status
    assert size >= len(CONTENT) // 2, size


def reference() -> None:
    """Work of the kind that an exchange is made of, and none of ours: the measure for it."""
    document = json.loads(CONTENT)
    document["urls"] = {name: url.replace("api.replicate.com", "app.example") for name, url in document["urls"].items()}
    json.dumps(document)
    for _ in range(8):
        kept = {name.lower(): value for name, value in ASKED if not name.startswith(b"x-portkey-")}
        kept[b"authorization"] = b"Bearer " + TOKEN.encode()
        b"".join(b"%b: %b\r\n" % field for field in kept.items())


async def run(counts: Sequence[tuple[str, int]], port: int) -> None:
    gc.disable()  # when it runs depends on everything else
    apps: dict[str, Callable[..., Any]] = {}
    for kind, count in counts:
        if kind == REFERENCE:
            for _ in range(count):
                reference()
            continue
        exchange, _, transport = kind.partition("/")
        if transport not in apps:
            apps[transport] = host if transport == NO_MIDDLEWARE else middleware(transport, port)
        app = apps[transport]
        scope = scope_of(exchange)
        for _ in range(count):
            await once(app, scope)
    for app in apps.values():
        if isinstance(app, ReplicateProxyMiddleware):
            await app.aclose()


# Around it.


class _Upstream(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        head = b"HTTP/1.1 201 Created\r\n" + b"".join(b"%b: %b\r\n" % field for field in ANSWER) + b"\r\n"
        while self.rfile.readline():
            length = 0
            while (line := self.rfile.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line[15:])
            self.rfile.read(length)
            self.wfile.write(head + CONTENT)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


@contextmanager
def upstream() -> Iterator[int]:
    """The port of a server that answers every request with a prediction."""
    with _Server(("127.0.0.1", 0), _Upstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def table(transports: Sequence[str]) -> str:
    kinds = [f"{exchange}/{NULL}" for exchange in EXCHANGES[:2]]
    kinds += [f"{exchange}/{transport}" for exchange in EXCHANGES[:2] for transport in transports]
    with upstream() as port:
        figures = counted([*kinds, REFERENCE], port)
    # So few that they have to be many times as many.
    bare, hosted = counted([f"{EXCHANGES[2]}/{NO_MIDDLEWARE}", f"{EXCHANGES[2]}/{NULL}"], many=10 * MANY).values()
    figures[f"{EXCHANGES[2]}/{NULL}"] = hosted - bare
    lines = [f"| | {' | '.join([NULL, *transports])} |", "| --- |" + " --- |" * (1 + len(transports))]
    for exchange in EXCHANGES:
        row = [figures.get(f"{exchange}/{transport}") for transport in (NULL, *transports)]
        lines.append(f"| {exchange} | {' | '.join('-' if each is None else f'{each / 1e3:.1f}' for each in row)} |")
    told = f"{datetime.now(UTC):%Y-%m-%d}, {page.machine()}; the reference takes {figures[REFERENCE] / 1e3:.0f}."
    return "\n".join([f"Thousands of instructions. {told}", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    if lacking := [program for program in ("valgrind", "setarch") if not shutil.which(program)]:
        sys.exit(f"Not there: {', '.join(lacking)}")
    told = table([name for name in TRANSPORTS if name != "fast" or find_spec("httptools")])
    print(told)
    if options.write:
        page.put(ROOT / "docs/performance.md", "instructions", told)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].isdigit():
        port, *counts = sys.argv[1:]
        asyncio.run(run([(kind, int(count)) for kind, _, count in (each.partition("=") for each in counts)], int(port)))
    else:
        main()
