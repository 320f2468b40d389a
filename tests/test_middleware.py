from __future__ import annotations

import contextvars
import json
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import (
    Forward,
    KeyRequest,
    Layer,
    MemoryPredictionStore,
    PermissionDenied,
    ProxyRequest,
    ProxyResponse,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
    WebhookEvent,
    ending,
)
from replicate_proxy_mw.errors import AnswerTimeout, LimitExceeded, UpstreamAborted
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.testing import FakeReplicate, serve
from replicate_proxy_mw.testing.webhooks import sign
from tests.raw_asgi import KEY, TOKEN, Arriving, Caller, call, host, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream, answer_all
from tests.tenants import HELLO_WORLD, Switched
from tests.webhooks import Host

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]


def _error(caller: Caller) -> dict[str, Any]:
    assert caller.header(b"content-type") == [b"application/json"]
    assert caller.complete
    content: dict[str, Any] = json.loads(caller.content)
    return content


# --- whose request it is


@pytest.mark.parametrize(
    "target", ["/", "/v1beta", "/v1evil/x", "/V1/x", "/api/v1/x", "/v1%2Fx", "/%76%31/x", "//v1/x"]
)
async def test_what_is_not_below_the_prefix_is_the_host_s(upstream: RawUpstream, target: str) -> None:
    caller = await call(proxy(upstream.url), http_scope(target=target))
    assert caller.content == b"host"
    assert not upstream.requests


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1", b"/v1"),
        ("/v1/", b"/v1/"),
        ("/v1?a=b", b"/v1?a=b"),
        ("/v1//nope", b"/v1//nope"),
        ("/v1/models/a%2Fb?foo=a%20b&foo=c", b"/v1/models/a%2Fb?foo=a%20b&foo=c"),
    ],
)
async def test_what_is_below_goes_to_replicate_as_it_came(upstream: RawUpstream, target: str, sent: bytes) -> None:
    assert (await call(proxy(upstream.url), http_scope(target=target))).content == b"{}"
    assert upstream.requests[0].line == b"GET " + sent + b" HTTP/1.1"


async def test_excluded_paths_stay_the_host_s(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, options={"exclude": ["/v1/own"]})
    for target, whose in (("/v1/own", b"host"), ("/v1/own/x", b"host"), ("/v1/owner", b"{}")):
        assert (await call(app, http_scope(target=target))).content == whose


@pytest.mark.parametrize(
    ("target", "root_path", "ours"),
    [
        ("/api/v1/x", "/api", True),
        ("/v1/x", "/api", True),
        ("/v1/x", None, True),
        ("/api/v1beta", "/api", False),
        ("/api/v1/x", "/ap", False),
    ],
)
async def test_below_a_root_path(upstream: RawUpstream, target: str, root_path: str | None, ours: bool) -> None:
    caller = await call(proxy(upstream.url), http_scope(target=target, root_path=root_path))
    assert caller.content == (b"{}" if ours else b"host")


@pytest.mark.parametrize(("app_root_path", "ours"), [("/api", True), ("", False), (None, False)])
async def test_a_mount_below_a_root_that_the_server_took_off(
    upstream: RawUpstream, app_root_path: str | None, ours: bool
) -> None:
    scope = http_scope(target="/team/v1/x", root_path="/api/team", app_root_path=app_root_path)
    assert (await call(proxy(upstream.url), scope)).content == (b"{}" if ours else b"host")


async def test_a_prefix_that_is_percent_encoded(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, options={"prefix": "/a%20b"})
    assert (await call(app, http_scope(target="/a%20b/x"))).content == b"{}"
    assert (await call(app, http_scope(target="/a%20bc"))).content == b"host"


async def test_another_prefix(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, options={"prefix": "/replicate/v1"})
    assert (await call(app, http_scope(target="/v1/x"))).content == b"host"
    assert (await call(app, http_scope(target="/replicate/v1/x"))).content == b"{}"
    assert upstream.requests[0].line == b"GET /v1/x HTTP/1.1"


async def test_a_mount_with_no_prefix_of_its_own(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, options={"prefix": ""})
    await call(app, http_scope(target="/v1/x", root_path="/v1"))
    assert upstream.requests[0].line == b"GET /v1/x HTTP/1.1"


async def test_websockets_are_the_host_s() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send))

    caller = Caller()
    await proxy("http://127.0.0.1:1", app=app)({"type": "websocket", "path": "/v1/x"}, caller.receive, caller.send)
    assert seen == [("websocket", caller.receive, caller.send)]


async def test_lifespan_is_the_host_s_and_closes_what_was_opened(upstream: RawUpstream) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def receive() -> Any:
        sent.append(len(upstream.closed_at))
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer()
        connection.wait_closed()

    upstream.script = script
    middleware = proxy(upstream.url, app=app)
    caller = Caller()
    await caller.call(middleware, http_scope())
    await middleware({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", 0, "lifespan.shutdown.complete"]
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    await middleware.aclose()


async def test_a_host_that_asks_for_its_lifespan_again_and_again_gets_its_end(upstream: RawUpstream) -> None:
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not told:
            with anyio.move_on_after(0.05):
                told.append((await receive())["type"])

    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        if not messages:
            await anyio.sleep_forever()
        return messages.pop()

    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    middleware, caller = proxy(upstream.url, app=app), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, middleware, http_scope())
        while not upstream.requests:  # noqa: ASYNC110 - of another thread
            await anyio.sleep(0.01)
        tasks.start_soon(middleware, {"type": "lifespan"}, receive, None)
        await anyio.sleep(0.2)
        assert not told
        caller.left.set()
        await middleware.ended()
    assert told == ["lifespan.shutdown"]
    await middleware.aclose()


@pytest.mark.parametrize("limit", [10.0, 0.05])
async def test_the_host_s_lifespan_ends_when_all_requests_have(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr("replicate_proxy_mw.ending.AFTERWARDS_TIMEOUT", limit)
    told: list[str] = []
    over = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append((await receive())["type"])
        over.set()

    async def receive() -> Any:
        return {"type": "lifespan.shutdown"}

    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    middleware, caller = proxy(upstream.url, app=app), Caller()
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            await caller.call(middleware, http_scope())
            told.append("request")

        tasks.start_soon(ask)
        while not upstream.requests:  # noqa: ASYNC110 - of another thread
            await anyio.sleep(0.01)
        tasks.start_soon(middleware, {"type": "lifespan"}, receive, None)
        if limit == 10:
            await anyio.sleep(0.05)
            assert not told
        else:
            await over.wait()
        caller.left.set()
        await over.wait()
    assert sorted(told) == ["lifespan.shutdown", "request"]
    assert told[0] == ("request" if limit == 10 else "lifespan.shutdown")
    await middleware.aclose()


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1predictions?a=b", b"/v1/predictions?a=b"),
        ("/v1predictions/p1/cancel", b"/v1/predictions/p1/cancel"),
        ("/v1//predictions", b"/v1/predictions"),
    ],
)
async def test_what_node_s_sdks_make_of_a_path_is_repaired(upstream: RawUpstream, target: str, sent: bytes) -> None:
    assert (await call(proxy(upstream.url), http_scope("POST", target))).status == 200
    assert upstream.requests[0].line == b"POST " + sent + b" HTTP/1.1"


@pytest.mark.parametrize("target", ["/v1/predictions", "/v1predictions", "/v1//predictions", "/v1/%70redictions"])
async def test_no_repair_takes_from_the_host_what_it_keeps(upstream: RawUpstream, target: str) -> None:
    app = proxy(upstream.url, options={"exclude": ["/v1/predictions"]})
    assert (await call(app, http_scope("POST", target))).content == b"host"


