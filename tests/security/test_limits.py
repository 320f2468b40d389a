"""Nobody holds a connection, or a place, for longer than the host has said."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from replicate_proxy_mw import MappingKeyResolver, Policy, ReplicateKey
from replicate_proxy_mw.errors import UpstreamAborted
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream, answer_all
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = pytest.mark.anyio

# Longer than what a test waits for, shorter than what is waited for without the limit.
SOON = 3.0


def _silent(connection: Connection) -> None:
    connection.request()
    connection.upstream.ready.set()
    connection.wait_closed()


def _trickled_head(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\n")
    while not connection.upstream.go_on.wait(0.05):
        connection.send(b"x: y\r\n")


def _interim(connection: Connection) -> None:
    connection.request()
    for _ in range(8):
        connection.upstream.go_on.wait(0.15)
        connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    connection.answer()


def _trickled_body(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(40):
        connection.upstream.go_on.wait(0.1)
        connection.send(b"1\r\na\r\n")


async def _within(app: Any, caller: Caller, scope: dict[str, Any]) -> bool:
    """Whether the exchange ends soon; closes the proxy's connections."""
    with anyio.move_on_after(SOON) as limit:
        await caller.call(app, scope)
    await app.aclose()
    return not limit.cancelled_caught


@row("2.22")
@pytest.mark.parametrize("sent", [[b"", b""], [b"abc", b"def"]])
async def test_a_caller_s_body_keeps_coming_or_is_given_up(upstream: RawUpstream, sent: list[bytes]) -> None:
    caller = Caller(list(sent), hold_upload=anyio.Event())
    app = proxy(upstream.url, options={"body_timeout": 0.2})
    assert await _within(app, caller, http_scope("POST"))
    assert told(caller) == (408, "body_timeout")
    assert upstream.requests == []


@row("2.22")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("script", [_silent, _trickled_head, _interim])
async def test_a_head_is_whole_in_time(upstream: RawUpstream, script: Any) -> None:
    upstream.script = script
    caller = Caller()
    assert await _within(proxy(upstream.url, options={"read_timeout": 0.3}), caller, http_scope())
    assert told(caller) == (504, "upstream_timeout")


@row("2.22")
@pytest.mark.parametrize(("script", "status"), [(_silent, 504), (_trickled_body, 200)])
async def test_a_whole_request_has_its_time_where_the_host_says_so(
    upstream: RawUpstream, script: Any, status: int
) -> None:
    upstream.script = script
    caller = Caller()
    app = proxy(upstream.url, options={"total_timeout": 0.8})
    cut: BaseException | None = None
    try:
        assert await _within(app, caller, http_scope())
    except UpstreamAborted as error:
        cut = error
        await app.aclose()
    assert caller.status == status
    assert caller.complete == (cut is None) == (status == 504)


@row("2.22")
async def test_there_are_so_many_requests_at_a_time(upstream: RawUpstream) -> None:
    upstream.script = _silent
    resolved: list[object] = []

    async def resolver(request: object) -> str:
        resolved.append(request)
        return TOKEN

    app = proxy(upstream.url, options={"max_in_flight": 1}, key_resolver=resolver)
    held, refused = Caller(), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(held.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        with anyio.move_on_after(1):
            await refused.call(app, http_scope())
        held.left.set()
    assert told(refused) == (503, "overloaded")
    assert refused.header(b"retry-after") == [b"1"]
    assert len(resolved) == 1
    # The place of the one who has left is free again.
    upstream.script = answer_all
    assert (await call(app, http_scope())).status == 200


@row("2.22")
async def test_a_tenant_has_so_many_at_a_time(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        (_silent if len(connection.upstream.connections) == 1 else answer_all)(connection)

    upstream.script = script
    keys = {
        f"pk-team-{name}": ReplicateKey(TOKEN, tenant=f"team-{name}", policy=Policy(max_in_flight=1)) for name in "ab"
    }
    app = proxy(upstream.url, key_resolver=MappingKeyResolver(keys))
    held, refused, other = Caller(), Caller(), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(held.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        await refused.call(app, http_scope())
        await other.call(app, http_scope(headers=[(KEY[0], b"pk-team-b")]))
        held.left.set()
    assert told(refused) == (429, "limit_exceeded")
    assert refused.header(b"retry-after") == [b"1"]
    assert other.status == 200
    await app.aclose()
