from __future__ import annotations

import gzip
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.endpoints.streams import StreamEndpoint
from replicate_proxy_mw.errors import (
    LimitExceeded,
    MethodNotAllowed,
    Overloaded,
    ProxyError,
    StreamExpired,
    StreamUnknown,
    UpstreamAborted,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from replicate_proxy_mw.exchange import ProxyResponse
from replicate_proxy_mw.headers import HeaderList
from replicate_proxy_mw.testing import FakeReplicate
from replicate_proxy_mw.upstream import PooledTransport
from tests.raw_asgi import Arriving
from tests.raw_upstream import Connection, RawUpstream
from tests.tracebacks import locals_of

KEY = "a-key-that-all-replicas-have-in-common"
URL = "https://stream.replicate.com/v1/files/bcwr-3okdfv3o2wehstv5f2okyftwxy57hhypqsi6osiim5iaq5k7u24a"
ID = "bcwr3okdfv3o2wehstv5f2okyf"
TIMEOUT = {"connect": 2.0, "read": 2.0, "write": 2.0, "pool": 2.0}

Send = Callable[[httpx.Request], Awaitable[httpx.Response]]


async def not_sent(request: httpx.Request) -> httpx.Response:
    raise AssertionError("nothing was to be sent")


def endpoint(
    send: Send = not_sent,
    *,
    key: str = KEY,
    hosts: Sequence[str] = STREAM_HOSTS,
    silence: float = 2.0,
    now: Callable[[], float] = lambda: 1_790_000_000.0,
) -> StreamEndpoint:
    return StreamEndpoint(
        key=key, lifetime=3600.0, hosts=hosts, send=send, timeout=TIMEOUT | {"read": silence}, now=now
    )


def signed(made: StreamEndpoint, url: str = URL) -> str:
    path = made.path_for(url, ID)
    assert path is not None
    return path


async def opened(made: StreamEndpoint, path: str, headers: HeaderList = (), *, method: str = "GET") -> ProxyResponse:
    return await made.fetch(made.find(path=path, method=method), headers)


def shows_nothing(error: BaseException, *secrets: str) -> bool:
    """Whether neither the text of `error` nor what is displayed with it holds one of `secrets`."""
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    shown = f"{error!r} {error} {locals_of(error)}"
    assert isinstance(error, UpstreamAborted) or "StreamEndpoint" in shown  # the frame was looked at
    return not any(secret in shown for secret in secrets)


@dataclass
class Answer:
    response: ProxyResponse
    body: bytes


@pytest.mark.parametrize("key", ["", "0123456789012345678901234567890"])
def test_a_short_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match=r"^key: must have at least 32 characters$") as raised:
        endpoint(key=key)
    shown = locals_of(raised.value)
    assert shown.count("lifetime") >= 2  # both constructors were looked at
    assert not key or key not in shown


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "QUERY", "get"])
def test_other_methods(method: str) -> None:
    made = endpoint()
    with pytest.raises(MethodNotAllowed) as raised:
        made.find(path=signed(made), method=method)
    assert raised.value.status == 405
    assert raised.value.headers == ((b"allow", b"GET, HEAD"),)


def test_what_a_path_leads_to() -> None:
    made = endpoint()
    for method in ("GET", "HEAD"):
        stream = made.find(path=signed(made), method=method)
        assert (str(stream.url), stream.id) == (URL, ID)
        assert "stream.replicate.com" not in repr(stream)


def test_refusals_send_nothing_and_show_nothing() -> None:
    made = endpoint()
    path = signed(made)
    attempts: list[tuple[StreamEndpoint, str, str, type[ProxyError]]] = [
        (made, path, "POST", MethodNotAllowed),
        (made, path[:-1], "GET", StreamUnknown),
        (endpoint(now=lambda: 2e9), path, "GET", StreamExpired),
        (endpoint(hosts=["a.test"]), path, "HEAD", StreamUnknown),
    ]
    for used, asked, method, error in attempts:
        with pytest.raises(error) as raised:
            used.find(path=asked, method=method)
        assert shows_nothing(raised.value, asked)


