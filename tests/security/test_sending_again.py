"""A create is sent once, whatever becomes of it; what may be sent again is sent a few times, and not at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import anyio
import pytest

from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.refusals import told
from tests.security.rows import row
from tests.tenants import answers

pytestmark = pytest.mark.anyio

# As much as a caller and a host can ask for together.
MOST = (b"x-portkey-config", b'{"retry": {"attempts": 5, "on_status_codes": [408, 409, 429, 500, 502, 503, 504]}}')
OPTIONS = {"safe_retries": 5, "read_timeout": 0.6}
SOON = b"retry-after: 0\r\n"


def _reset(connection: Connection) -> None:
    connection.request()
    connection.reset()


def _silent(connection: Connection) -> None:
    connection.request()
    connection.wait_closed()


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 201 Created\r\ncontent-length: 10\r\n\r\n{")


def _stale(connection: Connection) -> None:
    """The first connection of two answers once, and is closed when the next request is on its way."""
    first = len(connection.upstream.connections) == 1
    while connection.request():
        if first and len(connection.upstream.requests) == 2:
            return connection.reset()
        connection.answer()
    return None


async def _create(app: object, upstream: RawUpstream, method: str = "POST") -> Caller:
    scope = http_scope(method, "/v1/predictions", [KEY, MOST, (b"idempotency-key", b"k1")])
    return await call(app, scope, b'{"version": "v"}')  # type: ignore[arg-type]


@row("2.24")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("status", [b"408 Timeout", b"429 Too Many", b"500 Error", b"502 Bad", b"503 Busy"])
async def test_no_status_has_a_create_sent_again(upstream: RawUpstream, status: bytes) -> None:
    upstream.script = answers(b"{}", status, SOON)
    caller = await _create(proxy(upstream.url, options=OPTIONS), upstream)
    assert caller.status == int(status[:3])
    assert len(upstream.requests) == 1


@row("2.24")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(("script", "status"), [(_reset, 502), (_silent, 504), (_cut, 502)])
async def test_no_failure_has_a_create_sent_again(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, script: Callable[[Connection], None], status: int
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01)
    upstream.script = script
    caller = await _create(proxy(upstream.url, options=OPTIONS), upstream)
    assert caller.status == status
    assert caller.header(b"x-should-retry") == [b"false"]
    assert len(upstream.requests) == 1


@row("2.24")
@pytest.mark.usefixtures("either_transport")
async def test_a_kept_connection_that_turns_out_stale_is_no_reason(upstream: RawUpstream) -> None:
    upstream.script = _stale
    app = proxy(upstream.url, options=OPTIONS)
    await Caller().call(app, http_scope())
    caller = await _create(app, upstream)
    assert told(caller) == (502, "upstream_failed")
    assert [received.line[:4] for received in upstream.requests] == [b"GET ", b"POST"]


@row("3.rule")
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "QUERY"])
async def test_no_method_but_the_safe_ones_is_sent_again(upstream: RawUpstream, method: str) -> None:
    upstream.script = answers(b"{}", b"503 Busy", SOON)
    await _create(proxy(upstream.url, options=OPTIONS), upstream, method)
    assert len(upstream.requests) == 1


@row("3.rule")
async def test_what_was_never_sent_may_be_sent_again(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.upstream.ready.set()
            connection.upstream.go_on.wait(5)
            connection.answer()

    async def sleep(seconds: float) -> None:
        upstream.go_on.set()

    upstream.script = script
    app = proxy(upstream.url, options={"max_connections": 1, "connection_wait": 0.2, "safe_retries": 1})
    first, second = Caller(), Caller([b'{"version": "v"}'])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        # When it has found no connection once, there will be one.
        monkeypatch.setattr(anyio, "sleep", sleep)
        await second.call(app, http_scope("POST", "/v1/predictions"))
        upstream.go_on.set()
    await app.aclose()
    assert second.status == 200
    assert [received.line[:4] for received in upstream.requests] == [b"GET ", b"POST"]


@row("2.25")
async def test_by_default_nothing_is_sent_again(upstream: RawUpstream) -> None:
    upstream.script = answers(b"{}", b"503 Busy", SOON)
    assert (await call(proxy(upstream.url), http_scope())).status == 503
    assert len(upstream.requests) == 1


@row("2.25")
@pytest.mark.parametrize("attempts", [b"6", b"1000", b"-1", b"1e9", b"true"])
async def test_no_caller_asks_for_more_than_five(upstream: RawUpstream, attempts: bytes) -> None:
    upstream.script = answers(b"{}", b"503 Busy", SOON)
    config = (b"x-portkey-config", b'{"retry": {"attempts": %b}}' % attempts)
    assert told(await call(proxy(upstream.url), http_scope(headers=[KEY, config]))) == (400, "bad_request")
    assert upstream.requests == []


@row("2.25")
async def test_retry_after_is_obeyed(upstream: RawUpstream) -> None:
    upstream.script = answers(b"{}", b"503 Busy", b"retry-after: 1\r\n")
    started = time.monotonic()
    await call(proxy(upstream.url, options={"safe_retries": 1}), http_scope())
    assert len(upstream.requests) == 2
    assert time.monotonic() - started >= 1


@row("2.25")
async def test_a_wait_of_more_than_a_minute_is_left_to_the_caller(upstream: RawUpstream) -> None:
    upstream.script = answers(b"{}", b"503 Busy", b"retry-after: 61\r\n")
    caller, app = Caller(), proxy(upstream.url, options={"safe_retries": 1})
    with anyio.move_on_after(2):
        await caller.call(app, http_scope())
    await app.aclose()
    assert (caller.status, caller.header(b"retry-after")) == (503, [b"61"])
    assert len(upstream.requests) == 1


@row("2.25")
async def test_waits_double_and_no_two_callers_wait_alike(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = answers(b"{}", b"503 Busy")
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    app = proxy(upstream.url, options={"safe_retries": 3})
    for _ in range(4):
        await call(app, http_scope())
    assert len(set(waited)) == 12
    for i, seconds in enumerate(waited):
        assert 2 ** (i % 3) / 2 <= seconds <= 2 ** (i % 3)
