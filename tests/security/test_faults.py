"""What goes wrong between us and Replicate, what the caller is told of it, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw.errors import UpstreamAborted
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.refusals import told
from tests.security.rows import row
from tests.telemetry.scenarios import Recorded, of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]

CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _says(*pieces: bytes, then: str = "close") -> Callable[[Connection], None]:
    """Reads a request and answers with these bytes."""

    def script(connection: Connection) -> None:
        connection.request()
        for piece in pieces:
            connection.send(piece)
        if then == "reset":
            connection.reset()
        elif then == "hold":
            connection.wait_closed()

    return script


def _create() -> dict[str, Any]:
    return http_scope("POST", "/v1/predictions")


async def _cut(app: Any, scope: dict[str, Any]) -> tuple[Caller, bool]:
    """The caller, and whether its answer was cut, by an exception that has the server drop the connection."""
    caller, cut = Caller(), False
    with anyio.move_on_after(2):
        try:
            await caller.call(app, scope)
        except UpstreamAborted:
            cut = True
    await app.aclose()
    return caller, cut


@row("3.connect")
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_who_cannot_be_reached_was_sent_nothing(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, method: str
) -> None:
    with RawUpstream() as gone:
        url = gone.url
    caller = await call(proxy(url, tracer_provider=tracer_provider), http_scope(method, "/v1/predictions"))
    assert told(caller) == (502, "upstream_unreachable")
    spans = Recorded(exporter)
    assert of(spans.attempt, "error.type") == of(spans.request, "error.type") == ["upstream_unreachable"]


@row("3.connect")
@pytest.mark.parametrize(
    ("speaks", "answer"), [(True, (502, "upstream_unreachable")), (False, (504, "upstream_timeout"))]
)
async def test_without_tls_nothing_is_sent(upstream: RawUpstream, speaks: bool, answer: tuple[int, str]) -> None:
    heard: list[bytes] = []

    def script(connection: Connection) -> None:
        connection._more()
        if speaks:
            connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.wait_closed()
        heard.append(connection.buffer)

    upstream.script = script
    options = {"connect_timeout": 5.0 if speaks else 0.3}
    app, caller = proxy(f"https://127.0.0.1:{upstream.port}/v1", options=options), Caller()
    with anyio.move_on_after(3):
        await caller.call(app, _create())
    assert told(caller) == answer
    await app.aclose()
    await anyio.to_thread.run_sync(upstream.all_closed, 1)
    assert len(upstream.closed_at) == 1
    assert TOKEN.encode() not in b"".join(heard)


@row("3.pool")
async def test_who_waits_too_long_for_a_connection_was_sent_nothing(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.upstream.ready.set()
            connection.upstream.go_on.wait(5)
            connection.answer()

    upstream.script = script
    app = proxy(upstream.url, options={"max_connections": 1, "connection_wait": 0.2})
    held, late, last = Caller(), Caller(), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(held.call, app, http_scope())
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        with anyio.move_on_after(2):
            await late.call(app, _create())
        upstream.go_on.set()
    assert told(late) == (503, "overloaded")
    assert late.header(b"retry-after") == [b"1"]
    # The one who gave up is waited for by nobody.
    await last.call(app, http_scope())
    await app.aclose()
    assert (held.status, last.status) == (200, 200)
    assert len(upstream.requests) == 2


@row("3.reset")
@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("pooled", [False, True])
async def test_a_connection_lost_before_an_answer(upstream: RawUpstream, then: str, pooled: bool) -> None:
    def script(connection: Connection) -> None:
        if pooled:
            connection.request()
            connection.answer()
        _says(then=then)(connection)

    upstream.script = script
    app = proxy(upstream.url)
    if pooled:
        await Caller().call(app, http_scope())
    caller = await call(app, _create())
    assert told(caller) == (502, "upstream_failed")
    assert caller.header(b"x-should-retry") == [b"false"]
    assert [received.line for received in upstream.requests[pooled:]] == [b"POST /v1/predictions HTTP/1.1"]


@row("3.write")
async def test_an_upload_that_is_cut_short_is_a_failure(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.reset()

    upstream.script = script
    caller = Caller([bytes(1 << 16)] * 256)
    app = proxy(upstream.url)
    await caller.call(app, http_scope("POST", "/v1/files"))
    await app.aclose()
    assert told(caller) == (502, "upstream_failed")
    assert len(upstream.connections) == 1


@row("3.write")
async def test_an_answer_that_comes_before_the_upload_s_end_is_relayed(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.answer(b'{"detail":"too large"}', status=b"413 Content Too Large")
        # Who has answered reads no more.
        connection.upstream.go_on.wait(5)

    upstream.script = script
    caller = Caller([bytes(1 << 16)] * 512)
    app = proxy(upstream.url, options={"write_timeout": 0.3})
    await caller.call(app, http_scope("POST", "/v1/files"))
    await app.aclose()
    assert (caller.status, caller.content) == (413, b'{"detail":"too large"}')
    assert upstream.requests == []


@row("3.head")
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-ty",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 9xx What\r\n\r\n",
        b"HTTP/1.1 999 What\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\netag: a\0b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\ncontent-length: 2\r\n\r\n{}",
    ],
    ids=["cut", "not-http", "status", "999", "no-colon", "two-lengths", "negative", "nul", "101", "large"],
)
async def test_a_head_that_is_none(upstream: RawUpstream, answer: bytes) -> None:
    upstream.script = _says(answer)
    assert told(await call(proxy(upstream.url), _create())) == (502, "upstream_failed")
    assert len(upstream.requests) == 1


@row("3.silence")
async def test_who_never_answers(upstream: RawUpstream, tracer_provider: TracerProvider) -> None:
    upstream.script = _says(then="hold")
    app = proxy(upstream.url, options={"read_timeout": 0.3}, tracer_provider=tracer_provider)
    caller = Caller()
    with anyio.move_on_after(3):
        await caller.call(app, _create())
    assert told(caller) == (504, "upstream_timeout")
    assert caller.header(b"x-should-retry") == [b"false"]
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert len(upstream.requests) == 1
    await app.aclose()


@row("3.cut")
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"3\r\nabc\r\nzz\r\n",
        CHUNKED + b"3\r\nabc\r\n-1\r\n",
    ],
    ids=["length", "chunks", "size", "negative"],
)
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_body_that_is_cut_is_not_ended(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    answer: bytes,
    then: str,
) -> None:
    upstream.script = _says(answer, then=then)
    caller, cut = await _cut(proxy(upstream.url, tracer_provider=tracer_provider), http_scope())
    # A reset may overtake what was sent before it.
    if then == "close" or caller.status == 200:
        assert (caller.status, cut, caller.complete) == (200, True, False)
        assert b"abc".startswith(caller.content)
        assert of(Recorded(exporter).request, "error.type") == ["upstream_aborted"]
    else:
        assert told(caller) == (502, "upstream_failed")


@row("3.cut")
async def test_a_create_s_answer_that_is_cut_is_a_failure_that_can_be_told(upstream: RawUpstream) -> None:
    upstream.script = _says(b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
    caller, cut = await _cut(proxy(upstream.url), _create())
    assert (told(caller), cut) == ((502, "upstream_failed"), False)


@row("3.stall")
async def test_a_body_that_stalls_is_cut(upstream: RawUpstream) -> None:
    upstream.script = _says(CHUNKED + b"3\r\nabc\r\n", then="hold")
    caller, cut = await _cut(proxy(upstream.url, options={"read_timeout": 0.6}), http_scope())
    assert (caller.status, caller.content, cut, caller.complete) == (200, b"abc", True, False)
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)


@row("3.trickle")
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_each_piece_of_a_stream_is_relayed_at_once(upstream: RawUpstream, method: str) -> None:
    turn = anyio.Semaphore(0)

    class Reading(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            turn.release()

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(CHUNKED)
        for piece in (b"data: 1\n\n", b"data: 2\n\n"):
            connection.upstream.go_on.wait(5)
            connection.upstream.go_on.clear()
            connection.send(b"9\r\n%b\r\n" % piece)
        connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app, caller = proxy(upstream.url), Reading()
    seen: list[bytes] = []
    with anyio.move_on_after(8):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, app, http_scope(method, "/v1/predictions"))
            # The next piece is not sent before the last one is there.
            for _ in range(3):
                with anyio.move_on_after(2):
                    await turn.acquire()
                seen.append(caller.content)
                upstream.go_on.set()
    await app.aclose()
    assert seen == [b"", b"data: 1\n\n", b"data: 1\n\ndata: 2\n\n"]
    assert caller.complete


@row("3.interim")
async def test_interim_answers_are_for_nobody_and_have_an_end(upstream: RawUpstream) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n"
    upstream.script = _says(interim * 3 + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
    caller = await call(proxy(upstream.url), http_scope())
    assert (caller.status, caller.header(b"link"), caller.content) == (200, [], b"{}")
    upstream.script = _says(interim * 50 + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", then="hold")
    assert told(await call(proxy(upstream.url), _create())) == (502, "upstream_failed")
    assert len(upstream.requests) == 2


@row("3.gzip")
@pytest.mark.parametrize("target", ["/v1/x", "/v1/predictions", "/v1/predictions/p1"])
async def test_a_corrupt_encoding_is_relayed_as_it_is(
    upstream: RawUpstream, tracer_provider: TracerProvider, target: str
) -> None:
    corrupt = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff no deflate"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
    upstream.script = _says(head % len(corrupt) + corrupt)
    caller = await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope(target=target))
    assert (caller.status, caller.content, caller.header(b"content-encoding")) == (200, corrupt, [b"gzip"])


@row("3.status")
@pytest.mark.parametrize("status", [b"402 Payment Required", b"422 No", b"429 Too Many", b"500 Error", b"503 Busy"])
async def test_replicate_s_own_errors_are_relayed(upstream: RawUpstream, status: bytes) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b'{"detail":"as it is"}', status=status, headers=b"retry-after: 7\r\n")

    upstream.script = script
    app = proxy(upstream.url)
    for _ in range(2):
        caller = Caller()
        await caller.call(app, _create())
        assert (caller.status, caller.content) == (int(status[:3]), b'{"detail":"as it is"}')
        assert caller.header(b"retry-after") == [b"7"]
    await app.aclose()
    # Its connection is kept: nothing is wrong with it.
    assert (len(upstream.requests), len(upstream.connections)) == (2, 1)


@row("3.resolver")
@pytest.mark.parametrize("what", ["hangs", "fails", "lies", "breaks"])
async def test_a_resolver_that_does_not_answer_lets_nobody_in(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    ended = anyio.Event()

    async def resolver(request: object) -> Any:
        if what == "fails":
            raise LookupError(f"no row for {TOKEN}")
        if what == "lies":
            return 42
        if what == "breaks":
            return f"{TOKEN}\r\nx: y"
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    app = proxy(upstream.url, key_resolver=resolver, options={"resolver_timeout": 0.2})
    caller = Caller()
    with anyio.move_on_after(3):
        await caller.call(app, _create())
    await app.aclose()
    assert told(caller) == (503, "resolver_failed")
    assert caller.header(b"retry-after") == [b"1"]
    assert upstream.connections == []
    assert TOKEN not in caplog.text
    assert ended.is_set() == (what == "hangs")


def _failures(upstream: RawUpstream) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Requests that we answer ourselves, of each kind."""
    yield proxy(upstream.url), http_scope(headers=[])
    yield proxy(upstream.url), http_scope(headers=[(KEY[0], b"pk-stranger")])
    yield proxy(upstream.url), http_scope("TRACE")
    yield proxy(upstream.url), http_scope(target="/v1/../x")
    yield proxy(upstream.url), http_scope(headers=[KEY, (b"x-portkey-config", b"{")])
    yield proxy(upstream.url), _create()
    yield proxy("http://127.0.0.1:1/v1"), _create()

    async def resolver(request: object) -> str:
        raise LookupError("db-3.internal")

    yield proxy(upstream.url, key_resolver=resolver), _create()

    def layer(forward: Any) -> Any:
        async def failing(request: Any) -> Any:
            raise LookupError("db-3.internal")

        return failing

    yield proxy(upstream.url, layers=[layer]), _create()


@row("3.errors")
async def test_our_own_answers_are_short_and_tell_no_names(upstream: RawUpstream) -> None:
    upstream.script = _says(b"upstream.internal says no\r\n\r\n")
    statuses = []
    for app, scope in _failures(upstream):
        caller = await call(app, scope)
        content = json.loads(caller.content)
        statuses.append(caller.status)
        assert caller.header(b"content-type") == [b"application/json"]
        assert b"no-store" in caller.header(b"cache-control")[0]
        assert caller.header(b"x-request-id") == [content["request_id"].encode()]
        assert content["error"]["code"]
        assert content["status"] == caller.status
        assert len(caller.content) <= 1024
        for name in (b"internal says", b"db-3", b"127.0.0.1", b"Error:", b"LookupError", b"Exception"):
            assert name not in caller.content
    assert statuses == [401, 401, 405, 400, 400, 502, 502, 503, 500]
