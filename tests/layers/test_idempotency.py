from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from replicate_proxy_mw import (
    Forward,
    MappingKeyResolver,
    PermissionDenied,
    Policy,
    ProxyRequest,
    ProxyResponse,
    ReplicateKey,
)
from replicate_proxy_mw.errors import GuardrailFailed, ProxyError, RequestTimeout
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.json_bodies import held
from replicate_proxy_mw.layers import idempotency
from replicate_proxy_mw.layers.idempotency import idempotency_keys
from replicate_proxy_mw.layers.results import reuse_results
from replicate_proxy_mw.sharing import SharedCall
from replicate_proxy_mw.store import keyed
from replicate_proxy_mw.store.once import MemoryOnceStore
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.testing import FakeReplicate, ManualClock
from tests.paid import BODY, OUTCOMES, A, B, C, D, Replicate, SwitchedOnce, code, create, hangs, paying, refuses, told
from tests.raw_asgi import TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry.scenarios import Recorded, of
from tests.tenants import CREATES, FORM, JSON, MINE

pytestmark = pytest.mark.anyio

K = (b"idempotency-key", b"k1")
LATER = b'{"version":"x","input":{"text":"Bob"}}'


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is waited for is waited for in short steps."""
    monkeypatch.setattr(keyed, "PAUSES", (0.0,) * 6)
    monkeypatch.setattr(idempotency, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(idempotency, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN: "acme"}, "models": [MINE]}


def once(replicate: Replicate, **options: Any) -> Any:
    return paying(transport=replicate, layers=[idempotency_keys(**options)])


def replayed(caller: Caller) -> bool:
    return caller.header(b"idempotency-replayed") == [b"true"]


async def settled() -> None:
    """All that goes on by itself has come to its end, or to something that it waits for."""
    for _ in range(100):
        await anyio.lowlevel.checkpoint()


# --- what is asked


async def test_without_the_header_every_create_is_sent() -> None:
    replicate, store = Replicate(), SwitchedOnce()
    for _ in range(2):
        assert (await create(once(replicate, store=store))).status == 201
    assert len(replicate.arrived) == 2
    assert store.calls == []


async def test_the_same_key_creates_once() -> None:
    replicate = Replicate(outcomes=["accepted"])
    app = once(replicate)
    first = await create(app, K)
    assert (first.status, replayed(first), first.header(b"ratelimit-remaining")) == (202, False, [b"7"])
    again = await create(app, K)
    assert (again.status, replayed(again), again.header(b"ratelimit-remaining")) == (202, True, [])
    assert told(again) == {"id": told(first)["id"], "status": "processing"}
    assert again.header(b"content-type") == [b"application/json"]
    assert again.header(b"content-length") == [str(len(again.content)).encode()]
    assert replicate.reads == ["/v1/predictions/p0"]
    assert [body for _, _, body in replicate.arrived] == [BODY]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"k1", b'"k1"'),
        (b" k1 \t", b"k1"),
        (rb"a\b", rb'"a\\b"'),
        (b'"a\\"b"', b'"a\\"b"'),
        (b"x" * 255, b'"' + b"x" * 255 + b'"'),
        (b'"' + b'\\"' * 255 + b'"', b'"' + b'\\"' * 255 + b'"'),
        (b"'8e03978e-40d5-43dd-bc93-6894a57f9324'", b"\"'8e03978e-40d5-43dd-bc93-6894a57f9324'\""),
    ],
)
async def test_a_key_in_quotes_and_a_bare_one_are_the_same(one: bytes, other: bytes) -> None:
    replicate = Replicate()
    app = once(replicate)
    assert (await create(app, (b"idempotency-key", one))).status == 201
    assert replayed(await create(app, (b"idempotency-key", other)))
    assert len(replicate.arrived) == 1


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b" "],
        [b'""'],
        [b"a b"],
        [b'"a b"'],
        [b'"a'],
        [b'a"b'],
        [b'"a";x=1'],
        [b'"a\\b"'],
        [b"\xe9"],
        [b"a\x7f"],
        [b"x" * 256],
        [b'"' + b"x" * 256 + b'"'],
        [b"a", b"a"],
    ],
)
async def test_a_key_that_is_none_is_refused(values: list[bytes]) -> None:
    replicate, store = Replicate(), SwitchedOnce()
    caller = await create(once(replicate, store=store), *((b"idempotency-key", value) for value in values))
    assert code(caller) == (400, "bad_request")
    assert told(caller)["detail"].startswith("Idempotency-Key: ")
    assert replicate.arrived == []
    assert store.calls == []


async def test_it_is_for_predictions_and_trainings(fake_replicate: FakeReplicate) -> None:
    app = paying(fake_replicate.url, layers=[idempotency_keys()])
    for number, (operation, one) in enumerate(CREATES.items()):
        key = (b"idempotency-key", str(number).encode())
        scope = http_scope("POST", one.target, [A, key, one.content_type])
        first, again = [await call(app, scope, one.body) for _ in "ab"]
        assert (first.status, again.status) == (201, 201)
        made = [request.operation for request in fake_replicate.requests].count(operation)
        assert made == (2 if one.content_type == FORM else 1)
        assert replayed(again) == (made == 1)
        assert (told(again)["id"] == told(first)["id"]) == (made == 1)
    for method, target in (("GET", "/v1/account"), ("POST", "/v1/models"), ("DELETE", "/v1/nothing")):
        assert not replayed(await call(app, http_scope(method, target, [A, (b"idempotency-key", b"")])))


@pytest.mark.parametrize(
    ("body", "same"),
    [
        (b' {"input": {"text": "A\\u0064a"}, "version": "x"}\n', True),
        (b'{"version":"x","input":{"text":"ada"}}', False),
        (b'{"version":"x","input":{"text":"Ada"},"webhook":"https://a.example"}', False),
        (b'{"version":"x","input":{"text":"Ada"},"input":{"text":"Ada"}}', False),
        (b'{"version":"x"', False),
    ],
)
async def test_another_body_is_refused(body: bytes, same: bool) -> None:
    replicate = Replicate()
    app = once(replicate)
    await create(app, K, body=b'{"version":"x","input":{"text":"Ada"}}')
    again = await create(app, K, body=body)
    assert replayed(again) if same else code(again) == (422, "idempotency_key_reused")
    assert len(replicate.arrived) == 1


async def test_what_is_no_json_is_the_same_byte_for_byte() -> None:
    replicate = Replicate()
    app = once(replicate)
    await create(app, K, body=b'{"a": 1')
    assert replayed(await create(app, K, body=b'{"a": 1'))
    assert code(await create(app, K, body=b'{"a":1')) == (422, "idempotency_key_reused")
    big = b'{"a":"' + b"x" * (1 << 20) + b'"}'
    await create(app, (b"idempotency-key", b"big"), body=big)
    assert replayed(await create(app, (b"idempotency-key", b"big"), body=big))
    assert code(await create(app, (b"idempotency-key", b"big"), body=big + b" ")) == (422, "idempotency_key_reused")


async def test_json_and_the_same_bytes_as_something_else_are_two_things() -> None:
    replicate = Replicate()
    app = once(replicate)
    await create(app, K, body=b'{"a":1}')
    scope = http_scope("POST", "/v1/predictions", [A, K, (b"content-type", b"text/plain")])
    assert code(await Caller([b'{"a":1}']).call(app, scope)) == (422, "idempotency_key_reused")


async def test_the_path_and_the_query_are_part_of_what_is_created() -> None:
    replicate = Replicate()
    app = once(replicate)
    await create(app, K)
    for target in ("/v1/predictions?a=b", "/v1/models/a/b/predictions", "/v1/deployments/a/b/predictions"):
        assert code(await create(app, K, target=target)) == (422, "idempotency_key_reused")
    assert len(replicate.arrived) == 1


async def test_each_tenant_and_each_token_has_keys_of_its_own() -> None:
    replicate = Replicate()
    app = once(replicate)
    ids = {told(await create(app, K, who=who))["id"] for who in (A, B, C, D)}
    assert len(ids) == len(replicate.arrived) == 4
    for who in (A, B, C, D):
        assert replayed(await create(app, K, who=who))
    assert len(replicate.arrived) == 4


@pytest.mark.parametrize("declared", [False, True])
async def test_a_body_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch, declared: bool) -> None:
    monkeypatch.setattr(idempotency, "MAX_SIZE", len(BODY))
    replicate = Replicate()
    app = once(replicate)
    length = [(b"content-length", str(len(BODY) + 1).encode())] if declared else []
    caller = await Caller([BODY, b" "]).call(app, http_scope("POST", "/v1/predictions", [A, JSON, K, *length]))
    assert code(caller) == (413, "body_too_large")
    assert replicate.arrived == []
    assert (await create(app, K)).status == 201


async def test_the_body_goes_up_as_it_came(upstream: RawUpstream) -> None:
    app = paying(upstream.url, layers=[idempotency_keys()])
    body = b' {"version" : "x",\n"input": {"text": "\\u0041da"}} '
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    await call(app, scope, body[:5], body[5:])
    assert body in upstream.requests[0].body


async def test_the_answer_is_asked_for_in_a_form_that_can_be_read(upstream: RawUpstream) -> None:
    app = paying(upstream.url, layers=[idempotency_keys()])
    scope = http_scope("POST", "/v1/predictions")
    # Without a Host no links are rewritten, for which the same is asked.
    await call(app, scope | {"headers": [A, JSON, K, (b"accept-encoding", b"zstd")]}, BODY)
    assert upstream.requests[0].header(b"accept-encoding") == [b"identity"]


# --- what an answer means


@pytest.mark.parametrize(("outcome", "is_free"), OUTCOMES.items())
async def test_a_key_can_be_used_again_where_nothing_was_made(outcome: str, is_free: bool) -> None:
    replicate = Replicate(outcomes=[outcome])
    app = once(replicate)
    first = await create(app, K)
    assert not replayed(first)
    again = await create(app, K)
    if outcome in ("made", "accepted"):
        assert (again.status, told(again)["id"]) == (first.status, told(first)["id"])
    elif is_free:
        assert (again.status, replayed(again)) == (201, False)
    else:
        assert code(again) == (409, "create_unknown")
        assert again.header(b"x-should-retry") == [b"false"]
    assert len(replicate.arrived) == (0 if outcome in ("unreachable", "overloaded") else 1) + is_free


def answering(layer: Callable[[Forward, ProxyRequest], Awaitable[ProxyResponse]]) -> Any:
    def made(forward: Forward) -> Forward:
        async def answered(request: ProxyRequest) -> ProxyResponse:
            return await layer(forward, request)

        return answered

    return made


REFUSALS = (PermissionDenied("no"), GuardrailFailed())


@pytest.mark.parametrize("error", [*REFUSALS, RequestTimeout(1), ProxyError(), ZeroDivisionError()])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("body", [BODY, b""])
async def test_what_a_layer_below_refuses(error: Exception, when: str, body: bytes) -> None:
    """Of a body it is known whether it was asked for; where there is none, only refusals say that it did not go up."""
    refusing = True

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        request, _, _ = await held(request)
        if when == "after":
            await forward(request)
        if refusing:
            raise error.anew() if isinstance(error, ProxyError) else error
        return await forward(request)

    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys(), answering(layer)])
    first = await create(app, (b"content-length", str(len(body)).encode()), K, body=body)
    assert first.status == getattr(error, "status", 500)
    refusing = False
    before = len(replicate.arrived)
    again = await create(app, (b"content-length", str(len(body)).encode()), K, body=body)
    is_free = when == "before" and (body != b"" or error in REFUSALS)
    assert (again.status == 201) == is_free
    assert len(replicate.arrived) == before + is_free


@pytest.mark.parametrize("body", [BODY, b""])
async def test_an_answer_of_a_layer_below_that_sends_nothing(body: bytes) -> None:
    is_out_of_order = True

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse.json(503, {}) if is_out_of_order else await forward(request)

    app = paying(transport=Replicate(), layers=[idempotency_keys(), answering(layer)])
    length = (b"content-length", str(len(body)).encode())
    assert (await create(app, length, K, body=body)).status == 503
    is_out_of_order = False
    # With no body it could be Replicate's.
    assert (await create(app, length, K, body=body)).status == (201 if body else 409)


@pytest.mark.parametrize("how", ["at hand", "as it comes"])
async def test_another_body_that_a_layer_has_put_in_is_a_body_that_is_sent(how: str) -> None:
    async def as_it_comes() -> AsyncIterator[bytes]:
        yield LATER

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        changed = Chunks([LATER]) if how == "at hand" else as_it_comes()
        await forward(replace(request, body=changed, content_length=len(LATER)))
        raise ZeroDivisionError

    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys(), answering(layer)])
    assert (await create(app, K)).status == 500
    assert code(await create(app, K)) == (409, "create_unknown")
    assert [body for _, _, body in replicate.arrived] == [LATER]


async def test_two_of_them_know_both_what_was_sent() -> None:
    replicate = Replicate(outcomes=["error"])
    app = paying(transport=replicate, layers=[idempotency_keys(), idempotency_keys()])
    assert (await create(app, K)).status == 500
    assert code(await create(app, K)) == (409, "create_unknown")
    assert len(replicate.arrived) == 1


@pytest.mark.parametrize("id", [b'"id":"p1",', b""])
async def test_an_answer_that_is_too_long_to_be_held(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, id: bytes
) -> None:
    monkeypatch.setattr(idempotency, "MAX_SIZE", 1000)

    def script(connection: Connection) -> None:
        while request := connection.request():
            # In one piece, so that it is too long as soon as it is there.
            connection.answer(b'{%s"a":"%s"}' % (id, b"x" * 2000 if request.line.startswith(b"POST") else b"y"))

    upstream.script = script
    monkeypatch.setattr("replicate_proxy_mw.layers.whole.MAX_SIZE", 1000)
    app = paying(upstream.url, layers=[idempotency_keys()])
    callers = [await create(app, K) for _ in "ab"]
    if id:
        assert [caller.content for caller in callers] == [b'{"id":"p1","a":"y"}'] * 2
        assert [replayed(caller) for caller in callers] == [False, True]
    else:
        assert [code(caller) for caller in callers] == [(502, "upstream_failed"), (409, "create_unknown")]
    assert [request.line[:4] for request in upstream.requests] == [b"POST"] + [b"GET "] * 2 * bool(id)
    await app.aclose()


async def test_an_answer_of_a_layer_below_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_SIZE", 40)
    long = b'{"id": "p0", "output": "' + b"x" * 40 + b'"}'

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        if request.method == "GET":
            return await forward(request)
        return ProxyResponse(status=201, headers=(JSON,), body=Chunks([long]))

    replicate = Replicate(shown={"p0": httpx.Response(200, stream=httpx.ByteStream(b"shown"))})
    app = paying(transport=replicate, layers=[idempotency_keys(), answering(layer)])
    assert (await create(app, K, body=b"{}")).content == b"shown"


async def test_a_stream_of_events_is_no_answer_to_be_shared() -> None:
    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        await forward(request)
        headers = ((b"content-type", b"text/event-stream"),)
        return ProxyResponse(status=201, headers=headers, body=Chunks([b'{"id": "p0"}']))

    app = paying(transport=Replicate(), layers=[idempotency_keys(), answering(layer)])
    assert code(await create(app, K)) == (502, "upstream_failed")
    assert code(await create(app, K)) == (409, "create_unknown")


async def test_an_answer_in_several_pieces_is_one() -> None:
    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        if request.method == "GET":
            return await forward(request)
        return ProxyResponse(status=201, headers=(JSON,), body=Chunks([b'{"input": {}, "', b'id": "p0"}']))

    replicate = Replicate(shown={"p0": httpx.Response(200, stream=httpx.ByteStream(b"shown"))})
    app = paying(transport=replicate, layers=[idempotency_keys(), answering(layer)])
    assert (await create(app, K)).content == b'{"input": {}, "id": "p0"}'
    assert (await create(app, K)).content == b"shown"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_create_that_is_cancelled_by_what_it_waits_for_is_unknown() -> None:
    is_cancelled = True

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        response = await forward(request)
        if is_cancelled:
            raise asyncio.CancelledError
        return response

    clock, replicate = ManualClock(), Replicate()
    store = MemoryOnceStore(now=clock.now)
    app = paying(transport=replicate, layers=[idempotency_keys(store=store), answering(layer)])
    assert code(await create(app, K)) == (500, "internal_error")
    is_cancelled = False
    clock.advance(180)
    assert code(await create(app, K)) == (409, "create_unknown")
    assert len(replicate.arrived) == 1


# --- what is answered again


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        (httpx.Response(404, stream=httpx.ByteStream(b"{}")), 404),
        (httpx.Response(202, stream=httpx.ByteStream(b"{}")), 202),
        (httpx.ConnectError("no"), "no answer"),
    ],
)
async def test_what_cannot_be_read_is_named_and_not_created_again(shown: Any, status: object) -> None:
    replicate = Replicate(shown={"p0": shown})
    app = once(replicate)
    await create(app, K)
    caller = await create(app, K)
    assert code(caller) == (502, "upstream_failed")
    assert f"made p0, which could not be read ({status}); nothing was created" in told(caller)["detail"]
    assert len(replicate.arrived) == 1


async def test_a_read_that_is_cut_is_no_answer(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.line.startswith(b"GET"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
                return
            connection.answer(b'{"id":"p0"}')

    upstream.script = script
    app = paying(upstream.url, layers=[idempotency_keys()])
    await create(app, K)
    caller = await create(app, K)
    assert code(caller) == (502, "upstream_failed")
    assert "made p0" in told(caller)["detail"]
    await app.aclose()


async def test_what_a_layer_below_says_of_the_read_is_told() -> None:
    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        if request.method == "GET":
            raise PermissionDenied("not to be read")
        return await forward(request)

    app = paying(transport=Replicate(), layers=[idempotency_keys(), answering(layer)])
    await create(app, K)
    assert code(await create(app, K)) == (403, "permission_denied")


async def test_a_long_prediction_is_passed_as_it_comes(upstream: RawUpstream) -> None:
    long = b'{"id":"p0","output":"%s"}' % (b"x" * (9 << 20))

    def script(connection: Connection) -> None:
        while request := connection.request():
            connection.answer(long if request.line.startswith(b"GET") else b'{"id":"p0"}')

    upstream.script = script
    app = paying(upstream.url, layers=[idempotency_keys()])
    await create(app, K)
    assert (await create(app, K)).content == long
    await app.aclose()


# --- while it is under way


async def test_whoever_comes_while_it_is_under_way_gets_the_very_same_answer() -> None:
    replicate = Replicate(outcomes=["accepted"])
    app = once(replicate)
    first, callers = Caller([BODY]), [Caller([BODY]) for _ in range(5)]
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.call, app, scope)
        await replicate.waiting.wait()
        for caller in callers:
            tasks.start_soon(caller.call, app, scope)
        assert code(await create(app, K, body=LATER)) == (422, "idempotency_key_reused")
        await settled()
        replicate.hold.set()
    assert {caller.content for caller in callers} == {first.content}
    assert {caller.status for caller in (first, *callers)} == {202}
    assert [replayed(caller) for caller in (first, *callers)] == [False] + [True] * 5
    assert len(replicate.arrived) == 1
    assert replicate.reads == []


async def test_whoever_comes_while_it_fails_gets_the_same_failure() -> None:
    replicate = Replicate(outcomes=["dropped"])
    app = once(replicate)
    callers = [Caller([BODY]) for _ in range(3)]
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(callers[0].call, app, scope)
        await replicate.waiting.wait()
        for caller in callers[1:]:
            tasks.start_soon(caller.call, app, scope)
        await settled()
        replicate.hold.set()
    assert {code(caller) for caller in callers} == {(502, "upstream_failed")}
    assert len(replicate.arrived) == 1


@pytest.mark.parametrize("how", ["leaves", "limit", "restart"])
async def test_a_caller_who_goes_does_not_end_it(how: str) -> None:
    replicate, store = Replicate(), SwitchedOnce()
    app = once(replicate, store=store)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    limit = [(b"x-portkey-request-timeout", b"50")] if how == "limit" else []
    caller = Caller([BODY])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, K, *limit]))
        await replicate.waiting.wait()
        if how != "limit":
            caller.left.set()
    assert caller.status == (408 if how == "limit" else 499)
    again = Caller([BODY])
    other = once(replicate, store=store) if how == "restart" else app
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.call, other, http_scope("POST", "/v1/predictions", [A, JSON, K]))
        await settled()
        assert again.status is None
        replicate.hold.set()
    assert (again.status, replayed(again), told(again)["id"]) == (201, True, "p0")
    assert len(replicate.arrived) == 1


async def test_another_process_waits_and_creates_if_the_first_has_made_nothing() -> None:
    replicate, store = Replicate(outcomes=["refused"]), SwitchedOnce()
    one, other = once(replicate, store=store), once(replicate, store=store)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    callers = [Caller([BODY]) for _ in "ab"]
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(callers[0].call, one, scope)
        await replicate.waiting.wait()
        tasks.start_soon(callers[1].call, other, scope)
        assert code(await create(other, K, body=LATER)) == (422, "idempotency_key_reused")
        await settled()
        replicate.hold.set()
    assert [caller.status for caller in callers] == [422, 201]
    assert [replayed(caller) for caller in callers] == [False, False]
    assert len(replicate.arrived) == 2


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_nobody_waits_for_what_counts_as_lost(where: str) -> None:
    replicate, store = Replicate(), SwitchedOnce()
    options: dict[str, Any] = {"store": store, "longest_create": 0.1}
    one = once(replicate, **options)
    other = one if where == "here" else once(replicate, **options)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    first, second = Caller([BODY]), Caller([BODY])
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.call, one, scope)
        await replicate.waiting.wait()
        tasks.start_soon(second.call, other, scope)
    assert code(first) == code(second) == code(await create(other, K)) == (409, "create_unknown")
    # It comes after all, and then it is known.
    replicate.hold.set()
    await settled()
    again = await create(other, K)
    assert (again.status, replayed(again), told(again)["id"]) == (201, True, "p0")
    assert len(replicate.arrived) == 1


async def test_an_answer_that_is_there_is_given_even_if_it_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "PAUSES", (0.01,) * 1000)
    replicate, store = Replicate(), SwitchedOnce()
    app = once(replicate, store=store, longest_create=0.1)
    store.before["end"] = refuses
    replicate.hold = anyio.Event()
    assert code(await create(app, K)) == (409, "create_unknown")
    replicate.hold.set()
    await settled()
    assert told(await create(app, K))["id"] == "p0"


async def test_nobody_waits_for_one_after_the_other_without_end() -> None:
    class Renewed(SwitchedOnce):
        """Somebody else begins whenever one looks."""

        async def begin(self, key: str, create: Any, lifetime: float, /) -> Any:
            await super().forget(key, "somebody")
            other = type(create)(mark="somebody", fingerprint=create.fingerprint, left=100.0)
            await super().begin(key, other, lifetime)
            return await super().begin(key, create, lifetime)

    replicate = Replicate()
    app = once(replicate, store=Renewed(), longest_create=0.1)
    assert code(await create(app, K)) == (409, "create_unknown")
    assert replicate.arrived == []


def at_once(call: Callable[[], Any], **options: Any) -> SharedCall[Any]:
    """As an event loop with eager tasks does it (Python 3.12): what does not wait has ended when it is made."""
    error: Exception | None = None
    came = None
    try:
        call().send(None)
    except StopIteration as ended:
        came = ended.value
    except Exception as raised:
        error = raised

    async def result() -> Any:
        if error is not None:
            raise error
        return came

    return SharedCall(result, **options)


async def test_a_call_may_end_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    is_refusing = True

    async def layer(forward: Forward, request: ProxyRequest) -> ProxyResponse:
        if is_refusing:
            raise PermissionDenied("not now")
        return await forward(request)

    app = paying(transport=Replicate(), layers=[idempotency_keys(), answering(layer)])
    with monkeypatch.context() as patch:
        patch.setattr(idempotency, "SharedCall", at_once)
        assert (await create(app, K)).status == 403
    is_refusing = False
    again = await create(app, K)
    assert (again.status, replayed(again)) == (201, False)


@pytest.mark.parametrize("how", ["leaves", "limit", "lost"])
async def test_what_its_exchange_holds_is_held_until_it_ends(how: str) -> None:
    keys = {"pk-a": ReplicateKey(TOKEN, tenant="team-a", policy=Policy(max_in_flight=1))}
    replicate, resolver = Replicate(), MappingKeyResolver(keys)
    layers = [idempotency_keys(longest_create=0.1 if how == "lost" else 180)]
    app = proxy("http://127.0.0.1:1/v1", transport=replicate, layers=layers, key_resolver=resolver)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    limit = [(b"x-portkey-request-timeout", b"50")] if how == "limit" else []
    caller = Caller([BODY])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, K, *limit]))
        await replicate.waiting.wait()
        if how == "leaves":
            caller.left.set()
    assert caller.status == {"leaves": 499, "limit": 408, "lost": 409}[how]
    for name in (b"k2", b"k3"):
        assert code(await create(app, (b"idempotency-key", name))) == (429, "limit_exceeded")
    replicate.hold.set()
    await settled()
    assert (await create(app, (b"idempotency-key", b"k2"))).status == 201
    assert len(replicate.arrived) == 2


# --- the store out of order


@pytest.mark.parametrize("how", [refuses, hangs])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_nothing_is_sent_that_could_not_be_noted(how: Any, when: str, caplog: pytest.LogCaptureFixture) -> None:
    replicate, store = Replicate(), SwitchedOnce()
    app = once(replicate, store=store, store_timeout=0.05)
    switch = store.before if when == "before" else store.after
    switch["begin"] = how
    caller = await create(app, K)
    assert code(caller) == (503, "store_failed")
    assert "nothing was sent" in told(caller)["detail"]
    assert replicate.arrived == []
    assert "hunter2" not in caplog.text
    switch.clear()
    await settled()
    assert (await create(app, K)).status == 201
    assert len(replicate.arrived) == 1


async def test_what_a_store_raises_of_ours_is_a_failure_too() -> None:
    async def denies() -> None:
        raise PermissionDenied("hunter2")

    replicate, store = Replicate(), SwitchedOnce()
    store.before["begin"] = denies
    assert code(await create(once(replicate, store=store), K)) == (503, "store_failed")


@pytest.mark.parametrize("how", [refuses, hangs])
@pytest.mark.parametrize("outcome", ["made", "refused", "error"])
async def test_an_answer_goes_out_though_it_cannot_be_noted(
    how: Any, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "PAUSES", (0.01,) * 1000)
    replicate, store = Replicate(outcomes=[outcome]), SwitchedOnce()
    app = once(replicate, store=store, store_timeout=0.05)
    store.before |= {"end": how, "forget": how}
    first = await create(app, K)
    assert first.status == {"made": 201, "refused": 422, "error": 500}[outcome]
    # Until it is written this process knows.
    again = await create(app, K)
    assert (again.status, again.content, replayed(again)) == (first.status, first.content, True)
    assert len(replicate.arrived) == 1
    written = anyio.Event()

    async def notes() -> None:
        written.set()

    store.before.clear()
    store.after |= {"end": notes, "forget": notes}
    await written.wait()
    await settled()
    last = await create(app, K)
    assert (last.status, replayed(last)) == {"made": (201, True), "refused": (201, False), "error": (409, False)}[
        outcome
    ]


async def test_what_the_store_never_takes_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    replicate, store = Replicate(), SwitchedOnce(now=clock.now)
    app = once(replicate, store=store)
    store.before["end"] = refuses
    assert (await create(app, K)).status == 201
    await settled()
    assert store.calls == ["begin", *["end"] * 7]
    assert "did not take what came of a create" in caplog.text
    clock.advance(180)
    assert code(await create(app, K)) == (409, "create_unknown")
    clock.advance(86400)
    assert (await create(app, K)).status == 201


async def test_a_caller_who_leaves_while_it_is_noted_leaves_nothing_half_done() -> None:
    replicate, store = Replicate(), SwitchedOnce()
    app = once(replicate, store=store)
    noted, go_on = anyio.Event(), anyio.Event()

    async def slow() -> None:
        noted.set()
        await go_on.wait()

    store.after["begin"] = slow
    caller = Caller([BODY])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, K]))
        await noted.wait()
        caller.left.set()
        await settled()
        go_on.set()
    await settled()
    store.after.clear()
    assert told(await create(app, K))["id"] == "p0"
    assert len(replicate.arrived) == 1


# --- options


@pytest.mark.parametrize("option", ["lifetime", "longest_create", "store_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_times_have_to_be_some(option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option}: "):
        idempotency_keys(**options)


def test_a_key_lives_at_least_as_long_as_a_create() -> None:
    with pytest.raises(ValueError, match="lifetime: "):
        idempotency_keys(lifetime=10, longest_create=11)


# --- what is told of it


async def test_the_spans_of_it(exporter: InMemorySpanExporter, tracer_provider: TracerProvider) -> None:
    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys()], tracer_provider=tracer_provider)
    callers = [Caller([BODY]) for _ in "ab"]
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(callers[0].call, app, scope)
        await replicate.waiting.wait()
        tasks.start_soon(callers[1].call, app, scope)
        await settled()
        replicate.hold.set()
    await create(app, K)
    spans = Recorded(exporter).all
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    attempts = [span for span in spans if span.kind is SpanKind.CLIENT]
    assert [span.name for span in attempts] == ["POST /v1/predictions", "GET /v1/predictions/{prediction_id}"]
    told_of = {tuple(of(span, names.OUTCOME, names.PREDICTION_ID)) for span in requests}
    assert told_of == {("forwarded", "p0"), ("answered", "p0")}
    first = next(span for span in requests if of(span, names.OUTCOME) == ["forwarded"])
    last = requests[-1]
    assert [span.parent and span.parent.span_id for span in attempts] == [
        span.context and span.context.span_id for span in (first, last)
    ]
    others = [span for span in requests if span is not first]
    assert last in others
    assert [of(span, names.COALESCED) for span in others] == [[True], [None]]
    for span in others:
        assert [link.context.span_id for link in span.links] == [first.context and first.context.span_id]


async def test_what_the_cache_below_says_is_on_the_spans_of_all_who_are_told_it(
    exporter: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    replicate = Replicate()
    layers = [idempotency_keys(), reuse_results()]
    app = paying(transport=replicate, layers=layers, tracer_provider=tracer_provider)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    callers = [Caller([BODY]) for _ in "ab"]
    simple = (b"x-portkey-config", b'{"cache": {"mode": "simple"}}')
    async with anyio.create_task_group() as tasks:
        for caller in callers:
            tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, K, simple]))
        await replicate.waiting.wait()
        await settled()
        replicate.hold.set()
    assert [caller.header(b"x-portkey-cache-status") for caller in callers] == [[b"MISS"]] * 2
    requests = [span for span in Recorded(exporter).all if span.kind is SpanKind.SERVER]
    assert [of(span, names.CACHE_STATUS) for span in requests] == [["MISS"]] * 2


async def test_waiting_for_another_is_none_of_the_proxy_s_own_time() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    replicate, store = Replicate(), MemoryOnceStore()
    one, other = (
        paying(transport=replicate, layers=[idempotency_keys(store=store)], meter_provider=provider) for _ in "ab"
    )
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Caller([BODY]).call, one, scope)
        await replicate.waiting.wait()
        for app in (one, other):
            tasks.start_soon(Caller([BODY]).call, app, scope)
        await anyio.sleep(0.5)
        replicate.hold.set()
    own, all_of_it = (_sum(reader, f"replicate_proxy.{name}.duration") for name in ("overhead", "request"))
    # Three of them have waited for as long.
    assert own < all_of_it / 3
    provider.shutdown()


def _sum(reader: InMemoryMetricReader, name: str) -> float:
    data = reader.get_metrics_data()
    assert data is not None
    [metric] = [
        one for of in data.resource_metrics for scope in of.scope_metrics for one in scope.metrics if one.name == name
    ]
    return sum(point.sum for point in metric.data.data_points if isinstance(point, HistogramDataPoint))


async def test_a_create_whose_caller_has_left_is_told(
    exporter: InMemorySpanExporter, tracer_provider: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys()], tracer_provider=tracer_provider)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    caller = Caller([BODY])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, K]))
        await replicate.waiting.wait()
        caller.left.set()
    replicate.hold.set()
    await settled()
    request, attempt = Recorded(exporter).all
    assert of(request, names.OUTCOME) == ["client_disconnected"]
    assert of(attempt, "http.response.status_code", "gen_ai.response.id") == [201, "p0"]
    assert request.context is not None
    assert attempt.parent is not None
    assert attempt.parent.span_id == request.context.span_id
    # Who asks for it later is led to where it was created.
    await Caller().call(app, http_scope("GET", "/v1/predictions/p0", [A]))
    poll = Recorded(exporter).all[-1]
    assert [link.context.span_id for link in poll.links] == [request.context.span_id]
    assert of(poll, names.TRANSITION) == [True]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


@pytest.mark.parametrize("leaves", [False, True])
async def test_the_end_that_a_create_has_seen_is_told_once(
    exporter: InMemorySpanExporter, tracer_provider: TracerProvider, leaves: bool
) -> None:
    replicate = Replicate(status="succeeded")
    app = paying(transport=replicate, layers=[idempotency_keys()], tracer_provider=tracer_provider)
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    caller, waits = Caller([BODY]), Caller([BODY])
    scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, scope)
        await replicate.waiting.wait()
        if leaves:
            caller.left.set()
            await settled()
        tasks.start_soon(waits.call, app, scope)
        await settled()
        replicate.hold.set()
    await settled()
    spans = Recorded(exporter).unchecked
    first = next(span for span in spans if of(span, names.OUTCOME)[0] in ("forwarded", "client_disconnected"))
    [run] = [span for span in spans if of(span, names.ORIGIN) != [None]]
    assert of(run, names.ORIGIN, names.OBSERVED_BY, names.TENANT, names.POLLS) == ["store", "create", "team-a", 0]
    assert run.parent is not None
    assert first.context is not None
    assert run.parent.span_id == first.context.span_id


# --- the invariant


@dataclass(frozen=True)
class Step:
    who: Any
    key: bytes | None
    body: bytes
    target: str
    outcome: str
    fault: str
    end: str


STEPS = st.lists(
    st.builds(
        Step,
        who=st.sampled_from([A, A, B, C, D]),
        key=st.sampled_from([b"k1", b"k1", b"k2", None]),
        body=st.sampled_from([BODY, BODY, LATER]),
        target=st.sampled_from(["/v1/predictions", "/v1/predictions", "/v1/models/a/b/predictions"]),
        outcome=st.sampled_from(list(OUTCOMES)),
        fault=st.sampled_from(["", "", "", "begin before", "begin after", "end before", "end after", "end for good"]),
        end=st.sampled_from(["stays", "stays", "leaves", "crash"]),
    ),
    max_size=8,
)
FIRST = {
    "made": 201,
    "accepted": 202,
    "refused": 422,
    "throttled": 429,
    "conflict": 409,
    "timeout": 408,
    "error": 500,
    "moved": 307,
    "no id": 201,
    "late": 504,
    "overloaded": 503,
}


class Play:
    """One process after the other with one store, and what is known of keys by whoever watches."""

    def __init__(self) -> None:
        self.replicate, self.clock = Replicate(), ManualClock()
        self.store = SwitchedOnce(now=self.clock.now)
        self.app = once(self.replicate, store=self.store)
        # By caller and key: what was created, its status and id; None where that is not known.
        self.known: dict[Any, tuple[Any, tuple[int, str] | None]] = {}

    def fail(self, fault: str) -> None:
        self.store.before.clear()
        self.store.after.clear()
        method, _, when = fault.partition(" ")
        switch = self.store.after if when == "after" else self.store.before
        for name in ("end", "forget") if method == "end" else (method,):

            async def fails(name: str = name) -> None:
                if when != "for good":
                    self.store.before.clear()
                    self.store.after.clear()
                raise OSError(name)

            if fault:
                switch[name] = fails

    async def step(self, step: Step) -> None:
        replicate, place = self.replicate, (step.who, step.key)
        replicate.outcomes = [step.outcome]
        replicate.hold, replicate.waiting = None, None
        self.fail(step.fault)
        arrived = len(replicate.arrived)
        known = None if step.key is None else self.known.get(place)
        headers = [] if step.key is None else [(b"idempotency-key", step.key)]
        scope = http_scope("POST", step.target, [step.who, JSON, *headers])
        is_noted = step.key is None or not step.fault.startswith("begin")
        goes_up = is_noted and known is None and step.outcome not in ("unreachable", "overloaded")
        caller = Caller([step.body])
        if step.end == "stays" or not goes_up or step.key is None:
            await caller.call(self.app, scope)
            self.check(step, caller, known, is_noted)
        else:
            replicate.hold, replicate.waiting = hold, waiting = anyio.Event(), anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caller.call, self.app, scope)
                await waiting.wait()
                caller.left.set()
            if step.end == "leaves":
                hold.set()
            else:
                self.app = once(replicate, store=self.store)
        await settled()
        assert len(replicate.arrived) == arrived + goes_up
        if step.key is None or known is not None or not is_noted:
            return
        crashed = goes_up and step.end == "crash"
        if crashed or step.fault == "end for good":
            self.clock.advance(180)
            self.known[place] = (step.body, step.target), None
        elif not OUTCOMES[step.outcome]:
            is_made = step.outcome in ("made", "accepted")
            came = (FIRST[step.outcome], f"p{len(replicate.made) - 1}") if is_made else None
            self.known[place] = (step.body, step.target), came

    def check(self, step: Step, caller: Caller, known: Any, is_noted: bool) -> None:
        if not is_noted:
            assert code(caller) == (503, "store_failed")
        elif known is None:
            assert caller.status == FIRST.get(step.outcome, 502)
            assert not replayed(caller)
        elif known[0] != (step.body, step.target):
            assert code(caller) == (422, "idempotency_key_reused")
        elif known[1] is None:
            assert code(caller) == (409, "create_unknown")
        else:
            assert (caller.status, told(caller)["id"]) == known[1]
            assert replayed(caller)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=80, deadline=None)
@given(steps=STEPS)
def test_no_create_is_paid_twice_and_none_is_kept_from_being_made(backend: str, steps: list[Step]) -> None:
    async def play() -> None:
        stage = Play()
        for step in steps:
            await stage.step(step)

    logging.getLogger("replicate_proxy_mw").setLevel(logging.CRITICAL)
    try:
        anyio.run(play, backend=backend)
    finally:
        logging.getLogger("replicate_proxy_mw").setLevel(logging.NOTSET)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=25, deadline=None)
@given(
    outcomes=st.lists(st.sampled_from(list(OUTCOMES)), max_size=6),
    callers=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=6),
)
def test_of_many_at_the_same_time_one_is_paid(
    backend: str, outcomes: list[str], callers: list[tuple[bool, bool]]
) -> None:
    """Each in one of two processes; some leave at once."""

    async def race() -> None:
        replicate, store = Replicate(outcomes=list(outcomes)), MemoryOnceStore()
        apps = [once(replicate, store=store) for _ in "ab"]
        scope = http_scope("POST", "/v1/predictions", [A, JSON, K])
        made = [Caller([BODY]) for _ in callers]
        async with anyio.create_task_group() as tasks:
            for caller, (where, _) in zip(made, callers, strict=True):
                tasks.start_soon(caller.call, apps[where], scope)
            await anyio.lowlevel.checkpoint()
            for caller, (_, leaves) in zip(made, callers, strict=True):
                if leaves:
                    caller.left.set()
        await settled()
        # After the first that may have made something, nothing goes up.
        sent = outcomes[: len(outcomes) - len(replicate.outcomes)]
        assert all(OUTCOMES[outcome] for outcome in sent[:-1])
        assert len(replicate.made) <= 1
        ids = {told(caller).get("id") for caller in made if caller.status in (201, 202)}
        assert ids <= {*replicate.made, None}

    anyio.run(race, backend=backend)
