from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw import (
    Forward,
    Layer,
    MappingKeyResolver,
    PermissionDenied,
    Policy,
    ProxyRequest,
    ProxyResponse,
    ReplicateKey,
    ending,
)
from replicate_proxy_mw.errors import LimitExceeded, UpstreamAborted, UpstreamFailed
from replicate_proxy_mw.exchange import Chunks, Opened
from replicate_proxy_mw.layers.in_flight import limit_in_flight
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from tests.raw_asgi import TOKEN, Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream, answer_all

pytestmark = pytest.mark.anyio

A, A_TOO, B, FREE = ((b"x-portkey-api-key", name) for name in (b"pk-a", b"pk-a-too", b"pk-b", b"pk-free"))


def limited(upstream: str, *, limit: int = 1, **more: Any) -> Any:
    policy = Policy(max_in_flight=limit)
    keys = {
        "pk-a": ReplicateKey(TOKEN, tenant="team-a", policy=policy),
        "pk-a-too": ReplicateKey(TOKEN, tenant="team-a", policy=policy),
        "pk-b": ReplicateKey(TOKEN, tenant="team-b", policy=policy),
        "pk-free": ReplicateKey(TOKEN, tenant="team-a"),
    }
    return proxy(upstream, key_resolver=MappingKeyResolver(keys), **more)


async def ask(app: Any, who: tuple[bytes, bytes], method: str = "GET", target: str = "/v1/account") -> Caller:
    return await Caller().call(app, http_scope(method, target, [who]))


def held(connection: Connection) -> None:
    """Answer a connection's first request when the test says so."""
    connection.request()
    connection.upstream.ready.set()
    connection.upstream.go_on.wait(5)
    connection.answer()
    answer_all(connection)


def within(connection: Connection) -> None:
    """Stop half-way through an answer, until the test says to go on."""
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 6\r\n\r\nabc")
    connection.upstream.ready.set()
    connection.upstream.go_on.wait(5)
    connection.send(b"def")
    answer_all(connection)


async def under_way(upstream: RawUpstream) -> None:
    assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
    upstream.ready.clear()


@pytest.mark.parametrize(
    ("script", "method", "target"),
    [(held, "POST", "/v1/predictions"), (held, "GET", "/v1/nope"), (within, "GET", "/v1/files/f/download")],
)
async def test_one_more_than_the_limit_is_refused_until_one_has_ended(
    upstream: RawUpstream, script: Callable[[Connection], None], method: str, target: str
) -> None:
    upstream.script = script
    app = limited(upstream.url, limit=2)
    first, second = Caller(), Caller()
    async with anyio.create_task_group() as tasks:
        for caller, who in ((first, A), (second, A_TOO)):
            tasks.start_soon(caller.call, app, http_scope(method, target, [who]))
            await under_way(upstream)
        for who in (A, A_TOO):
            refused = await ask(app, who)
            assert refused.status == 429
            assert refused.header(b"retry-after") == [b"1"]
            error = json.loads(refused.content)["error"]
            assert error["code"] == "limit_exceeded"
            assert error["message"] == "max_in_flight: 2 requests are under way already."
        assert len(upstream.requests) == 2
        upstream.go_on.set()
    assert first.complete
    assert second.complete
    assert (await ask(app, A)).status == 200
    await app.aclose()


async def test_every_tenant_has_its_own_limit_and_keys_without_one_have_none(upstream: RawUpstream) -> None:
    upstream.script = held
    app = limited(upstream.url)
    callers = [Caller() for _ in range(4)]
    async with anyio.create_task_group() as tasks:
        for caller, who in zip(callers, (A, B, FREE, FREE), strict=True):
            tasks.start_soon(caller.call, app, http_scope(headers=[who]))
            await under_way(upstream)
        assert [(await ask(app, who)).status for who in (A, B)] == [429, 429]
        upstream.go_on.set()
    assert [caller.status for caller in callers] == [200] * 4
    await app.aclose()


@pytest.mark.parametrize("script", [held, within])
async def test_a_caller_who_leaves_is_not_counted(upstream: RawUpstream, script: Callable[[Connection], None]) -> None:
    upstream.script = script
    app = limited(upstream.url)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", headers=[A]))
        await under_way(upstream)
        assert (await ask(app, A)).status == 429
        caller.left.set()
    upstream.script = answer_all
    upstream.go_on.set()
    assert (await ask(app, A)).status == 200
    await app.aclose()


async def test_a_host_that_cancels_is_not_counted(upstream: RawUpstream) -> None:
    upstream.script = held
    app = limited(upstream.url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Caller().call, app, http_scope("POST", headers=[A]))
        await under_way(upstream)
        tasks.cancel_scope.cancel()
    upstream.script = answer_all
    upstream.go_on.set()
    assert (await ask(app, A)).status == 200
    await app.aclose()


async def test_a_caller_s_own_limit_ends_it(upstream: RawUpstream) -> None:
    upstream.script = held
    app = limited(upstream.url)
    scope = http_scope("POST", headers=[A, (b"x-portkey-request-timeout", b"50")])
    assert (await Caller().call(app, scope)).status == 408
    upstream.script = answer_all
    upstream.go_on.set()
    assert (await ask(app, A)).status == 200
    await app.aclose()


