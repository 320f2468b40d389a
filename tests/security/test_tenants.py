"""Fifty tenants at once on connections that they share: nothing of one reaches another. Row 12.

Ten thousand requests, a quarter each on both transports and both event loops. Upstream is hostile: it sets cookies,
sends more than an answer, closes when it likes, and callers leave in the middle of what it says.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from hashlib import sha256
from typing import Any

import anyio
import pytest

from replicate_proxy_mw import MappingKeyResolver, ReplicateKey
from tests.raw_asgi import Caller, http_scope, proxy

pytestmark = pytest.mark.anyio

REQUESTS = 2500
AT_ONCE = 64
TENANTS = [f"tenant-{number}" for number in range(50)]
TOKENS = {tenant: "r8_" + sha256(tenant.encode()).hexdigest()[:37] for tenant in TENANTS}
POISON = b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\nx-request-id: poison\r\n\r\n"poison"'


def sent(tenant: str, number: int) -> bytes:
    """The body that a tenant sends: of its own, and seldom long."""
    return json.dumps({"input": f"{tenant} {number} " * (5000 if number % 29 == 0 else 1)}).encode()


def answer(token: str, body: bytes, tenant: str, number: int) -> bytes:
    """What upstream says to that: by what it was sent, not by what it should have been sent."""
    of = sha256(token.encode()).hexdigest()
    told = {"of": of, "body": sha256(body).hexdigest(), "tenant": tenant, "number": number}
    return json.dumps({**told, "more": f"{tenant} " * (2000 if number % 31 == 0 else 1)}).encode()


class Played(asyncio.Protocol):
    """Upstream's end of a connection."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._buffer = b""
        self._done = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._upstream.open.add(transport)
        self._upstream.seen["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        line, *fields = head.split(b"\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
        length = int(dict(headers).get(b"content-length", 0))
        if len(rest) < length:
            return
        body, self._buffer = rest[:length], rest[length:]
        self._request(line, headers, body)

    def _request(self, line: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        _, _, _, tenant, text = line.split(b" ")[1].decode().split("/")
        number, seen = int(text), self._upstream.seen
        tokens = [value.removeprefix(b"Bearer ").decode() for name, value in headers if name == b"authorization"]
        seen["requests"] += 1
        seen["a connection that was done with"] += self._done
        seen["another tenant's token"] += tokens != [TOKENS[tenant]]
        seen["a cookie"] += any(name == b"cookie" for name, _ in headers)
        seen["more than a request"] += bool(self._buffer)
        content = answer(tokens[0], body, tenant, number)
        of_its_own = b"set-cookie: tenant=%b\r\nx-request-id: %b\r\n" % (tenant.encode(), f"{tenant}-{number}".encode())
        start = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + of_its_own
        whole = start + b"content-length: %d\r\n\r\n%b" % (len(content), content)
        if number % 7 == 0:
            self._done = True
            self._transport.write(whole + POISON)
        elif number % 11 == 0:
            self._done = True
            self._transport.write(start + b"connection: close\r\n\r\n" + content)
            self._transport.close()
        elif number % 13 == 0:
            self._transport.write(start + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (9, content[:9]))
            rest = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content) - 9, content[9:])
            asyncio.get_running_loop().call_later(0.01, self._transport.write, rest)
        else:
            self._transport.write(whole)


class Upstream:
    """Listens in a thread of its own; `seen` counts, also what must not be."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.open: set[asyncio.Transport] = set()
        self.port = 0
        self._ready = threading.Event()

    def __enter__(self) -> Upstream:
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(5)
        return self

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: Played(self), "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        while self.open:
            self.open.pop().abort()
        await asyncio.sleep(0)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


class Leaving(Caller):
    """Leaves as soon as the first of the answer has come."""

    async def send(self, message: dict[str, Any]) -> None:
        await super().send(message)
        if self.chunks:
            self.left.set()


async def ask(app: Any, tenant: str, number: int, wrong: list[str]) -> None:
    method, body = ("POST", sent(tenant, number)) if number % 3 else ("GET", b"")
    leaves = number % 13 == 0 and number % 2 == 0
    caller = (Leaving if leaves else Caller)([body[:100], body[100:]])
    headers = [(b"x-portkey-api-key", f"pk-of-{tenant}".encode()), (b"cookie", b"tenant=" + tenant.encode())]
    if body:
        headers.append((b"content-length", str(len(body)).encode()))
    await caller.call(app, http_scope(method, f"/v1/x/{tenant}/{number}", headers))
    expected = answer(TOKENS[tenant], body, tenant, number)
    if caller.content != expected and not (leaves and expected.startswith(caller.content)):
        wrong.append(f"{tenant} {number}: {caller.status} {caller.content[:200]!r}")
    if caller.header(b"x-request-id") != [f"{tenant}-{number}".encode()] or caller.header(b"set-cookie"):
        wrong.append(f"{tenant} {number}: {caller.headers}")


async def test_nothing_of_one_tenant_reaches_another(either_transport: None, anyio_backend: str) -> None:
    wrong: list[str] = []
    requests = iter(range(REQUESTS))
    keys = {f"pk-of-{tenant}": ReplicateKey(token, tenant=tenant) for tenant, token in TOKENS.items()}
    with Upstream() as upstream:
        app = proxy(f"http://127.0.0.1:{upstream.port}/v1", key_resolver=MappingKeyResolver(keys))

        async def work() -> None:
            for number in requests:
                await ask(app, TENANTS[number * 7 % len(TENANTS)], number, wrong)

        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(work)
        await app.aclose()
    assert wrong == []
    seen = {name: count for name, count in upstream.seen.items() if count}
    connections = seen.pop("connections")
    assert seen == {"requests": REQUESTS}
    # Most of them were shared.
    assert REQUESTS / 7 < connections < REQUESTS / 2