@pytest.mark.anyio
async def test_what_goes_up() -> None:
    sent: list[httpx.Request] = []

    async def remember(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b""))

    made = endpoint(remember, silence=7.0)
    await opened(made, signed(made))
    await opened(
        made,
        signed(made),
        method="HEAD",
        headers=(
            (b"accept", b"*/*"),
            (b"accept-encoding", b"gzip"),
            (b"authorization", b"Bearer pk-team-a"),
            (b"cookie", b"a=b"),
            (b"cache-control", b"no-store"),
            (b"last-event-id", b"1690212292:0"),
            (b"prefer", b"wait"),
            (b"range", b"bytes=0-"),
            (b"user-agent", b"replicate-python/1.0.7"),
            (b"x-api-key", b"secret"),
        ),
    )
    await opened(made, signed(made), ((b"cache-control", b"max-age=0"),))
    assert [request.headers.raw for request in sent] == [
        [
            (b"host", b"stream.replicate.com"),
            (b"accept", b"text/event-stream"),
            (b"accept-encoding", b"identity"),
        ],
        [
            (b"host", b"stream.replicate.com"),
            (b"accept-encoding", b"identity"),
            (b"accept", b"*/*"),
            (b"last-event-id", b"1690212292:0"),
            (b"user-agent", b"replicate-python/1.0.7"),
            (b"cache-control", b"no-store"),
        ],
        [
            (b"host", b"stream.replicate.com"),
            (b"accept", b"text/event-stream"),
            (b"accept-encoding", b"identity"),
        ],
    ]
    assert {(request.method, str(request.url)) for request in sent} == {("GET", URL)}
    assert sent[0].extensions == {"timeout": TIMEOUT | {"read": 7.0}}


@asynccontextmanager
async def at(
    upstream: RawUpstream, *, silence: float = 2.0, slots: int = 10
) -> AsyncIterator[tuple[StreamEndpoint, str]]:
    """An endpoint whose one host is `upstream`, with a real transport, and the path of a stream there."""
    transport = PooledTransport(origin=None, max_connections=slots)
    made = endpoint(transport.handle_async_request, hosts=[f"127.0.0.1:{upstream.port}"], silence=silence)
    try:
        yield made, signed(made, f"{upstream.url}/files/opaque?a=b")
    finally:
        await transport.aclose()


async def read(made: StreamEndpoint, path: str, headers: HeaderList = ()) -> Answer:
    response = await opened(made, path, headers)
    try:
        return Answer(response, b"".join([chunk async for chunk in response.body]))
    finally:
        await response.aclose()


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
FIRST = b"event: output\nid: 1690212292:0\ndata: Once\n\n"
DONE = b"event: done\nid: 1690212293:0\ndata: {}\n\n"


@pytest.mark.anyio
async def test_each_event_is_relayed_before_the_next_arrives(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(SSE + b"set-cookie: a=b\r\nreplicate-edge: x\r\n\r\n")
        connection.send(chunk(FIRST))
        if upstream.go_on.wait(5):
            connection.send(chunk(DONE) + b"0\r\n\r\n")
        connection.wait_closed()

    upstream.script = script
    async with at(upstream) as (made, path):
        with anyio.fail_after(5):
            response = await opened(made, path, ((b"last-event-id", b"1690212291:7"),))
            assert response.status == 200
            assert response.headers == (
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"replicate-edge", b"x"),
            )
            body = aiter(response.body)
            assert await anext(body) == FIRST
            upstream.go_on.set()
            assert b"".join([part async for part in body]) == DONE
        await response.aclose()
    [received] = upstream.requests
    assert received.line == b"GET /v1/files/opaque?a=b HTTP/1.1"
    assert received.headers == [
        (b"host", f"127.0.0.1:{upstream.port}".encode()),
        (b"accept", b"text/event-stream"),
        (b"accept-encoding", b"identity"),
        (b"last-event-id", b"1690212291:7"),
    ]


@pytest.mark.anyio
async def test_the_callers_credentials_do_not_go_up(upstream: RawUpstream) -> None:
    async with at(upstream) as (made, path):
        headers = ((b"authorization", b"Bearer pk-team-a"), (b"cookie", b"a=b"), (b"x-portkey-api-key", b"pk-team-a"))
        assert (await read(made, path, headers)).body == b"{}"
    assert [name for name, _ in upstream.requests[0].headers] == [b"host", b"accept", b"accept-encoding"]