@pytest.mark.parametrize("target", ["/v1predictions", "/v1[object%20Object]"])
async def test_without_portkey_s_headers_such_paths_are_the_host_s(upstream: RawUpstream, target: str) -> None:
    scope = http_scope("POST", target, [(b"authorization", b"Bearer pk-team-a")])
    assert (await call(proxy(upstream.url), scope)).content == b"host"


async def test_a_call_whose_content_is_lost_is_told_the_right_one(upstream: RawUpstream) -> None:
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1[object%20Object]"))
    assert (caller.status, _error(caller)["message"]) == (
        400,
        'This SDK takes path and body apart: post("/predictions", {...}).',
    )


# --- who may


async def test_the_key_of_the_caller_becomes_the_token(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)
    for headers in ([KEY], [(b"authorization", b"Bearer pk-team-a")], [(b"authorization", b"Token pk-team-a")]):
        await call(app, http_scope(headers=headers))
    await call(app, http_scope(headers=[KEY, (b"authorization", b"Bearer sk-somebody-else")]))
    for received in upstream.requests:
        assert received.header(b"authorization") == [b"Bearer " + TOKEN.encode()]
        assert b"pk-team-a" not in received.head
        assert b"somebody" not in received.head


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "key_missing"),
        ([(b"x-portkey-api-key", b"")], "key_missing"),
        ([(b"authorization", b"Basic cGs=")], "key_missing"),
        ([(b"x-portkey-api-key", b"pk-team-")], "key_unknown"),
        ([(b"authorization", b"Bearer " + TOKEN.encode())], "key_unknown"),
    ],
)
async def test_without_a_known_key_nothing_is_read_and_nothing_sent(
    upstream: RawUpstream, headers: list[tuple[bytes, bytes]], code: str
) -> None:
    caller = await call(proxy(upstream.url), http_scope("POST", headers=headers), b"x", b"y")
    assert caller.status == 401
    assert _error(caller)["error"]["code"] == code
    assert caller.header(b"www-authenticate") == [b"Bearer"]
    assert caller.received == 0
    assert not upstream.connections


async def test_what_a_resolver_is_told(upstream: RawUpstream) -> None:
    asked: list[KeyRequest] = []

    async def resolver(request: KeyRequest) -> str:
        asked.append(request)
        return TOKEN

    headers = [
        KEY,
        (b"x-portkey-provider", b"@team-account"),
        (b"x-portkey-virtual-key", b"vk"),
        (b"x-portkey-config", b"pc-1"),
        (b"x-portkey-metadata", b'{"_user": "u1"}'),
    ]
    scope = http_scope("POST", "/v1/predictions?a=b", headers)
    await call(proxy(upstream.url, key_resolver=resolver), scope)
    assert asked == [
        KeyRequest(
            api_key="pk-team-a",
            provider="@team-account",
            virtual_key="vk",
            config="pc-1",
            metadata={"_user": "u1"},
            operation="predictions.create",
            method="POST",
            path="/predictions",
            client="192.0.2.1",
            scope=scope,
        )
    ]
    await call(proxy(upstream.url, key_resolver=resolver), http_scope(client=None))
    assert (asked[1].client, asked[1].metadata, asked[1].operation) == (None, {}, None)


async def test_a_reason_reaches_the_caller(upstream: RawUpstream) -> None:
    async def resolver(request: KeyRequest) -> str:
        raise PermissionDenied("team-a has left the building")

    caller = await call(proxy(upstream.url, key_resolver=resolver), http_scope())
    assert (caller.status, _error(caller)["message"]) == (403, "team-a has left the building")


async def test_a_resolver_that_fails(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    async def resolver(request: KeyRequest) -> str:
        raise ConnectionError("redis://:hunter2@cache")

    caller = await call(proxy(upstream.url, key_resolver=resolver), http_scope("POST"))
    assert (caller.status, _error(caller)["error"]["code"]) == (503, "resolver_failed")
    assert caller.header(b"retry-after") == [b"1"]
    assert "hunter2" not in caplog.text + caller.content.decode()
    assert not upstream.connections


# --- what is refused


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        (http_scope("TRACE"), 405),
        (http_scope("CONNECT"), 405),
        (http_scope(target="/v1/../x"), 400),
        (http_scope(target="/v1/%2e%2e/x"), 400),
        (http_scope(headers=[KEY, KEY]), 400),
        (http_scope(headers=[KEY, (b"content-length", b"1"), (b"content-length", b"2")]), 400),
        (http_scope(headers=[KEY, (b"content-length", b"many")]), 400),
        (http_scope(headers=[KEY, (b"x_portkey_api_key", b"pk-team-b")]), 400),
        (http_scope(headers=[KEY, (b"accept", b"a\r\nx: y")]), 400),
    ],
)
async def test_odd_requests_are_refused(upstream: RawUpstream, scope: dict[str, Any], status: int) -> None:
    caller = await call(proxy(upstream.url), scope)
    assert caller.status == status
    assert _error(caller)["status"] == status
    assert not upstream.connections


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "FOO"])
async def test_every_other_method_passes(upstream: RawUpstream, method: str) -> None:
    caller = await call(proxy(upstream.url), http_scope(method))
    assert caller.status == 200
    assert upstream.requests[0].line.startswith(method.encode() + b" /v1/x ")


# --- what goes through


async def test_a_body_with_its_length(upstream: RawUpstream) -> None:
    scope = http_scope("POST", headers=[KEY, (b"content-length", b"6"), (b"content-type", b"a/b")])
    await call(proxy(upstream.url), scope, b"abc", b"def")
    [received] = upstream.requests
    assert received.body == b"abcdef"
    assert received.header(b"content-length") == [b"6"]
    assert received.header(b"transfer-encoding") == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_bodies_that_have_no_meaning_are_dropped(upstream: RawUpstream, method: str) -> None:
    headers = [KEY, (b"content-length", b"2"), (b"content-type", b"application/json"), (b"accept", b"*/*")]
    app = proxy(upstream.url)
    assert (await call(app, http_scope(method, headers=headers), b"{}")).status == 200
    assert (await call(app, http_scope(method, headers=[KEY, (b"accept", b"*/*")]), *[b"x"] * 9)).status == 200
    for received in upstream.requests:
        assert [name for name, _ in received.headers] == [b"host", b"via", b"accept", b"authorization"]


async def test_a_layer_sees_that_a_get_has_no_body(upstream: RawUpstream) -> None:
    def layer(forward: Forward) -> Forward:
        async def reading(request: ProxyRequest) -> ProxyResponse:
            body = b"".join([chunk async for chunk in request.body])
            return ProxyResponse.json(200, {"size": len(body)})

        return reading

    caller = await call(proxy(upstream.url, layers=[layer]), http_scope(), b"a", b"b")
    assert caller.content == b'{"size":0}'


async def test_the_documented_call_of_portkey_s_sdk_is_unwrapped(upstream: RawUpstream) -> None:
    scope = http_scope("POST", "/v1/predictions", [KEY, (b"content-type", b"application/json")])
    body = b'{"data": {"version": "v", "input": {"n": 1.0}}}'
    await call(proxy(upstream.url), scope, body)
    await call(proxy(upstream.url, options={"unwrap_data": False}), scope, body)
    unwrapped, wrapped = upstream.requests
    assert (unwrapped.body, unwrapped.header(b"content-length")) == (b'{"version": "v", "input": {"n": 1.0}}', [b"37"])
    assert wrapped.body == body