async def test_a_caller_who_reads_slowly_is_under_way(upstream: RawUpstream) -> None:
    app = limited(upstream.url)
    reads = anyio.Event()
    caller = Caller()

    async def send(message: dict[str, Any]) -> None:
        await caller.send(message)
        if message.get("body"):
            await reads.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, http_scope(headers=[A]), caller.receive, send)
        await caller.got_chunk.wait()
        assert (await ask(app, A)).status == 429
        reads.set()
    assert (await ask(app, A)).status == 200
    await app.aclose()


# --- nothing leaks


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc")


def _raising(error: BaseException) -> Layer:
    def layer(forward: Forward) -> Forward:
        async def raising(request: ProxyRequest) -> ProxyResponse:
            await forward(request)
            raise error

        return raising

    return layer


def _closing(aclose: Callable[[], Any]) -> Layer:
    def layer(forward: Forward) -> Forward:
        async def odd(request: ProxyRequest) -> ProxyResponse:
            return replace(await forward(request), aclose=aclose)

        return odd

    return layer


async def _fails() -> None:
    raise ZeroDivisionError


async def _hangs() -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("layer", "script", "status"),
    [
        (_raising(PermissionDenied("no")), answer_all, 403),
        (_raising(ZeroDivisionError()), answer_all, 500),
        (_closing(_fails), answer_all, 200),
        (_closing(_hangs), answer_all, 200),
        (None, lambda connection: None, 502),
        (None, partial(Connection.send, data=b"nonsense\r\n\r\n"), 502),
    ],
)
async def test_what_fails_is_not_counted(
    upstream: RawUpstream, layer: Layer | None, script: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "CLOSE_TIMEOUT", 0.05)
    upstream.script = script
    app = limited(upstream.url, layers=[layer] if layer else [])
    for _ in range(3):
        assert (await ask(app, A)).status == status
    await app.aclose()


async def test_an_answer_that_is_cut_is_not_counted(upstream: RawUpstream) -> None:
    upstream.script = _cut
    app = limited(upstream.url)
    for _ in range(2):
        with pytest.raises(UpstreamAborted):
            await ask(app, A)
    await app.aclose()


async def test_what_the_server_s_send_raises_is_not_counted(upstream: RawUpstream) -> None:
    class Hosts(Exception):
        pass

    async def send(message: Any) -> None:
        raise Hosts

    app = limited(upstream.url)
    with pytest.raises(Hosts):
        await app(http_scope(headers=[A]), Caller().receive, send)
    assert (await ask(app, A)).status == 200
    await app.aclose()


def _request(tenant: str, limit: int, opened: list[Opened]) -> ProxyRequest:
    return ProxyRequest(
        method="GET",
        target="/account",
        route=match("GET", "/account"),
        headers=(),
        body=Chunks([]),
        content_length=0,
        key=ReplicateKey(TOKEN, tenant=tenant, policy=Policy(max_in_flight=limit)),
        portkey=PortkeyContext(api_key="pk"),
        scope={},
        opened=opened,
    )


OUTCOMES = ("answered", "refused", "failed", "cancelled", "never closed by its layer")


@settings(deadline=None)
@given(
    limit=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(OUTCOMES), st.booleans()), max_size=30),
)
def test_whatever_becomes_of_requests_the_limit_is_what_it_was(limit: int, steps: list[tuple[str, str, bool]]) -> None:
    anyio.run(_play, limit, steps)


async def _play(limit: int, steps: list[tuple[str, str, bool]]) -> None:
    """Each step begins a request, and ends either it at once or, in the end, all that are still open."""

    async def forward(request: ProxyRequest) -> ProxyResponse:
        outcome = outcomes[-1]
        if outcome == "refused":
            raise UpstreamFailed()
        if outcome == "failed":
            raise ZeroDivisionError
        if outcome == "cancelled":
            scope.cancel()
            await anyio.sleep_forever()
        return ProxyResponse(status=200, headers=(), body=Chunks([]))

    async def end(opened: list[Opened]) -> None:
        for one in reversed(opened):
            await one.aclose()

    counted = limit_in_flight(forward)
    outcomes: list[str] = []
    still_open: dict[str, list[list[Opened]]] = {"a": [], "b": []}
    for tenant, outcome, at_once in steps:
        outcomes.append(outcome)
        opened: list[Opened] = []
        is_full = len(still_open[tenant]) == limit
        with anyio.CancelScope() as scope:
            try:
                response = await counted(_request(tenant, limit, opened))
            except LimitExceeded:
                assert is_full
                continue
            except (UpstreamFailed, ZeroDivisionError):
                await end(opened)
                continue
            finally:
                assert not (is_full and opened)
            if outcome == "answered":
                opened.append(response)  # as the middleware does
            if at_once:
                await end(opened)
            else:
                still_open[tenant].append(opened)
        if scope.cancelled_caught:
            await end(opened)
    for tenant, responses in still_open.items():
        for opened in responses:
            await end(opened)
        outcomes.append("answered")
        again: list[Opened] = []
        for _ in range(limit):
            await counted(_request(tenant, limit, again))
        with pytest.raises(LimitExceeded):
            await counted(_request(tenant, limit, again))