@pytest.mark.anyio
async def test_a_caller_who_leaves_closes_the_stream(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(SSE + b"\r\n" + chunk(FIRST))
        connection.wait_closed()

    upstream.script = script
    async with at(upstream) as (made, path):
        response = await opened(made, path)
        assert await anext(aiter(response.body)) == FIRST
        await response.aclose()
        assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)


@pytest.mark.anyio
async def test_head_opens_the_stream_and_reads_nothing(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(SSE + b"\r\n")
        connection.wait_closed()

    upstream.script = script
    async with at(upstream) as (made, path):
        response = await opened(made, path, method="HEAD")
        assert response.is_event_stream
        await response.aclose()
        assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    assert upstream.requests[0].line.startswith(b"GET ")


@pytest.mark.anyio
@pytest.mark.parametrize("status", [b"204 No Content", b"404 Not Found", b"410 Gone", b"500 Internal Server Error"])
async def test_the_stream_hosts_own_answers_pass(upstream: RawUpstream, status: bytes) -> None:
    body = b"" if status.startswith(b"204") else b'{"detail": "no"}'

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(body, status=status, headers=b"retry-after: 3\r\n")

    upstream.script = script
    async with at(upstream) as (made, path):
        answer = await read(made, path)
    assert (answer.response.status, answer.body) == (int(status[:3]), body)
    assert (b"content-type", b"application/json") in answer.response.headers
    assert (b"retry-after", b"3") in answer.response.headers


@pytest.mark.anyio
@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"304 Not Modified", b"307 Temporary Redirect"])
async def test_redirects_are_not_followed(upstream: RawUpstream, status: bytes) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(b"", status=status, headers=b"location: /v1/elsewhere\r\n")
        connection.wait_closed()

    upstream.script = script
    async with at(upstream) as (made, path):
        with pytest.raises(UpstreamFailed, match="redirect") as raised:
            await read(made, path)
    assert raised.value.status == 502
    assert len(upstream.requests) == 1
    assert shows_nothing(raised.value, path, "opaque")


def _drops(connection: Connection) -> None:
    connection.request()


def _silent(connection: Connection) -> None:
    connection.request()
    connection.wait_closed()


def _garbage(connection: Connection) -> None:
    connection.request()
    connection.send(b"SSH-2.0-OpenSSH\r\n\r\n")


def _switches(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
    connection.wait_closed()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("script", "error"),
    [(_drops, UpstreamFailed), (_silent, UpstreamTimeout), (_garbage, UpstreamFailed), (_switches, UpstreamFailed)],
)
async def test_a_failure_before_the_answer(
    upstream: RawUpstream, script: Callable[[Connection], None], error: type[ProxyError], caplog: Any
) -> None:
    upstream.script = script
    with caplog.at_level(logging.DEBUG):
        async with at(upstream, silence=0.2) as (made, path):
            with pytest.raises(error) as raised:
                await read(made, path)
    assert len(upstream.requests) == 1
    assert raised.value.__context__ is None
    assert shows_nothing(raised.value, path, "opaque")
    assert "opaque" not in caplog.text
    assert path not in caplog.text


@pytest.mark.anyio
async def test_a_stream_host_that_is_not_there() -> None:
    with RawUpstream() as gone:
        host = f"127.0.0.1:{gone.port}"
    transport = PooledTransport(origin=None, max_connections=1)
    made = endpoint(transport.handle_async_request, hosts=[host])
    path = signed(made, f"http://{host}/opaque")
    with pytest.raises(UpstreamUnreachable) as raised:
        await read(made, path)
    await transport.aclose()
    assert shows_nothing(raised.value, path, "opaque")