async def test_a_body_that_no_header_announces(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)
    await call(app, http_scope("POST"), b"abc")
    await call(app, http_scope("POST"), b"abc", b"def")
    whole, chunked = upstream.requests
    assert (whole.body, whole.header(b"content-length")) == (b"abc", [b"3"])
    assert chunked.header(b"transfer-encoding") == [b"chunked"]
    assert chunked.body == b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"


@pytest.mark.parametrize(("length", "body"), [(b"2", [b"abc"]), (b"4", [b"abc"]), (b"4", [b"ab", b"c"])])
async def test_a_body_that_does_not_have_its_length(upstream: RawUpstream, length: bytes, body: list[bytes]) -> None:
    def script(connection: Connection) -> None:
        if connection.head():
            connection.wait_closed()

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope("POST", headers=[KEY, (b"content-length", length)]), *body)
    assert (caller.status, _error(caller)["error"]["code"]) == (400, "bad_request")
    assert not upstream.requests


async def test_what_clients_find_in_an_answer(upstream: RawUpstream) -> None:
    headers = [KEY, (b"x-portkey-trace-id", b"order-42")]
    caller = await call(proxy(upstream.url), http_scope(headers=headers))
    assert [pair for pair in caller.headers if pair[0].startswith(b"x-portkey-")] == [
        (b"x-portkey-trace-id", b"order-42"),
        (b"x-portkey-provider", b"replicate"),
        (b"x-portkey-last-used-option-index", b"config"),
        (b"x-portkey-cache-status", b"DISABLED"),
        (b"x-portkey-retry-attempt-count", b"0"),
    ]
    [trace_id] = (await call(proxy(upstream.url), http_scope())).header(b"x-portkey-trace-id")
    assert len(trace_id) == 32


async def test_an_encoded_answer_stays_as_it_is(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(b"\x1f\x8bnot really gzip", headers=b"content-encoding: gzip\r\n")

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope())
    assert caller.content == b"\x1f\x8bnot really gzip"
    assert caller.header(b"content-encoding") == [b"gzip"]


@pytest.mark.parametrize(
    ("method", "answer", "status", "length"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", 200, [b"1000"]),
        ("DELETE", b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", 204, []),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 1000\r\n\r\n", 304, []),
    ],
)
async def test_answers_without_a_body(
    upstream: RawUpstream, method: str, answer: bytes, status: int, length: list[bytes]
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(answer)

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope(method))
    assert (caller.status, caller.content, caller.header(b"content-length")) == (status, b"", length)


async def test_a_redirect_is_relayed(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(status=b"302 Found", headers=b"location: http://evil.test/\r\n")

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope())
    assert (caller.status, caller.header(b"location")) == (302, [b"http://evil.test/"])
    assert len(upstream.requests) == 1


