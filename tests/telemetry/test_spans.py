from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from replicate_proxy_mw import Forward, ProxyRequest, ProxyResponse
from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.telemetry import names
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = (b"traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01".encode())


class Recorded:
    """The spans of one test, by kind."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> list[ReadableSpan]:
        spans = list(self._exporter.get_finished_spans())
        for span in spans:
            assert span.attributes is not None
            assert [name for name in span.attributes if not names.known(name)] == []
            assert not span.events
            assert span.status.description is None
            assert "pk-team-a" not in span.to_json()
            assert TOKEN not in span.to_json()
        return spans

    def one(self, kind: SpanKind) -> ReadableSpan:
        [span] = [span for span in self.all if span.kind is kind]
        return span

    @property
    def request(self) -> ReadableSpan:
        return self.one(SpanKind.SERVER)

    @property
    def attempt(self) -> ReadableSpan:
        return self.one(SpanKind.CLIENT)


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Recorded:
    return Recorded(exporter)


def _of(span: ReadableSpan, *found: str) -> list[Any]:
    assert span.attributes is not None
    return [span.attributes.get(name) for name in found]


async def test_one_request_and_one_attempt(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    headers = [
        KEY,
        (b"x-portkey-trace-id", b"order-42"),
        (b"x-portkey-metadata", b'{"_user": "u1"}'),
        (b"x-portkey-provider", b"@team"),
        (b"user-agent", b"test/1"),
    ]
    scope = http_scope("POST", "/v1/models/meta/llama/predictions?a=b", headers)
    await call(proxy(upstream.url, tracer_provider=tracer_provider), scope, b'{"input":', b"{}}")
    request, attempt = spans.request, spans.attempt
    assert request.name == attempt.name == "POST /v1/models/{model_owner}/{model_name}/predictions"
    assert request.parent is None
    assert attempt.parent == request.context
    assert request.status.status_code is attempt.status.status_code is StatusCode.UNSET
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{model_owner}/{model_name}/predictions",
        "http.response.status_code": 200,
        "http.request.body.size": 12,
        "http.response.body.size": 2,
        "url.scheme": "http",
        "url.path": "/v1/models/meta/llama/predictions",
        "network.protocol.version": "1.1",
        "server.address": "proxy.test",
        "server.port": 80,
        "client.address": "192.0.2.1",
        "user_agent.original": "test/1",
        "replicate.operation": "models.predictions.create",
        "replicate_proxy.outcome": "forwarded",
        "replicate_proxy.tenant": "team-a",
        "portkey.trace_id": "order-42",
        "portkey.provider": "@team",
        "portkey.metadata._user": "u1",
        "portkey.metadata_json": '{"_user":"u1"}',
    }
    assert attempt.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.request.body.size": 12,
        "http.response.body.size": 2,
        "url.full": upstream.url + "/models/meta/llama/predictions?a=REDACTED",
        "url.template": "/v1/models/{model_owner}/{model_name}/predictions",
        "server.address": "127.0.0.1",
        "server.port": upstream.port,
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "create_prediction",
        "gen_ai.request.model": "meta/llama",
        "portkey.trace_id": "order-42",
        "portkey.metadata._user": "u1",
    }
    scope_of_spans = request.instrumentation_scope
    assert scope_of_spans is not None
    assert (scope_of_spans.name, scope_of_spans.schema_url) == ("replicate_proxy_mw", names.SCHEMA_URL)


@pytest.mark.parametrize(
    ("scope", "outcome", "status", "error_type"),
    [
        (http_scope(headers=[]), "auth_missing", 401, "key_missing"),
        (http_scope(headers=[(b"x-portkey-api-key", b"pk-nobody")]), "auth_invalid", 401, "key_unknown"),
        (http_scope(headers=[KEY, KEY]), "bad_request", 400, "bad_request"),
        (http_scope(target="/v1/../x"), "bad_request", 400, "bad_request"),
        (http_scope("TRACE"), "bad_request", 405, "method_not_allowed"),
    ],
)
async def test_a_refusal_leaves_one_span(
    tracer_provider: TracerProvider,
    spans: Recorded,
    scope: dict[str, Any],
    outcome: str,
    status: int,
    error_type: str,
) -> None:
    caller = await call(proxy("http://127.0.0.1:1", tracer_provider=tracer_provider), scope)
    assert len(spans.all) == 1
    assert spans.request.status.status_code is StatusCode.UNSET
    found = _of(spans.request, "replicate_proxy.outcome", "http.response.status_code", "error.type", "http.route")
    assert found == [outcome, status, error_type, "/v1/{path}"]
    context = spans.request.context
    assert context is not None
    assert caller.header(b"x-request-id") == [trace.format_trace_id(context.trace_id).encode()]


async def test_nothing_reached(tracer_provider: TracerProvider, spans: Recorded) -> None:
    with RawUpstream() as gone:
        url = gone.url
    await call(proxy(url, tracer_provider=tracer_provider), http_scope("POST"))
    assert spans.request.status.status_code is spans.attempt.status.status_code is StatusCode.ERROR
    assert _of(spans.request, "replicate_proxy.outcome", "error.type") == ["upstream_error", "upstream_unreachable"]
    assert _of(spans.attempt, "error.type", "http.response.status_code") == ["upstream_unreachable", None]


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
    assert _of(spans.request, "error.type", "replicate_proxy.outcome") == [request_error, "forwarded"]
    assert spans.attempt.status.status_code is StatusCode.ERROR
    assert _of(spans.attempt, "error.type") == [status[:3].decode()]


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
        found = _of(span, "error.type", "http.response.status_code", "http.response.body.size")
        assert found == ["upstream_aborted", 200, 3]
    assert _of(spans.request, "replicate_proxy.outcome") == ["upstream_error"]


async def test_a_span_lasts_until_the_last_byte(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope())
        await caller.got_chunk.wait()
        assert spans.all == []
        upstream.go_on.set()
    await app.aclose()
    assert len(spans.all) == 2


@pytest.mark.parametrize("first_byte", [True, False])
async def test_a_caller_who_leaves_is_no_error(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, first_byte: bool
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        if first_byte:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope())
        await anyio.to_thread.run_sync(upstream.ready.wait, 2)
        if first_byte:
            await caller.got_chunk.wait()
        caller.left.set()
    await app.aclose()
    for span in (spans.request, spans.attempt):
        assert span.status.status_code is StatusCode.UNSET
        assert _of(span, "error.type", "http.response.status_code") == [None, 200 if first_byte else None]
    assert _of(spans.request, "replicate_proxy.outcome") == ["client_disconnected"]


async def test_a_request_that_the_server_cancels(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    with anyio.move_on_after(0.2):
        await Caller().call(app, http_scope())
    await app.aclose()
    assert spans.request.status.status_code is StatusCode.ERROR
    assert _of(spans.request, "error.type", "replicate_proxy.outcome") == ["cancelled", "client_disconnected"]
    assert spans.attempt.status.status_code is StatusCode.UNSET


async def test_what_the_host_raises(tracer_provider: TracerProvider, spans: Recorded) -> None:
    async def receive() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await proxy("http://127.0.0.1:1", tracer_provider=tracer_provider)(http_scope(), receive, Caller().send)
    assert spans.request.status.status_code is StatusCode.ERROR
    assert _of(spans.request, "error.type", "replicate_proxy.outcome") == ["host_error", "bad_request"]


async def test_below_a_span_of_the_host_ours_is_internal(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    with tracer_provider.get_tracer("host").start_as_current_span("GET", kind=SpanKind.SERVER) as hosts:
        app = proxy(upstream.url, tracer_provider=tracer_provider)
        await call(app, http_scope(headers=[KEY, TRACEPARENT]))
    assert spans.one(SpanKind.INTERNAL).parent == hosts.get_span_context()
    assert spans.attempt.parent == spans.one(SpanKind.INTERNAL).context


@pytest.mark.parametrize(("trust", "parent", "links"), [("parent", True, 0), ("link", False, 1), ("ignore", False, 0)])
async def test_the_caller_s_own_trace(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    spans: Recorded,
    trust: str,
    parent: bool,
    links: int,
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider, options={"trust_traceparent": trust})
    await call(app, http_scope(headers=[KEY, TRACEPARENT, (b"tracestate", b"a=b")]))
    request = spans.request
    assert request.context is not None
    assert (request.parent is not None) is parent
    assert (trace.format_trace_id(request.context.trace_id) == TRACE_ID) is parent
    assert [trace.format_trace_id(link.context.trace_id) for link in request.links] == [TRACE_ID] * links
    assert upstream.requests[0].header(b"traceparent") == []


async def test_a_broken_traceparent_is_none(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    await call(app, http_scope(headers=[KEY, (b"traceparent", b"nonsense")]))
    assert spans.request.parent is None


async def test_a_layer_that_answers_by_itself_leaves_no_attempt(
    tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def layer(forward: Forward) -> Forward:
        async def answering(request: ProxyRequest) -> ProxyResponse:
            return ProxyResponse.json(200, {})

        return answering

    await call(proxy("http://127.0.0.1:1", layers=[layer], tracer_provider=tracer_provider), http_scope())
    assert len(spans.all) == 1
    assert _of(spans.request, "replicate_proxy.outcome") == ["answered"]


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
    assert [_of(span, "http.request.resend_count") for span in attempts] == [[None], [1]]


async def test_what_was_mended_is_told(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    scope = http_scope("POST", "/v1predictions", [KEY, (b"content-type", b"application/json")])
    await call(proxy(upstream.url, tracer_provider=tracer_provider), scope, b'{"data": {}}')
    told = ("replicate_proxy.request.unwrapped_data", "replicate_proxy.request.repaired_path", "replicate.operation")
    assert _of(spans.request, *told) == [True, True, "predictions.create"]


async def test_without_an_sdk_a_request_has_an_id_all_the_same(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)
    assert (await call(app, http_scope())).status == 200
    [request_id] = (await call(app, http_scope(headers=[]))).header(b"x-request-id")
    assert len(request_id) == 32


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


async def test_what_layers_note_stands_on_the_request_span(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    seen = []

    def layer(forward: Forward) -> Forward:
        async def noting(request: ProxyRequest) -> ProxyResponse:
            request.notes[names.STORE_FAILED] = True
            seen.append(request.traceparent)
            return await forward(replace(request, headers=()))

        return noting

    await call(proxy(upstream.url, tracer_provider=tracer_provider, layers=[layer]), http_scope())
    assert _of(spans.request, names.STORE_FAILED) == [True]
    assert _of(spans.attempt, names.STORE_FAILED) == [None]
    context = spans.request.context
    assert context is not None
    ids = f"{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}"
    assert seen == [f"00-{ids}-{context.trace_flags:02x}"]


async def test_without_a_trace_layers_are_told_of_none(upstream: RawUpstream) -> None:
    seen = []

    def layer(forward: Forward) -> Forward:
        async def noting(request: ProxyRequest) -> ProxyResponse:
            request.notes[names.STORE_FAILED] = True
            seen.append(request.traceparent)
            return await forward(request)

        return noting

    assert (await call(proxy(upstream.url, layers=[layer]), http_scope())).status == 200
    assert seen == [None]
