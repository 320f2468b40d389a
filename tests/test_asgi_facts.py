"""What hosts, servers and httpx do that a proxy has to know: ten facts, each with the test that we hold."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar
from litestar import get as litestar_get
from litestar.exceptions import ImproperlyConfiguredException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.testing import serve
from replicate_proxy_mw.upstream import PooledTransport
from tests.raw_asgi import KEY, TOKEN, Caller, call, host, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

HEADERS = {"x-portkey-api-key": "pk-team-a"}


def _keywords(upstream: str, **options: Any) -> dict[str, Any]:
    return {
        "key_resolver": MappingKeyResolver({"pk-team-a": TOKEN}),
        "config": ProxyConfig(upstream=upstream, **options),
    }


# 1. httpcore loses a slot of its pool when a request is cancelled while it queues for a connection.


@pytest.mark.anyio
async def test_fact_1_cancelled_waiters_lose_no_connection(upstream: RawUpstream) -> None:
    transport = PooledTransport(origin=None, max_connections=5)
    chance = random.Random(1)

    async def one() -> None:
        with anyio.move_on_after(chance.random() * 0.02):
            response = await transport.handle_async_request(httpx.Request("GET", upstream.url))
            assert isinstance(response.stream, httpx.AsyncByteStream)
            try:
                async for _ in response.stream:
                    pass
            finally:
                with anyio.CancelScope(shield=True):
                    await response.stream.aclose()

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(one)
    held = []
    with anyio.fail_after(5):
        for _ in range(5):
            held.append(await transport.handle_async_request(httpx.Request("GET", upstream.url)))
    for response in held:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await response.stream.aclose()
    await transport.aclose()


# 2. A relay in the host's own task leaks its connection when that task is cancelled twice.


def test_fact_2_a_task_that_is_cancelled_twice_leaks_no_connection(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        connection.wait_closed()

    upstream.script = script

    async def main() -> None:
        app = proxy(upstream.url)
        for _ in range(20):
            caller = Caller()
            task = asyncio.ensure_future(app(http_scope(), caller.receive, caller.send))
            await caller.got_chunk.wait()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(asyncio.all_tasks()) == 1
        await asyncio.to_thread(upstream.all_closed, 20)
        await app.aclose()

    asyncio.run(main())
    assert len(upstream.closed_at) == 20


# 3. `send()` never raises after the caller has left: only a pending `receive()` tells, and only to one reader.


@pytest.mark.parametrize("phase", ["silent", "streaming", "uploading"])
def test_fact_3_a_departure_is_seen_at_receive(upstream: RawUpstream, phase: str) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        if phase == "streaming":
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    with serve(ReplicateProxyMiddleware(host, **_keywords(upstream.url))) as served:
        address = httpx.URL(served.url)
        with socket.create_connection((address.host, address.port)) as caller:
            length = b"100" if phase == "uploading" else b"1"
            caller.sendall(
                b"POST /v1/x HTTP/1.1\r\nhost: h\r\nx-portkey-api-key: pk-team-a\r\ncontent-length: "
                + length
                + b"\r\n\r\na"
            )
            assert upstream.ready.wait(2)
        assert upstream.closed.wait(1.5)


@pytest.mark.anyio
async def test_fact_3_there_is_one_reader_at_a_time(upstream: RawUpstream) -> None:
    # `Caller.receive` fails when it is called while a call is pending.
    caller = await call(proxy(upstream.url), http_scope("POST"), *[b"abc"] * 20)
    assert caller.complete
    assert b"".join(upstream.requests[0].body.split(b"\r\n")[1::2]) == b"abc" * 20


# 4. A client keeps upstream's cookies and sends them with the next tenant's request.


@pytest.mark.anyio
async def test_fact_4_no_cookie_reaches_the_next_tenant(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(headers=b"set-cookie: sid=team-a; path=/\r\n")

    upstream.script = script
    app = proxy(upstream.url)
    for key in (b"pk-team-a", b"pk-team-b"):
        caller = Caller()
        await caller.call(app, http_scope(headers=[(b"x-portkey-api-key", key)]))
        assert caller.header(b"set-cookie") == []
    await app.aclose()
    assert len(upstream.connections) == 1
    assert [received.header(b"cookie") for received in upstream.requests] == [[], []]


# 5. `BaseHTTPMiddleware` around us ends a cut answer as if it were complete: so we stand outermost.


class Around(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def test_fact_5_outermost_a_cut_answer_is_cut(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")

    upstream.script = script
    app = FastAPI()
    app.add_middleware(Around)
    app.add_middleware(ReplicateProxyMiddleware, **_keywords(upstream.url))
    with serve(app) as served, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(served.url + "/v1/x", headers=HEADERS)


def test_fact_5_a_caller_who_leaves_makes_no_noise_in_such_a_host(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    app = FastAPI()
    app.add_middleware(ReplicateProxyMiddleware, **_keywords(upstream.url))
    app.add_middleware(Around)
    with serve(app) as served:
        address = httpx.URL(served.url)
        with socket.create_connection((address.host, address.port)) as caller:
            caller.sendall(b"GET /v1/x HTTP/1.1\r\nhost: h\r\nx-portkey-api-key: pk-team-a\r\n\r\n")
            assert upstream.ready.wait(2)
        assert upstream.closed.wait(1.5)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# 6. Litestar's mounts rewrite the path and match on a bare string prefix.


def test_fact_6_below_litestar_s_mount_paths_are_as_they_came(upstream: RawUpstream) -> None:
    app = Litestar(plugins=[ReplicateProxyPlugin(**_keywords(upstream.url))], logging_config=None)
    with serve(app) as served:
        for target in ("/v1/x", "/v1/a%2Fb//c/", "/v1"):
            assert httpx.get(served.url + target, headers=HEADERS).status_code == 200
        assert httpx.get(served.url + "/v1beta/5", headers=HEADERS).status_code == 404
    assert [received.line.split()[1] for received in upstream.requests] == [b"/v1/x", b"/v1/a%2Fb//c/", b"/v1"]


def test_fact_6_a_route_that_the_mount_would_take_is_refused_at_start_up() -> None:
    @litestar_get("/v1beta", sync_to_thread=False)
    def beta() -> None: ...

    with pytest.raises(ImproperlyConfiguredException, match="/v1beta"):
        Litestar([beta], plugins=[ReplicateProxyPlugin(**_keywords("http://127.0.0.1:1"))], logging_config=None)


# 7. Not every host has a lifespan, and a transport belongs to one event loop.


@pytest.mark.anyio
async def test_fact_7_a_host_that_raises_on_lifespan_may(upstream: RawUpstream) -> None:
    async def django(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")
        await host(scope, receive, send)

    app = proxy(upstream.url, app=django)
    with pytest.raises(ValueError, match="Django can only"):
        await app({"type": "lifespan"}, Caller().receive, Caller().send)
    assert (await call(app, http_scope())).status == 200


def test_fact_7_a_mounted_proxy_opens_without_lifespan(upstream: RawUpstream) -> None:
    mounted = ReplicateProxyMiddleware(host, **_keywords(upstream.url))
    with serve(Starlette(routes=[Mount("/team", app=mounted)])) as served:
        response = httpx.get(served.url + "/team/v1/x", headers=HEADERS)
        assert (response.status_code, response.json()) == (200, {})
    assert upstream.requests[0].line == b"GET /v1/x HTTP/1.1"


def test_fact_7_each_event_loop_has_its_own_connections(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)

    async def main() -> None:
        assert (await Caller().call(app, http_scope())).status == 200
        await app.aclose()

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(main, backend=backend)
    assert len(upstream.connections) == 3


def test_fact_7_what_was_opened_closes_with_the_host(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer()
        connection.wait_closed()

    upstream.script = script
    app = FastAPI()
    app.add_middleware(ReplicateProxyMiddleware, **_keywords(upstream.url))
    with serve(app) as served:
        assert httpx.get(served.url + "/v1/x", headers=HEADERS).status_code == 200
        assert not upstream.closed.is_set()
    assert upstream.closed.wait(2)


# 8. `httpx.URL` resolves dot segments: `/v1/../x` would be sent as `/x`.


@pytest.mark.anyio
@pytest.mark.parametrize("target", ["/v1/../x", "/v1/./x", "/v1/..", "/v1/%2e%2e/x", "/v1/a%2f..%2f..%2fx"])
async def test_fact_8_dot_segments_are_refused(upstream: RawUpstream, target: str) -> None:
    assert (await call(proxy(upstream.url), http_scope(target=target))).status == 400
    assert not upstream.connections


# 9. What leaves through a task group arrives as an exception group, which no host's handler knows.


def test_fact_9_a_host_s_own_body_limit_stays_a_413(upstream: RawUpstream) -> None:
    app = FastAPI(max_body_size=10)
    app.add_middleware(ReplicateProxyMiddleware, **_keywords(upstream.url))
    with serve(app) as served:
        whole = httpx.post(served.url + "/v1/x", headers=HEADERS, content=b"x" * 100)
        chunked = httpx.post(served.url + "/v1/x", headers=HEADERS, content=iter([b"x" * 8] * 10))
    assert (whole.status_code, chunked.status_code) == (413, 413)


@pytest.mark.anyio
async def test_fact_9_no_exception_group_leaves(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")

    upstream.script = script
    app = proxy(upstream.url)
    with pytest.raises(Exception, match="cut") as raised:
        await Caller().call(app, http_scope())
    assert not isinstance(raised.value, BaseExceptionGroup)
    await app.aclose()


# 10. httpx's ASGITransport buffers whole answers: streams are judged on a raw driver and on real servers.


@pytest.mark.anyio
async def test_fact_10_an_event_is_out_before_upstream_has_ended(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in (b"data: 1\n\n", b"data: 2\n\n"):
            connection.send(b"%x\r\n%s\r\n" % (len(event), event))
            connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope(headers=[KEY]))
        with anyio.fail_after(2):
            await caller.got_chunk.wait()
        assert (caller.content, caller.complete) == (b"data: 1\n\n", False)
        upstream.go_on.set()
    assert (caller.chunks, caller.complete) == ([b"data: 1\n\n", b"data: 2\n\n"], True)
    await app.aclose()


def test_the_host_s_own_routes_work_in_every_place(upstream: RawUpstream) -> None:
    def own(request: Request) -> Response:
        return PlainTextResponse("own")

    keywords = _keywords(upstream.url, exclude=["/v1/own"])
    routes = [Route("/v1/own", own), Route("/other", own)]
    places: list[Callable[..., Awaitable[None]]] = [
        ReplicateProxyMiddleware(Starlette(routes=routes), **keywords),
        Starlette(routes=routes, middleware=[Middleware(ReplicateProxyMiddleware, **keywords)]),
    ]
    for app in places:
        with serve(app) as served:
            assert httpx.get(served.url + "/other").text == "own"
            assert httpx.get(served.url + "/v1/own").text == "own"
            assert httpx.get(served.url + "/v1/x", headers=HEADERS).json() == {}
