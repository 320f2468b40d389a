"""Nothing is decoded without bound and nothing is piled up, however large, long or dense a body is."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider

from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.refusals import told
from tests.security.rows import row
from tests.tenants import JSON, answers

pytestmark = pytest.mark.anyio

MIB = 1 << 20
ENCODED = b"content-encoding: gzip\r\n"


@lru_cache
def _bomb() -> bytes:
    return gzip.compress(b'{"id": "p1", "results": "' + bytes(64 * MIB) + b'"}', compresslevel=1)


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Within it, this process takes no more than so many bytes of memory at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@row("2.21")
@pytest.mark.usefixtures("either_transport")
async def test_an_encoded_answer_is_not_decoded(upstream: RawUpstream) -> None:
    upstream.script = answers(_bomb(), headers=ENCODED)
    with peak_below(8 * MIB):
        caller = await call(proxy(upstream.url), http_scope())
    assert caller.content == _bomb()
    assert caller.header(b"content-encoding") == [b"gzip"]


@row("2.21")
@pytest.mark.parametrize("target", ["/v1/predictions", "/v1/predictions/p1"])
async def test_an_answer_that_is_looked_at_is_decoded_up_to_a_bound(
    upstream: RawUpstream, tracer_provider: TracerProvider, target: str
) -> None:
    upstream.script = answers(_bomb(), headers=ENCODED)
    with peak_below(40 * MIB):
        caller = await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope(target=target))
    assert caller.content == _bomb()


@row("2.21")
async def test_an_encoded_request_is_not_decoded(upstream: RawUpstream) -> None:
    headers = [KEY, JSON, (b"content-encoding", b"gzip")]
    with peak_below(8 * MIB):
        await call(proxy(upstream.url), http_scope("POST", "/v1/predictions", headers), _bomb())
    assert upstream.requests[0].body.count(_bomb()[-64:]) == 1


@row("2.23")
@pytest.mark.usefixtures("either_transport")
async def test_an_upload_waits_for_an_upstream_that_does_not_read(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.upstream.go_on.wait(5)
        connection.wait_closed()

    upstream.script = script
    caller = Caller([bytes(1 << 16)] * 1024)
    app = proxy(upstream.url, options={"write_timeout": 0.3})
    with anyio.move_on_after(3):
        await caller.call(app, http_scope("POST"))
    await app.aclose()
    # Sockets hold a few MiB, the proxy two pieces.
    assert caller.received < 512
    assert told(caller) == (504, "upstream_timeout")


@row("2.23")
@pytest.mark.usefixtures("either_transport")
async def test_an_answer_waits_for_a_caller_who_does_not_read(upstream: RawUpstream) -> None:
    sent: list[int] = []

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.socket.settimeout(0.3)
        try:
            for _ in range(1024):
                connection.socket.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                sent.append(1 << 16)
        except OSError:
            pass
        connection.upstream.ready.set()

    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller()

    async def send(message: Any) -> None:
        if message.get("body"):
            await anyio.sleep_forever()

    with anyio.move_on_after(5) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, http_scope(), caller.receive, send)
            await anyio.to_thread.run_sync(upstream.ready.wait, 4)
            caller.left.set()
    assert not scope.cancelled_caught
    assert sum(sent) < 16 * MIB
    await app.aclose()


@row("2.23")
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"11")]])
async def test_a_body_may_be_so_long(upstream: RawUpstream, headers: list[tuple[bytes, bytes]]) -> None:
    app = proxy(upstream.url, options={"max_body_size": 10})
    caller = await call(app, http_scope("POST", headers=[KEY, *headers]), b"12345", b"678901")
    assert told(caller) == (413, "body_too_large")
    # What has gone up of it is never a whole request.
    assert upstream.requests == []