async def test_chunks_go_up_as_they_arrive(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        while b"abc" not in connection.buffer:
            connection._more()
        connection.upstream.ready.set()
        while b"0\r\n\r\n" not in connection.buffer:
            connection._more()
        connection.answer()

    upstream.script = script
    caller = Caller([b"abc", b"def"], hold_upload=anyio.Event())
    app = proxy(upstream.url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST"))
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        assert caller.hold_upload is not None
        caller.hold_upload.set()
    assert caller.complete
    await app.aclose()


async def test_an_upload_waits_for_an_upstream_that_reads_slowly(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.upstream.go_on.wait(5)
        connection.wait_closed()

    upstream.script = script
    caller = Caller([bytes(1 << 16)] * 1024)
    app = proxy(upstream.url, options={"write_timeout": 0.5})
    await caller.call(app, http_scope("POST"))
    assert caller.status == 504
    assert caller.received < 512
    await app.aclose()


async def test_an_answer_waits_for_a_caller_who_reads_slowly(upstream: RawUpstream) -> None:
    sent = []

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.socket.settimeout(0.5)
        try:
            for _ in range(1024):
                connection.socket.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                sent.append(1 << 16)
        except TimeoutError:
            connection.upstream.ready.set()

    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller()
    slow = anyio.Event()

    async def send(message: Any) -> None:
        if message.get("body"):
            await slow.wait()

    with anyio.move_on_after(5) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, http_scope(), caller.receive, send)
            await anyio.to_thread.run_sync(upstream.ready.wait, 4)
            caller.left.set()
    assert not scope.cancelled_caught
    assert sum(sent) < 16 << 20
    await app.aclose()


# --- what fails


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")


async def test_a_cut_answer_leaves_as_an_exception(upstream: RawUpstream) -> None:
    upstream.script = _cut
    app = proxy(upstream.url)
    caller = Caller()
    with pytest.raises(UpstreamAborted):
        await caller.call(app, http_scope())
    assert (caller.content, caller.complete) == (b"abc", False)
    await app.aclose()


async def test_a_create_that_fails_is_sent_once(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.reset()

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope("POST", headers=[KEY, (b"x-portkey-trace-id", b"order-42")]))
    assert (caller.status, _error(caller)["error"]["code"]) == (502, "upstream_failed")
    assert caller.header(b"x-portkey-trace-id") == [b"order-42"]
    assert caller.header(b"x-should-retry") == [b"false"]
    assert len(upstream.requests) == 1


async def test_what_the_server_s_send_raises_after_the_start_is_the_host_s(upstream: RawUpstream) -> None:
    class Hosts(Exception):
        pass

    async def send(message: Any) -> None:
        raise Hosts

    app = proxy(upstream.url)
    with pytest.raises(Hosts):
        await app(http_scope(), Caller().receive, send)
    await app.aclose()


async def test_what_the_server_s_receive_raises_is_the_host_s(upstream: RawUpstream) -> None:
    class TooLarge(Exception):
        pass

    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        raise TooLarge

    app = proxy(upstream.url)
    with pytest.raises(TooLarge):
        await app(http_scope("POST"), receive, Caller().send)
    await app.aclose()


# --- what takes too long, is too long, or is too much


def _reads_in_vain(connection: Connection) -> None:
    """Reads the request, which is to stay incomplete, until the proxy closes."""
    connection.buffer = connection.head() + b"\r\n\r\n" + connection.buffer
    connection.upstream.ready.set()
    if connection.request() is None:
        connection.upstream.closed.set()


async def test_a_body_that_never_begins_is_not_waited_for(upstream: RawUpstream) -> None:
    async def receive() -> Any:
        await anyio.sleep_forever()

    caller = Caller()
    app = proxy(upstream.url, options={"body_timeout": 0.05})
    await app(http_scope("POST"), receive, caller.send)
    assert (caller.status, _error(caller)["type"]) == (408, "body_timeout")
    assert not upstream.connections


@pytest.mark.parametrize("length", [(), ((b"content-length", b"6"),)])
async def test_an_upload_that_stops_never_becomes_whole(upstream: RawUpstream, length: Any) -> None:
    upstream.script = _reads_in_vain
    app = proxy(upstream.url, options={"body_timeout": 0.2})
    caller = Caller([b"abc", b"def"], hold_upload=anyio.Event())
    await caller.call(app, http_scope("POST", headers=[KEY, *length]))
    assert (caller.status, _error(caller)["type"]) == (408, "body_timeout")
    assert caller.header(b"x-should-retry") == [b"false"]
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert not upstream.requests
    await app.aclose()


async def test_a_body_that_is_not_read_may_stop(upstream: RawUpstream) -> None:
    """Upstream reads late: that is not the caller's fault."""

    def script(connection: Connection) -> None:
        connection.head()
        upstream.go_on.wait(0.8)
        left = size - len(connection.buffer)
        while left:
            left -= len(connection.socket.recv(1 << 20))
        connection.answer()

    size = 256 << 16
    upstream.script = script
    app = proxy(upstream.url, options={"body_timeout": 0.3})
    scope = http_scope("POST", headers=[KEY, (b"content-length", b"%d" % size)])
    caller = await call(app, scope, *[bytes(1 << 16)] * 256)
    assert caller.status == 200


async def test_a_body_that_is_said_to_be_too_large_is_not_read(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, options={"max_body_size": 5})
    caller = await call(app, http_scope("POST", headers=[KEY, (b"content-length", b"6")]), b"abcdef")
    assert (caller.status, _error(caller)["type"], caller.received) == (413, "body_too_large", 0)
    stranger = await call(app, http_scope("POST", headers=[(b"content-length", b"6")]), b"abcdef")
    assert (stranger.status, stranger.received) == (401, 0)
    assert not upstream.connections
    caller = await call(app, http_scope("POST", headers=[KEY, (b"content-length", b"5")]), b"abcde")
    assert (caller.status, upstream.requests[0].body) == (200, b"abcde")


async def test_a_body_that_turns_out_too_large_never_becomes_whole(upstream: RawUpstream) -> None:
    upstream.script = _reads_in_vain
    app = proxy(upstream.url, options={"max_body_size": 5})
    assert (await call(app, http_scope("POST"), b"abcdef")).status == 413
    assert not upstream.connections
    caller = Caller([b"abc", b"de", b"f"], hold_upload=anyio.Event())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST"))
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        assert caller.hold_upload is not None
        caller.hold_upload.set()
    assert (caller.status, _error(caller)["type"]) == (413, "body_too_large")
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert not upstream.requests
    await app.aclose()


async def test_a_head_that_trickles_is_no_answer(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        for _ in range(8):
            connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            upstream.go_on.wait(0.2)
        connection.answer()

    upstream.script = script
    caller = await call(proxy(upstream.url, options={"read_timeout": 0.5}), http_scope("POST"))
    assert (caller.status, _error(caller)["type"]) == (504, "upstream_timeout")
    assert len(upstream.requests) == 1


async def _slow_resolver(request: KeyRequest) -> str:
    await anyio.sleep(10)
    return TOKEN


async def _never() -> Any:
    await anyio.sleep_forever()


@pytest.mark.parametrize("at", ["resolver", "body", "rest of the body", "answer"])
async def test_no_request_takes_longer_than_it_may(upstream: RawUpstream, at: str) -> None:
    upstream.script = _reads_in_vain if at == "rest of the body" else _silent
    more: dict[str, Any] = {"key_resolver": _slow_resolver} if at == "resolver" else {}
    app = proxy(upstream.url, options={"total_timeout": 0.3, "resolver_timeout": 5}, **more)
    caller = Caller([b"a", b"b"], hold_upload=anyio.Event()) if at == "rest of the body" else Caller()
    began = time.monotonic()
    with anyio.fail_after(5):
        await app(http_scope("POST"), _never if at == "body" else caller.receive, caller.send)
    assert 0.2 < time.monotonic() - began < 2
    assert (caller.status, _error(caller)["type"]) == (504, "upstream_timeout")
    assert "total_timeout" in _error(caller)["detail"]
    assert ("nothing was sent" in _error(caller)["detail"]) is (at in ("resolver", "body"))
    if at in ("resolver", "body"):
        assert not upstream.connections
    else:
        assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    await app.aclose()


async def test_an_answer_that_takes_longer_than_it_may_is_cut(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    upstream.script = _idle_stream
    app = proxy(upstream.url, options={"total_timeout": 0.3}, tracer_provider=tracer_provider)
    caller = Caller()
    with pytest.raises(AnswerTimeout):
        await caller.call(app, http_scope())
    assert (caller.status, caller.content, caller.complete) == (200, b"data: 1\n\n", False)
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    spans = [span.attributes or {} for span in exporter.get_finished_spans()]
    [told] = [told for told in spans if "replicate_proxy.outcome" in told]
    assert (told["replicate_proxy.outcome"], told["error.type"]) == ("upstream_timeout", "upstream_timeout")
    await app.aclose()


@pytest.mark.parametrize("at", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("whole", [True, False])
async def test_an_answer_that_has_begun_to_leave_leaves_with_its_status(
    upstream: RawUpstream, at: str, whole: bool
) -> None:
    """A server's own 500 in its place would have SDKs send a create again."""
    upstream.script = answer_all if whole else _idle_stream
    app = proxy(upstream.url, options={"total_timeout": 0.3})
    caller = Caller()
    delayed = 0

    async def send(message: Any) -> None:
        nonlocal delayed
        if message["type"] == at and not delayed:
            delayed += 1
            await anyio.sleep(0.5)
        await caller.send(message)

    with anyio.fail_after(5):
        if whole:
            await app(http_scope("POST"), caller.receive, send)
        else:
            with pytest.raises(AnswerTimeout):
                await app(http_scope("POST"), caller.receive, send)
    assert caller.status == 200
    assert caller.complete is whole
    await app.aclose()


async def test_what_receive_raises_within_an_upload_leaves_with_its_cause(upstream: RawUpstream) -> None:
    upstream.script = _reads_in_vain
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        try:
            raise KeyError("quota")
        except KeyError:
            raise RuntimeError("too much")  # noqa: B904 - its context is what matters

    app = proxy(upstream.url)
    with pytest.raises(RuntimeError, match="too much") as raised:
        await app(http_scope("POST"), receive, Caller().send)
    assert isinstance(raised.value.__context__, KeyError)
    await app.aclose()


async def test_a_stream_takes_no_longer_than_it_may(upstream: RawUpstream) -> None:
    upstream.script = _stream_host
    upstream.go_on.set()
    app = _streaming(upstream, options={"total_timeout": 0.5})
    path = await _stream_path(app)
    caller = Caller()
    with pytest.raises(AnswerTimeout):
        await caller.call(app, http_scope(target=path, headers=[]))
    assert caller.content
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    await app.aclose()


async def test_what_is_done_in_time_is_done(upstream: RawUpstream) -> None:
    assert (await call(proxy(upstream.url, options={"total_timeout": 5}), http_scope())).content == b"{}"


async def test_more_requests_than_may_be_under_way(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    upstream.script = _silent
    asked: list[KeyRequest] = []

    async def resolver(request: KeyRequest) -> str:
        asked.append(request)
        if len(asked) == 2:
            all_in.set()
        return TOKEN

    all_in = anyio.Event()
    options = {"max_in_flight": 2, "proxy_streams": True, "stream_key": "k" * 32, "webhook_secrets": [SECRET]}
    app = proxy(upstream.url, options=options, key_resolver=resolver, tracer_provider=tracer_provider)
    held = [Caller(), Caller()]
    async with anyio.create_task_group() as tasks:
        for one in held:
            tasks.start_soon(one.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        await all_in.wait()
        for scope in (http_scope("POST"), http_scope(target="/v1/-/streams/x"), http_scope("POST", "/v1/-/webhooks")):
            caller = await Caller().call(app, scope)
            assert (caller.status, caller.received) == (503, 0)
            assert caller.header(b"retry-after") == [b"1"]
            assert _error(caller)["type"] == "overloaded"
            assert _error(caller)["detail"].startswith("max_in_flight: 2 requests are under way")
        assert (await Caller().call(app, http_scope(target="/"))).content == b"host"
        for one in held:
            one.left.set()
    assert len(asked) == 2
    spans = [span.attributes or {} for span in exporter.get_finished_spans()]
    assert [told.get("error.type") for told in spans].count("overloaded") == 3
    upstream.script = answer_all
    assert (await call(app, http_scope())).status == 200


@pytest.mark.parametrize("end", ["answered", "refused", "cut", "cancelled", "left", "the server's", "BaseException"])
async def test_no_place_is_lost(upstream: RawUpstream, end: str) -> None:
    upstream.script = {"answered": answer_all, "the server's": answer_all, "cut": _cut}.get(end, _silent)

    class Ends(BaseException):
        pass

    def layer(forward: Forward) -> Forward:
        async def ending(request: ProxyRequest) -> ProxyResponse:
            if end == "refused":
                raise LimitExceeded()
            if end == "BaseException" and not over:
                raise Ends
            return await forward(request)

        return ending

    async def send(message: Any) -> None:
        raise ZeroDivisionError

    over: list[bool] = []
    app = proxy(upstream.url, options={"max_in_flight": 1}, layers=[layer])
    for _ in range(3):
        caller = Caller()
        if end in ("cancelled", "left"):
            caller.left = anyio.Event()
            with anyio.move_on_after(0.1):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(app, http_scope(), caller.receive, caller.send)
                    await anyio.sleep(0.05)
                    if end == "left":
                        caller.left.set()
        else:
            with suppress(UpstreamAborted, ZeroDivisionError, Ends):
                await app(http_scope(), caller.receive, send if end == "the server's" else caller.send)
        assert caller.status != 503
    assert app._in_flight == 0
    await app.aclose()


# --- streams


def _stream_host(connection: Connection) -> None:
    """Answers a create with a link to a stream, and that link with one event."""
    while (request := connection.request()) is not None:
        if request.line.startswith(b"POST"):
            stream = f"http://127.0.0.1:{connection.upstream.port}/v1/files/opaque?sig=1"
            connection.answer(json.dumps({"id": "p1", "urls": {"stream": stream}}).encode(), status=b"201 Created")
        else:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
            connection.send(b"transfer-encoding: chunked\r\n\r\n14\r\nevent: done\ndata:1\n\n\r\n")
            if connection.upstream.go_on.wait(0.2):
                connection.wait_closed()
            connection.send(b"0\r\n\r\n")


def _streaming(upstream: RawUpstream, **more: Any) -> Any:
    options = {"proxy_streams": True, "stream_key": "k" * 32, "stream_hosts": [f"127.0.0.1:{upstream.port}"]}
    return proxy(upstream.url, options=options | more.pop("options", {}), **more)


async def _stream_path(app: Any) -> str:
    caller = await Caller().call(app, http_scope("POST", "/v1/predictions"))
    stream: str = json.loads(caller.content)["urls"]["stream"]
    assert stream.startswith("http://proxy.test/v1/-/streams/")
    return stream.removeprefix("http://proxy.test")


async def test_a_stream_is_read_through_the_proxy_without_a_key(upstream: RawUpstream) -> None:
    upstream.script = _stream_host
    app = _streaming(upstream)
    path = await _stream_path(app)
    caller = await call(app, http_scope(target=path, headers=[(b"last-event-id", b"7"), (b"cookie", b"sid=1")]))
    assert (caller.status, caller.content) == (200, b"event: done\ndata:1\n\n")
    assert caller.header(b"content-type") == [b"text/event-stream"]
    received = upstream.requests[-1]
    assert received.line == b"GET /v1/files/opaque?sig=1 HTTP/1.1"
    assert received.header(b"authorization") == received.header(b"cookie") == []
    assert received.header(b"last-event-id") == [b"7"]


async def test_a_stream_url_on_no_span(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    upstream.script = _stream_host
    app = _streaming(upstream, tracer_provider=tracer_provider)
    path = await _stream_path(app)
    await call(app, http_scope(target=path, headers=[]))
    spans = exporter.get_finished_spans()
    assert not any(path.rpartition("/")[2] in span.to_json() for span in spans)
    [attributes] = [span.attributes or {} for span in spans if span.name == "GET /v1/-/streams/{token}"]
    assert (attributes["url.path"], attributes["replicate_proxy.outcome"]) == ("/v1/-/streams/{token}", "forwarded")


async def test_streams_keep_no_connection_of_the_api(upstream: RawUpstream) -> None:
    upstream.script = _stream_host
    upstream.go_on.set()
    app = _streaming(upstream, options={"max_connections": 1, "max_streams": 1, "connection_wait": 0.1})
    path = await _stream_path(app)
    reader = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.call, app, http_scope(target=path, headers=[]))
        await reader.got_chunk.wait()
        assert (await Caller().call(app, http_scope(target=path, headers=[]))).status == 503
        assert await _stream_path(app)
        reader.left.set()
    await app.aclose()


@pytest.mark.parametrize("spelling", ["/v1//-/streams/{}", "/v1/%2D/streams/{}", "/v1/-/streams%2F{}"])
async def test_no_spelling_of_a_stream_url_goes_anywhere(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, spelling: str
) -> None:
    app = _streaming(upstream, tracer_provider=tracer_provider)
    caller = await call(app, http_scope(target=spelling.format("the-token")))
    assert caller.status == 404
    assert not upstream.connections
    assert not any("the-token" in span.to_json() for span in exporter.get_finished_spans())


async def test_a_stream_is_closed_when_its_reader_leaves(upstream: RawUpstream) -> None:
    upstream.script = _stream_host
    upstream.go_on.set()
    app = _streaming(upstream)
    path = await _stream_path(app)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope(target=path, headers=[]))
        await caller.got_chunk.wait()
        caller.left.set()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    await app.aclose()


@pytest.mark.parametrize(
    ("options", "path", "status"),
    [({}, "/v1/-/streams/forged.token", 404), ({"proxy_streams": False}, "/v1/-/streams/x", 401)],
)
async def test_what_is_no_stream(upstream: RawUpstream, options: dict[str, Any], path: str, status: int) -> None:
    caller = await call(_streaming(upstream, options=options), http_scope(target=path, headers=[]))
    assert (caller.status, _error(caller)["status"]) == (status, status)
    assert not upstream.connections


# --- callers who leave


def _silent(connection: Connection) -> None:
    connection.request()
    connection.upstream.ready.set()
    connection.wait_closed()


def _idle_stream(connection: Connection) -> None:
    connection.request()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    connection.send(head + b"9\r\ndata: 1\n\n\r\n")
    connection.upstream.ready.set()
    connection.wait_closed()


@pytest.mark.parametrize("script", [_silent, _idle_stream])
async def test_upstream_is_closed_when_the_caller_leaves(upstream: RawUpstream, script: Any) -> None:
    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        if script is _idle_stream:
            await caller.got_chunk.wait()
        caller.left.set()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert caller.status == (200 if script is _idle_stream else 499)
    await app.aclose()


async def test_upstream_is_closed_when_the_caller_leaves_within_the_upload(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller([b"abc", b"def"], hold_upload=anyio.Event())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST"))
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        caller.left.set()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert not upstream.requests
    await app.aclose()


async def test_a_caller_who_leaves_is_seen_behind_an_upload_that_nobody_wants(upstream: RawUpstream) -> None:
    closed = anyio.Event()

    class Endless(Arriving):
        async def __anext__(self) -> bytes:
            try:
                await anyio.sleep_forever()
            finally:
                closed.set()
            raise StopAsyncIteration

    def layer(forward: Forward) -> Forward:
        async def answering(request: ProxyRequest) -> ProxyResponse:
            return ProxyResponse(status=200, headers=(), body=Endless([]))

        return answering

    caller = Caller([b"abc"] * 10)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, proxy(upstream.url, layers=[layer]), http_scope("POST"))
        await caller.started.wait()
        await anyio.wait_all_tasks_blocked()
        caller.left.set()
    assert closed.is_set()


# --- layers


def quota(limit: int) -> Any:
    """A host's own layer: so many requests for each tenant."""
    spent: dict[str | None, int] = {}

    def layer(forward: Forward) -> Forward:
        async def counted(request: ProxyRequest) -> ProxyResponse:
            tenant = request.key.tenant
            spent[tenant] = spent.get(tenant, 0) + 1
            if spent[tenant] > limit:
                raise LimitExceeded(f"{tenant} has used its {limit} requests", retry_after=60)
            return await forward(request)

        return counted

    return layer


def input_check(forward: Forward) -> Forward:
    """A host's own layer: looks at the input of a create and answers by itself where it does not like it."""

    async def checked(request: ProxyRequest) -> ProxyResponse:
        if request.operation != "predictions.create":
            return await forward(request)
        body = b"".join([chunk async for chunk in request.body])
        if b"secret plan" in body:
            return ProxyResponse.json(422, {"detail": "not that"})
        return await forward(replace(request, body=_again(body)))

    return checked


async def _again(body: bytes) -> AsyncIterable[bytes]:
    yield body


async def test_a_quota_of_the_host(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, layers=[quota(1)])
    assert (await call(app, http_scope())).status == 200
    caller = await call(app, http_scope())
    assert (caller.status, caller.header(b"retry-after")) == (429, [b"60"])
    assert _error(caller)["message"] == "team-a has used its 1 requests"
    assert (await call(app, http_scope(headers=[(b"x-portkey-api-key", b"pk-team-b")]))).status == 200
    assert len(upstream.requests) == 2


async def test_an_input_check_of_the_host(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, layers=[input_check])
    scope = http_scope("POST", "/v1/predictions", [KEY, (b"content-length", b"22")])
    assert (await call(app, scope, b'{"p": "a secret plan"}')).status == 422
    assert (await call(app, scope, b'{"p": ', b'"a public plan"}')).status == 200
    assert (await call(app, http_scope())).status == 200
    assert len(upstream.requests) == 2


async def test_layers_are_passed_from_the_outside_in(upstream: RawUpstream) -> None:
    passed = []

    def named(name: str) -> Any:
        def layer(forward: Forward) -> Forward:
            async def noted(request: ProxyRequest) -> ProxyResponse:
                passed.append(name)
                return await forward(request)

            return noted

        return layer

    await call(proxy(upstream.url, layers=[named("outer"), named("inner")]), http_scope())
    assert passed == ["outer", "inner"]


async def test_a_layer_that_fails_is_answered_for(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    def layer(forward: Forward) -> Forward:
        async def failing(request: ProxyRequest) -> ProxyResponse:
            raise ZeroDivisionError("hunter2")

        return failing

    with caplog.at_level(logging.ERROR):
        caller = await call(proxy(upstream.url, layers=[layer]), http_scope("POST"))
    assert (caller.status, _error(caller)["error"]["code"]) == (500, "internal_error")
    assert caplog.messages == ["request failed: ZeroDivisionError"]
    assert not upstream.connections


async def test_a_layer_that_refuses_within_an_answer_cuts_it(upstream: RawUpstream) -> None:
    class Refusing:
        def __aiter__(self) -> Refusing:
            return self

        async def __anext__(self) -> bytes:
            raise PermissionDenied("too much")

    def layer(forward: Forward) -> Forward:
        async def refusing(request: ProxyRequest) -> ProxyResponse:
            return replace(await forward(request), body=Refusing())

        return refusing

    app = proxy(upstream.url, layers=[layer])
    caller = Caller()
    with pytest.raises(PermissionDenied):
        await caller.call(app, http_scope())
    assert not caller.complete
    await app.aclose()


async def _whole(response: ProxyResponse) -> bytes:
    return b"".join([chunk async for chunk in response.body])


def buffering(forward: Forward) -> Forward:
    """A layer that reads the whole answer and puts another in its place, without closing the first."""

    async def buffered(request: ProxyRequest) -> ProxyResponse:
        response = await forward(request)
        return ProxyResponse(status=response.status, headers=(), body=Chunks([await _whole(response)]))

    return buffered


def _within(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc")
    connection.upstream.ready.set()
    connection.wait_closed()


async def test_a_layer_that_keeps_an_answer_open_keeps_no_connection(upstream: RawUpstream) -> None:
    upstream.script = _within
    app = proxy(upstream.url, layers=[buffering], options={"max_connections": 1, "connection_wait": 0.05})
    for _ in range(3):
        caller = Caller()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, app, http_scope())
            await anyio.to_thread.run_sync(upstream.ready.wait, 2)
            upstream.ready.clear()
            caller.left.set()
    upstream.script = answer_all
    assert (await call(app, http_scope())).content == b"{}"


async def test_a_layer_may_close_what_it_replaces(upstream: RawUpstream) -> None:
    def layer(forward: Forward) -> Forward:
        async def closing(request: ProxyRequest) -> ProxyResponse:
            response = await forward(request)
            body = await _whole(response)
            await response.aclose()
            return replace(response, body=Chunks([body]))

        return closing

    assert (await call(proxy(upstream.url, layers=[layer]), http_scope())).content == b"{}"


async def test_an_answer_that_is_cut_within_a_layer_is_a_failure_that_can_be_told(upstream: RawUpstream) -> None:
    upstream.script = _cut
    caller = await call(proxy(upstream.url, layers=[buffering]), http_scope("POST"))
    assert (caller.status, _error(caller)["error"]["code"]) == (502, "upstream_failed")
    assert caller.header(b"x-should-retry") == [b"false"]


async def test_a_layer_that_sends_a_body_twice_sends_it_once(upstream: RawUpstream) -> None:
    def layer(forward: Forward) -> Forward:
        async def twice(request: ProxyRequest) -> ProxyResponse:
            await forward(request)
            return await forward(request)

        return twice

    caller = await call(proxy(upstream.url, layers=[layer]), http_scope("POST"), b"abc", b"def")
    assert (caller.status, _error(caller)["error"]["code"]) == (500, "internal_error")
    assert len(upstream.requests) == 1
    assert (await call(proxy(upstream.url, layers=[layer]), http_scope("DELETE"))).status == 200


async def test_an_error_on_closing_is_nobody_s_concern(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    def layer(forward: Forward) -> Forward:
        async def odd(request: ProxyRequest) -> ProxyResponse:
            async def aclose() -> None:
                raise ZeroDivisionError("hunter2")

            return replace(await forward(request), aclose=aclose)

        return odd

    caller = await call(proxy(upstream.url, layers=[layer]), http_scope())
    assert (caller.status, caller.complete) == (200, True)
    assert caplog.messages == ["closing an answer failed: ZeroDivisionError"]


async def test_what_send_raises_carries_nothing_along(upstream: RawUpstream) -> None:
    class Hosts(Exception):
        pass

    async def send(message: Any) -> None:
        raise Hosts

    with pytest.raises(Hosts) as raised:
        await proxy(upstream.url)(http_scope(headers=[]), Caller().receive, send)
    assert raised.value.__context__ is None


async def test_a_layer_that_leaves_the_context_is_served_all_the_same(upstream: RawUpstream) -> None:
    def layer(forward: Forward) -> Forward:
        async def elsewhere(request: ProxyRequest) -> ProxyResponse:
            answered: list[ProxyResponse] = []

            async def run() -> None:
                answered.append(await forward(request))

            async with anyio.create_task_group() as tasks:
                contextvars.Context().run(tasks.start_soon, run)
            return answered[0]

        return elsewhere

    assert (await call(proxy(upstream.url, layers=[layer]), http_scope())).content == b"{}"


async def test_a_request_shows_no_secret(upstream: RawUpstream) -> None:
    shown = []

    def layer(forward: Forward) -> Forward:
        async def showing(request: ProxyRequest) -> ProxyResponse:
            shown.append(repr(request))
            response = await forward(request)
            shown.append(repr(response))
            return response

        return showing

    await call(proxy(upstream.url, layers=[layer]), http_scope())
    assert len(shown) == 2
    assert not any(TOKEN in text or "pk-team-a" in text for text in shown)


async def test_the_defaults_point_at_replicate() -> None:
    middleware = ReplicateProxyMiddleware(host, key_resolver=StaticKeyResolver(TOKEN, api_keys=["pk"]))
    assert middleware._config.upstream == "https://api.replicate.com/v1"
    assert (await call(middleware, http_scope(target="/"))).content == b"host"


# --- what layers do afterwards


def _afterwards(*steps: Callable[[], Awaitable[None]]) -> Layer:
    def layer(forward: Forward) -> Forward:
        async def leaving(request: ProxyRequest) -> ProxyResponse:
            request.afterwards.extend(steps)
            return await forward(request)

        return leaving

    return layer


async def test_it_runs_in_order_when_the_answer_is_out(upstream: RawUpstream) -> None:
    caller, ran = Caller(), []

    def step(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await anyio.lowlevel.checkpoint()
            ran.append((name, caller.complete))

        return run

    app = proxy(upstream.url, layers=[_afterwards(step("a"), step("b")), _afterwards(step("c"))])
    await caller.call(app, http_scope())
    assert ran == [("a", True), ("b", True), ("c", True)]
    await app.aclose()


async def test_what_fails_afterwards_is_said_and_keeps_nothing_from_running(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    async def fails() -> None:
        raise ZeroDivisionError("hunter2")

    async def runs() -> None:
        ran.append(True)

    caller = await call(proxy(upstream.url, layers=[_afterwards(fails, runs)]), http_scope())
    assert (caller.status, caller.complete) == (200, True)
    assert ran == [True]
    assert caplog.messages == ["what a layer does afterwards failed: ZeroDivisionError"]


async def test_it_has_its_time(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AFTERWARDS_TIMEOUT", 0.05)
    caller = await call(proxy(upstream.url, layers=[_afterwards(anyio.sleep_forever)]), http_scope())
    assert (caller.status, caller.complete) == (200, True)


async def test_it_runs_when_the_answer_was_cut_or_nobody_is_left(upstream: RawUpstream) -> None:
    ran = []

    async def runs() -> None:
        await anyio.sleep(0.01)
        ran.append(True)

    app = proxy(upstream.url, layers=[_afterwards(runs)])
    upstream.script = _cut
    with pytest.raises(UpstreamAborted):
        await Caller().call(app, http_scope())
    upstream.script = _within
    for ends in ("caller", "host"):
        caller = Caller()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, app, http_scope())
            await caller.got_chunk.wait()
            caller.left.set() if ends == "caller" else tasks.cancel_scope.cancel()
    assert ran == [True] * 3
    await app.aclose()


async def test_nothing_runs_afterwards_of_what_no_layer_has_seen(upstream: RawUpstream) -> None:
    async def runs() -> None:
        raise AssertionError

    caller = await call(proxy(upstream.url, layers=[_afterwards(runs)]), http_scope(headers=()))
    assert caller.status == 401


# --- webhooks

SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OTHER_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DELIVERY = b'{"id": "p1", "status": "succeeded"}'


def _taking(upstream: str, on_webhook: Any, **more: Any) -> Any:
    options = {"webhook_secrets": [SECRET]} | more.pop("options", {})
    return proxy(upstream, options=options, on_webhook=on_webhook, **more)


def _delivery(
    method: str = "POST",
    target: str = "/v1/-/webhooks",
    *more: tuple[bytes, bytes],
    id: str = "msg_1",
    secret: str = SECRET,
) -> dict[str, Any]:
    at = str(int(time.time()))
    headers = [
        (b"webhook-id", id.encode()),
        (b"webhook-timestamp", at.encode()),
        (b"webhook-signature", sign(secret, id, at, DELIVERY).encode()),
    ]
    return http_scope(method, target, [*headers, *more])


def test_replicate_s_own_deliveries_reach_the_host_once(fake_replicate: FakeReplicate) -> None:
    taken = Host()
    keys = StaticKeyResolver(fake_replicate.token, api_keys=["pk-team-a"])
    options = {"webhook_secrets": [fake_replicate.webhook_secret]}
    app = _taking(fake_replicate.url, taken, options=options, key_resolver=keys)
    with serve(app) as served:
        content = {
            "version": HELLO_WORLD,
            "input": {"text": "Ada"},
            "webhook": f"{served.url}/v1/-/webhooks",
            "webhook_events_filter": ["completed"],
        }
        headers = {"x-portkey-api-key": "pk-team-a"}
        created = httpx.post(f"{served.url}/v1/predictions", headers=headers, json=content).json()
        fake_replicate.clock.advance(3600)
        end = time.monotonic() + 10
        while not fake_replicate.deliveries and time.monotonic() < end:
            time.sleep(0.01)
    assert [delivery.status for delivery in fake_replicate.deliveries] == [204]
    [event] = taken.events
    assert (event.prediction["id"], event.prediction["status"]) == (created["id"], "succeeded")
    assert event.body == fake_replicate.deliveries[0].body
    assert event.id == fake_replicate.deliveries[0].webhook_id


@pytest.mark.parametrize(
    "body", [[DELIVERY], [DELIVERY[:9], DELIVERY[9:]], [b"", *(bytes([byte]) for byte in DELIVERY)]]
)
async def test_a_delivery_is_taken_once_however_it_arrives(upstream: RawUpstream, body: list[bytes]) -> None:
    host = Host()
    app = _taking(upstream.url, host)
    caller = await call(app, _delivery(), *body)
    assert (caller.status, caller.content, caller.complete) == (204, b"", True)
    assert caller.header(b"x-portkey-trace-id") != []
    again = await call(app, _delivery(), *body)
    assert (again.status, _error(again)["error"]["code"]) == (409, "webhook_replayed")
    assert [event.body for event in host.events] == [DELIVERY]
    assert upstream.requests == []


async def test_a_callback_is_not_needed(upstream: RawUpstream) -> None:
    app = _taking(upstream.url, None)
    assert (await call(app, _delivery(), DELIVERY)).status == 204
    assert (await call(app, _delivery(id="msg_2"), b"{}")).status == 401


@pytest.mark.parametrize(
    ("method", "headers", "secret", "status", "code"),
    [
        ("POST", [], OTHER_SECRET, 401, "webhook_unverified"),
        ("POST", [(b"webhook-id", b"msg_2")], SECRET, 400, "bad_request"),
        ("POST", [(b"content-length", b"3")], SECRET, 400, "bad_request"),
        ("POST", [(b"content-length", b"x")], SECRET, 400, "bad_request"),
        ("GET", [], SECRET, 405, "method_not_allowed"),
        ("PUT", [], SECRET, 405, "method_not_allowed"),
    ],
)
async def test_what_is_no_delivery_is_refused_in_our_own_words(
    upstream: RawUpstream, method: str, headers: list[tuple[bytes, bytes]], secret: str, status: int, code: str
) -> None:
    host = Host()
    scope = _delivery(method, "/v1/-/webhooks", *headers, secret=secret)
    caller = await call(_taking(upstream.url, host), scope, DELIVERY)
    content = _error(caller)
    assert (caller.status, content["status"], content["type"], content["error"]["code"]) == (status, status, code, code)
    assert caller.header(b"x-request-id") == [content["request_id"].encode()]
    assert caller.header(b"allow") == ([b"POST"] if status == 405 else [])
    assert host.events == []
    assert upstream.requests == []


async def test_a_key_is_no_signature(upstream: RawUpstream) -> None:
    host = Host()
    caller = await call(_taking(upstream.url, host), http_scope("POST", "/v1/-/webhooks"), DELIVERY)
    assert (caller.status, _error(caller)["type"]) == (400, "webhook_unsigned")
    assert host.events == []
    assert upstream.requests == []


@pytest.mark.parametrize(
    "target", ["/v1/-/webhooks/", "/v1/%2D/webhooks", "/v1//-/webhooks", "/v1/-/webhooks/x", "/v1/-/Webhooks", "/v1/-"]
)
@pytest.mark.parametrize("key", [KEY, None])
async def test_no_other_spelling_of_it_is_one(
    upstream: RawUpstream, target: str, key: tuple[bytes, bytes] | None
) -> None:
    host = Host()
    caller = await call(_taking(upstream.url, host), _delivery("POST", target, *([key] if key else [])), DELIVERY)
    if key is None:
        assert (caller.status, _error(caller)["type"]) == (401, "key_missing")
    assert len(upstream.requests) == (1 if key else 0)
    assert host.events == []


@pytest.mark.parametrize(
    ("options", "target"),
    [({}, "/v1/-/webhooks?of=team-a"), ({"prefix": ""}, "/-/webhooks"), ({"prefix": "/r"}, "/r/-/webhooks")],
)
async def test_where_deliveries_are_taken(upstream: RawUpstream, options: dict[str, Any], target: str) -> None:
    host = Host()
    caller = await call(_taking(upstream.url, host, options=options), _delivery("POST", target), DELIVERY)
    assert (caller.status, len(host.events)) == (204, 1)


async def test_the_host_may_keep_the_path(upstream: RawUpstream) -> None:
    app = _taking(upstream.url, Host(), options={"exclude": ["/v1/-/webhooks"]})
    assert (await call(app, _delivery(), DELIVERY)).content == b"host"


@pytest.mark.parametrize(("headers", "status", "sent"), [([], 401, 0), ([KEY], 200, 1)])
async def test_without_secrets_the_path_is_one_as_any_other(
    upstream: RawUpstream, headers: list[tuple[bytes, bytes]], status: int, sent: int
) -> None:
    caller = await call(proxy(upstream.url), _delivery("POST", "/v1/-/webhooks", *headers), DELIVERY)
    assert (caller.status, len(upstream.requests)) == (status, sent)


async def test_a_callback_that_fails_gets_the_delivery_again(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(ZeroDivisionError("hunter2"))
    app = _taking(upstream.url, host)
    caller = await call(app, _delivery(), DELIVERY)
    assert (caller.status, _error(caller)["type"]) == (500, "webhook_failed")
    assert caplog.messages == ["webhook callback failed: ZeroDivisionError"]
    assert (await call(app, _delivery(), DELIVERY)).status == 204
    assert len(host.events) == 2


@pytest.mark.parametrize("who", ["sender", "server"])
async def test_a_callback_goes_on_when_nobody_waits_for_it(upstream: RawUpstream, who: str) -> None:
    started, go_on, done = anyio.Event(), anyio.Event(), []

    async def on_webhook(event: WebhookEvent) -> None:
        started.set()
        await go_on.wait()
        await anyio.lowlevel.checkpoint()
        done.append(event.id)

    app, caller = _taking(upstream.url, on_webhook), Caller([DELIVERY])
    async with anyio.create_task_group() as outer, anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, _delivery())
        await started.wait()
        caller.left.set() if who == "sender" else tasks.cancel_scope.cancel()
        outer.start_soon(_set_later, go_on)
    assert done == ["msg_1"]
    assert (await call(app, _delivery(), DELIVERY)).status == 409
    assert done == ["msg_1"]


async def _set_later(event: anyio.Event) -> None:
    await anyio.wait_all_tasks_blocked()
    event.set()


async def test_deliveries_take_no_room_in_the_memory_of_this_process(upstream: RawUpstream) -> None:
    store = MemoryPredictionStore()
    assert (await call(_taking(upstream.url, Host(), store=store), _delivery(), DELIVERY)).status == 204
    assert len(store) == 0


async def test_processes_with_a_store_of_the_host_s_take_a_delivery_once(upstream: RawUpstream) -> None:
    store, host = Switched(), Host()
    answers = [await call(_taking(upstream.url, host, store=store), _delivery(), DELIVERY) for _ in range(2)]
    assert [answer.status for answer in answers] == [204, 409]
    assert len(host.events) == 1
    [id] = store.put_ids
    assert id.startswith("webhook:")


# --- what telemetry is told to do


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"on_webhook": Host()}, "on_webhook: needs webhook_secrets"),
        ({"options": {"webhook_secrets": ["hunter2"]}}, "webhook_secrets: each must be"),
        ({"options": {"capture_content": "sometimes"}}, "capture_content: must be"),
        ({"options": {"capture_content": 1.5}}, "capture_content: must be"),
        ({"prices": 5}, "prices: must be a table"),
        ({"prices": {"a/b": 5}}, "prices: 'a/b' has neither"),
        ({"prices": {"a/b": "c/d"}}, "prices: 'a/b' leads to 'c/d'"),
    ],
)
async def test_what_is_wrong_is_named_when_the_middleware_is_made(keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as raised:
        proxy("http://127.0.0.1:1", **keywords)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("propagates", [True, False])
@pytest.mark.parametrize("traces", [True, False])
async def test_replicate_is_told_of_a_trace_if_the_host_says_so_and_there_is_one(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    propagates: bool,
    traces: bool,
) -> None:
    provider: dict[str, Any] = {"tracer_provider": tracer_provider} if traces else {}
    theirs = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    beside = [(b"tracestate", b"a=b"), (b"baggage", b"a=b")]
    app = proxy(upstream.url, options={"propagate_upstream": propagates, "trust_traceparent": "ignore"}, **provider)
    await call(app, http_scope(headers=[KEY, theirs, *beside]))
    [received] = upstream.requests
    expected = []
    if propagates and traces:
        context = exporter.get_finished_spans()[0].context
        assert context is not None
        expected = [f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}".encode()]
    assert received.header(b"traceparent") == expected
    assert received.header(b"tracestate") == received.header(b"baggage") == []