@pytest.mark.anyio
async def test_the_wait_for_a_connection(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nda")
        connection.wait_closed()

    upstream.script = script
    async with at(upstream, slots=1) as (made, path):
        held = await opened(made, path)
        with pytest.raises(Overloaded):
            await read(made, path)
        await held.aclose()


@pytest.mark.anyio
async def test_what_the_way_up_raises_for_the_caller_passes_without_its_traceback() -> None:
    async def send(request: httpx.Request) -> httpx.Response:
        try:
            raise OSError(str(request.url))
        except OSError:
            raise LimitExceeded("Too many streams.", retry_after=3)  # noqa: B904 - as the transport of a host may

    made = endpoint(send)
    with pytest.raises(LimitExceeded, match="Too many streams") as raised:
        await opened(made, signed(made))
    assert shows_nothing(raised.value, signed(made), URL)


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "headers"), [(200, [(b"etag", b"a\r\nb: c")]), (101, []), (999, [])])
async def test_an_answer_that_a_transport_should_not_have_given(status: int, headers: Any) -> None:
    closed = []

    class Stream(httpx.AsyncByteStream):
        async def aclose(self) -> None:
            closed.append(True)

        def __aiter__(self) -> AsyncIterator[bytes]:
            return Arriving([])

    async def send(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=headers, stream=Stream())

    made = endpoint(send)
    with pytest.raises(UpstreamFailed) as raised:
        await opened(made, signed(made))
    assert closed
    assert shows_nothing(raised.value, signed(made), URL)


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(SSE + b"\r\n" + chunk(FIRST))


def _reset(connection: Connection) -> None:
    _cut(connection)
    time.sleep(0.05)
    connection.reset()


def _stalls(connection: Connection) -> None:
    _cut(connection)
    connection.wait_closed()


@pytest.mark.anyio
@pytest.mark.parametrize("script", [_cut, _reset, _stalls])
async def test_a_cut_stream_is_cut_for_the_caller_too(
    upstream: RawUpstream, script: Callable[[Connection], None], caplog: Any
) -> None:
    upstream.script = script
    with caplog.at_level(logging.DEBUG):
        async with at(upstream, silence=0.2) as (made, path):
            response = await opened(made, path)
            body = aiter(response.body)
            assert await anext(body) == FIRST
            with pytest.raises(UpstreamAborted) as raised:
                await anext(body)
            await response.aclose()
    assert shows_nothing(raised.value, path, "opaque")
    assert "opaque" not in caplog.text


@pytest.mark.anyio
async def test_a_compressed_stream_passes_as_it_came(upstream: RawUpstream) -> None:
    content = gzip.compress(FIRST)

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(SSE + b"content-encoding: gzip\r\n\r\n" + chunk(content) + b"0\r\n\r\n")

    upstream.script = script
    async with at(upstream) as (made, path):
        answer = await read(made, path)
    assert answer.body == content
    assert (b"content-encoding", b"gzip") in answer.response.headers


@pytest.mark.anyio
async def test_a_prediction_of_replicate_to_its_end_and_from_its_middle(fake_replicate: FakeReplicate) -> None:
    def create() -> str:
        with httpx.Client(verify=False) as client:
            created = client.post(
                f"{fake_replicate.url}/models/meta/meta-llama-3-8b-instruct/predictions",
                headers={"authorization": f"Bearer {fake_replicate.token}"},
                json={"input": {"prompt": "Say hello"}},
            )
        return str(created.json()["urls"]["stream"])

    url = await anyio.to_thread.run_sync(create)
    assert url.startswith(fake_replicate.streams_url + "/")
    transport = PooledTransport(origin=None, max_connections=10)
    made = endpoint(transport.handle_async_request, hosts=[fake_replicate.streams_url.removeprefix("http://")])
    with anyio.fail_after(15):
        path = signed(made, url)
        whole = await read(made, path, ((b"authorization", b"Bearer pk-team-a"), (b"accept", b"text/event-stream")))
        events = whole.body.split(b"\n\n")[:-1]
        last = events[1].split(b"\n")[1].removeprefix(b"id: ")
        rest = await read(made, path, ((b"last-event-id", last),))
        gone = await read(made, signed(made, url + "x"))
    await transport.aclose()
    assert whole.response.is_event_stream
    assert events[0].startswith(b"event: output\n")
    assert events[-1].startswith(b"event: done\n")
    assert len(events) > 4
    assert rest.body.split(b"\n\n")[:-1] == events[2:]
    assert gone.response.status == 404
    for request in fake_replicate.stream_requests:
        assert {name for name, _ in request.headers} <= {b"host", b"accept", b"accept-encoding", b"last-event-id"}
