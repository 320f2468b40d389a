from __future__ import annotations

import gzip
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from replicate_proxy_mw import Forward, ProxyRequest, ProxyResponse
from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.store import MemoryPredictionStore
from replicate_proxy_mw.telemetry import story
from replicate_proxy_mw.telemetry.attempt import MAX_SIZE
from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry.scenarios import STREAM_KEY, Recorded, labels, of, stream_of
from tests.tenants import answers, sends

pytestmark = pytest.mark.anyio


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Recorded:
    return Recorded(exporter)


async def test_nothing_reached(tracer_provider: TracerProvider, spans: Recorded) -> None:
    with RawUpstream() as gone:
        url = gone.url
    await call(proxy(url, tracer_provider=tracer_provider), http_scope("POST"))
    assert spans.request.status.status_code is spans.attempt.status.status_code is StatusCode.ERROR
    assert of(spans.request, "replicate_proxy.outcome", "error.type") == ["upstream_error", "upstream_unreachable"]
    assert of(spans.attempt, "error.type", "http.response.status_code") == ["upstream_unreachable", None]


@pytest.mark.parametrize(
    ("status", "request_status", "request_error"),
    [(b"404 Not Found", StatusCode.UNSET, None), (b"503 Unavailable", StatusCode.ERROR, "503")],
)
async def test_what_replicate_refuses(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    spans: Recorded,
    status: bytes,
    request_status: StatusCode,
    request_error: str | None,
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(status=status)

    upstream.script = script
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope())
    assert spans.request.status.status_code is request_status
    assert of(spans.request, "error.type", "replicate_proxy.outcome") == [request_error, "forwarded"]
    assert spans.attempt.status.status_code is StatusCode.ERROR
    assert of(spans.attempt, "error.type") == [status[:3].decode()]


async def test_a_cut_answer(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")

    upstream.script = script
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    with pytest.raises(UpstreamAborted):
        await Caller().call(app, http_scope())
    await app.aclose()
    for span in (spans.request, spans.attempt):
        assert span.status.status_code is StatusCode.ERROR
        found = of(span, "error.type", "http.response.status_code", "http.response.body.size")
        assert found == ["upstream_aborted", 200, 3]
    assert of(spans.request, "replicate_proxy.outcome") == ["upstream_error"]


async def test_a_second_attempt_says_so(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def layer(forward: Forward) -> Forward:
        async def twice(request: ProxyRequest) -> ProxyResponse:
            await (await forward(request)).aclose()
            return await forward(replace(request, resend_count=1))

        return twice

    await call(proxy(upstream.url, layers=[layer], tracer_provider=tracer_provider), http_scope())
    attempts = [span for span in spans.all if span.kind is SpanKind.CLIENT]
    assert [of(span, "http.request.resend_count") for span in attempts] == [[None], [1]]


async def test_the_span_of_the_attempt_is_current_while_it_is_sent(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    current = []

    class Looking(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.inner = httpx.AsyncHTTPTransport()

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            current.append(trace.get_current_span().get_span_context())
            return await self.inner.handle_async_request(request)

    transport = Looking()
    await call(proxy(upstream.url, transport=transport, tracer_provider=tracer_provider), http_scope())
    await transport.inner.aclose()
    assert current == [spans.attempt.context]


async def test_what_is_sent_and_received_is_counted(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(b"12345")
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    await call(app, http_scope("POST", "/v1/files"), b"abc", b"d", b"")
    assert of(spans.attempt, "http.request.body.size", "http.response.body.size") == [4, 5]
    assert upstream.requests[0].body.count(b"abc") == 1


@pytest.mark.parametrize("body", [[b"abc"], [b"abc", b"d"]])
async def test_nothing_was_sent_where_nothing_was_reached(
    tracer_provider: TracerProvider, spans: Recorded, body: list[bytes]
) -> None:
    with RawUpstream() as gone:
        url = gone.url
    await call(proxy(url, tracer_provider=tracer_provider), http_scope("POST", "/v1/files"), *body)
    assert of(spans.attempt, "http.request.body.size", "error.type") == [0, "upstream_unreachable"]


CREATED = b'{"id": "p1", "status": "processing", "model": "a/b", "output": "%s"}'
FOUND = ("gen_ai.response.id", "gen_ai.response.status", "gen_ai.response.model")


@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_what_an_answer_tells(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, coding: str
) -> None:
    body, header = CREATED % b"x", b""
    if coding == "gzip":
        body, header = gzip.compress(body), b"content-encoding: gzip\r\n"
    upstream.script = answers(body, status=b"201 Created", headers=header)
    scope = http_scope("POST", "/v1/predictions", [KEY, (b"accept-encoding", b"gzip")])
    await call(proxy(upstream.url, tracer_provider=tracer_provider), scope)
    assert of(spans.attempt, *FOUND) == ["p1", "in_progress", "a/b"]


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/v1/predictions", CREATED % (b"x" * MAX_SIZE)),
        ("POST", "/v1/predictions", b"[]"),
        ("POST", "/v1/predictions", b'{"id": "p1"}'),
        ("GET", "/v1/predictions", CREATED % b"x"),
        ("GET", "/v1/files/p1", CREATED % b"x"),
        ("GET", "/v1/unknown", CREATED % b"x"),
    ],
)
async def test_what_is_no_prediction(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, method: str, target: str, body: bytes
) -> None:
    upstream.script = answers(body)
    store = MemoryPredictionStore()
    app = proxy(upstream.url, tracer_provider=tracer_provider, store=store)
    await call(app, http_scope(method, target))
    assert of(spans.attempt, *FOUND) == [None, None, None]
    assert (len(spans.all), len(store)) == (2, 0)


async def test_bombs_are_not_unpacked(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    body = gzip.compress(CREATED % (b"x" * MAX_SIZE))
    upstream.script = answers(body, headers=b"content-encoding: gzip\r\n")
    scope = http_scope("POST", "/v1/predictions", [KEY, (b"accept-encoding", b"gzip")])
    await call(proxy(upstream.url, tracer_provider=tracer_provider), scope)
    assert of(spans.attempt, *FOUND) == [None, None, None]


async def test_an_answer_about_another_prediction(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(CREATED % b"x")
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope(target="/v1/predictions/p2"))
    assert of(spans.attempt, *FOUND) == ["p2", None, None]
    assert len(spans.all) == 2


@dataclass
class Streaming:
    """A proxy that has passed on the URL of a stream of `upstream`, which answers as it is told to."""

    app: Any
    target: str

    async def read(self) -> Caller:
        try:
            return await Caller().call(self.app, http_scope(target=self.target))
        finally:
            await self.app.aclose()


async def _streaming(upstream: RawUpstream, answer: bytes, *, id: str = "p1", **keywords: Any) -> Streaming:
    host = f"127.0.0.1:{upstream.port}"
    created = json.dumps({"id": id, "status": "starting", "urls": {"stream": f"http://{host}/s"}}).encode()
    options = {"proxy_streams": True, "stream_key": STREAM_KEY, "stream_hosts": [host]}
    app = proxy(upstream.url, options=options, **keywords)
    upstream.script = answers(created, status=b"201 Created")
    target = stream_of(await call(app, http_scope("POST", "/v1/predictions")))
    upstream.script = sends(answer)
    return Streaming(app, target)


EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%s\r\n"
SEEN = (
    "replicate_proxy.stream.events",
    "replicate_proxy.stream.complete",
    "gen_ai.response.id",
    "error.type",
    "http.response.body.size",
)


@pytest.mark.parametrize(
    ("answer", "seen", "has_data"),
    [
        (b"event: output\nid: 1\ndata: a\n\nevent: done\ndata: {}\n\n", [2, True, "p1", None, 51], True),
        (b"event: output\ndata: a\n\n", [1, False, "p1", None, 23], True),
        (b": hi\n\nid: 1\n\n", [1, False, "p1", None, 13], False),
    ],
)
async def test_a_stream(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    spans: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
    seen: list[Any],
    has_data: bool,
) -> None:
    monkeypatch.setattr(story, "GRACE", 0.0)
    length = b"content-length: %d\r\n" % len(answer)
    streaming = await _streaming(upstream, EVENT_STREAM % length + answer, tracer_provider=tracer_provider)
    assert (await streaming.read()).content == answer
    [attempt] = [span for span in spans.unchecked if span.name == "GET"]
    assert of(attempt, *SEEN) == seen
    assert (of(attempt, "gen_ai.response.time_to_first_chunk") != [None]) is has_data
    assert attempt.status.status_code is StatusCode.UNSET


async def test_a_stream_that_is_cut(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    answer = EVENT_STREAM % b"content-length: 99\r\n" + b"event: output\ndata: a\n\n"
    streaming = await _streaming(upstream, answer, tracer_provider=tracer_provider)
    with pytest.raises(UpstreamAborted):
        await streaming.read()
    [attempt] = [span for span in spans.unchecked if span.name == "GET"]
    assert of(attempt, *SEEN) == [1, False, "p1", "upstream_aborted", 23]
    assert attempt.status.status_code is StatusCode.ERROR


async def test_a_stream_that_is_not_there(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"
    streaming = await _streaming(upstream, answer, tracer_provider=tracer_provider)
    assert (await streaming.read()).status == 404
    [attempt] = [span for span in spans.unchecked if span.name == "GET"]
    assert of(attempt, *SEEN) == [None, None, "p1", "404", 2]


async def test_a_stream_of_an_unknown_prediction_tells_no_end(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    done = b"event: done\ndata: {}\n\n"
    answer = EVENT_STREAM % (b"content-length: %d\r\n" % len(done)) + done
    streaming = await _streaming(upstream, answer, id="no id of Replicate's", tracer_provider=tracer_provider)
    await streaming.read()
    [attempt] = [span for span in spans.unchecked if span.name == "GET"]
    assert of(attempt, *SEEN) == [1, True, None, None, len(done)]
    assert [span.name for span in spans.unchecked if span.name.startswith("generate")] == []


@pytest.mark.parametrize("observed", [True, False])
async def test_other_instrumentations_are_quiet_while_it_is_sent(
    upstream: RawUpstream, tracer_provider: TracerProvider, observed: bool
) -> None:
    enabled = []

    class Looking(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.inner = httpx.AsyncHTTPTransport()

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            enabled.append(is_http_instrumentation_enabled())
            return await self.inner.handle_async_request(request)

    transport = Looking()
    provider: dict[str, Any] = {"tracer_provider": tracer_provider} if observed else {}
    await call(proxy(upstream.url, transport=transport, **provider), http_scope())
    await transport.inner.aclose()
    assert enabled == [False]
    assert is_http_instrumentation_enabled()


async def test_an_answer_that_is_dropped_ends_its_attempt(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def layer(forward: Forward) -> Forward:
        async def dropping(request: ProxyRequest) -> ProxyResponse:
            await forward(request)
            return ProxyResponse.json(200, {})

        return dropping

    await call(
        proxy(upstream.url, layers=[layer], tracer_provider=tracer_provider), http_scope(target="/v1/predictions/p1")
    )
    assert spans.attempt.status.status_code is StatusCode.UNSET
    assert of(spans.attempt, "http.response.body.size", "gen_ai.response.id") == [2, "p1"]


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


async def test_what_is_counted_of_attempts(upstream: RawUpstream, reader: InMemoryMetricReader) -> None:
    app = proxy(upstream.url, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    for body in (CREATED % b"x", b"{}"):
        upstream.script = answers(body, status=b"201 Created")
        await call(app, http_scope("POST", "/v1/predictions"))
    upstream.script = answers(b"{}", status=b"402 Payment Required")
    await call(app, http_scope("POST", "/v1/predictions"))
    upstream.script = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    with pytest.raises(UpstreamAborted):
        await call(app, http_scope("BREW"))
    of_create = {"http.request.method": "POST", "url.template": "/v1/predictions", "server.address": "127.0.0.1"}
    assert labels(reader, "http.client.request.duration") == [
        {**of_create, "http.response.status_code": 201},
        {**of_create, "http.response.status_code": 402, "error.type": "402"},
        {
            "http.request.method": "_OTHER",
            "url.template": "/v1/{path}",
            "server.address": "127.0.0.1",
            "http.response.status_code": 200,
            "error.type": "upstream_aborted",
        },
    ]
    of_gen_ai = {"gen_ai.operation.name": "create_prediction", "gen_ai.provider.name": "replicate"}
    assert labels(reader, "gen_ai.client.operation.duration") == [
        {**of_gen_ai, "gen_ai.response.model": "a/b"},
        of_gen_ai,
        {**of_gen_ai, "error.type": "402"},
    ]


async def test_why_there_was_another_attempt(upstream: RawUpstream, reader: InMemoryMetricReader) -> None:
    def layer(forward: Forward) -> Forward:
        async def twice(request: ProxyRequest) -> ProxyResponse:
            await (await forward(request)).aclose()
            return await forward(replace(request, resend_count=1))

        return twice

    app = proxy(upstream.url, layers=[layer], meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    await call(app, http_scope())
    upstream.script = answers(b"", status=b"503 Unavailable")
    await call(app, http_scope())
    found = labels(reader, "replicate_proxy.upstream.retries")
    assert found == [{"replicate_proxy.retry.reason": reason} for reason in ("_OTHER", "503")]


async def test_what_is_counted_where_there_is_no_answer_and_no_path(
    upstream: RawUpstream, reader: InMemoryMetricReader
) -> None:
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"
    await (await _streaming(upstream, answer, meter_provider=meter_provider)).read()
    with RawUpstream() as gone:
        url = gone.url
    await call(proxy(url, meter_provider=meter_provider), http_scope())
    _, stream, unreachable = labels(reader, "http.client.request.duration")
    assert stream == {
        "http.request.method": "GET",
        "server.address": "127.0.0.1",
        "http.response.status_code": 404,
        "error.type": "404",
    }
    assert unreachable == {
        "http.request.method": "GET",
        "url.template": "/v1/{path}",
        "server.address": "127.0.0.1",
        "error.type": "upstream_unreachable",
    }


@pytest.mark.parametrize("traced", [True, False])
async def test_replicate_is_told_its_traceparent_if_that_is_wanted(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    reader: InMemoryMetricReader,
    spans: Recorded,
    traced: bool,
) -> None:
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    more: dict[str, Any] = {"tracer_provider": tracer_provider} if traced else {}
    app = proxy(upstream.url, meter_provider=meter_provider, options={"propagate_upstream": True}, **more)
    await call(app, http_scope())
    told = upstream.requests[0].header(b"traceparent")
    if traced:
        own = spans.attempt.context
        assert own is not None
        assert told == [f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}".encode()]
    else:
        assert told == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 422 X\r\ncontent-length: 40\r\n\r\n" + b'{"id": "p1", "status": "failed"}'.ljust(40),
        b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n" + b'{"id": "p1", "status": "failed"}'.ljust(40),
    ],
)
async def test_what_is_no_whole_answer_shows_no_prediction(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, answer: bytes
) -> None:
    upstream.script = sends(answer)
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    with suppress(UpstreamAborted):
        await Caller().call(app, http_scope("GET", "/v1/predictions/p1"))
    await app.aclose()
    assert of(spans.attempt, "gen_ai.response.status") == [None]
    assert of(spans.request, "replicate.prediction.status") == [None]
