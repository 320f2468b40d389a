from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import anyio
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from replicate_proxy_mw import (
    Forward,
    MappingKeyResolver,
    PermissionDenied,
    PriceRequest,
    ProxyRequest,
    ProxyResponse,
    Rates,
    ReplicateKey,
)
from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.store import StoredPrediction
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.telemetry.request import current, named, traceparent
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry.scenarios import Recorded, labels, of
from tests.tenants import Switched, answers, sends

pytestmark = pytest.mark.anyio


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Recorded:
    return Recorded(exporter)


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
    found = of(spans.request, "replicate_proxy.outcome", "http.response.status_code", "error.type", "http.route")
    assert found == [outcome, status, error_type, "/v1/{path}"]
    context = spans.request.context
    assert context is not None
    assert caller.header(b"x-request-id") == [trace.format_trace_id(context.trace_id).encode()]


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
        assert of(span, "error.type", "http.response.status_code") == [None, 200 if first_byte else None]
    assert of(spans.request, "replicate_proxy.outcome") == ["client_disconnected"]


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
    assert of(spans.request, "error.type", "replicate_proxy.outcome") == ["cancelled", "client_disconnected"]
    assert spans.attempt.status.status_code is StatusCode.UNSET


async def test_what_the_host_raises(tracer_provider: TracerProvider, spans: Recorded) -> None:
    async def receive() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await proxy("http://127.0.0.1:1", tracer_provider=tracer_provider)(http_scope(), receive, Caller().send)
    assert spans.request.status.status_code is StatusCode.ERROR
    assert of(spans.request, "error.type", "replicate_proxy.outcome") == ["host_error", "bad_request"]


async def test_a_layer_that_answers_by_itself_leaves_no_attempt(
    tracer_provider: TracerProvider, spans: Recorded
) -> None:
    def layer(forward: Forward) -> Forward:
        async def answering(request: ProxyRequest) -> ProxyResponse:
            return ProxyResponse.json(200, {})

        return answering

    await call(proxy("http://127.0.0.1:1", layers=[layer], tracer_provider=tracer_provider), http_scope())
    assert len(spans.all) == 1
    assert of(spans.request, "replicate_proxy.outcome") == ["answered"]


async def test_what_was_mended_is_told(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    scope = http_scope("POST", "/v1predictions", [KEY, (b"content-type", b"application/json")])
    await call(proxy(upstream.url, tracer_provider=tracer_provider), scope, b'{"data": {}}')
    told = ("replicate_proxy.request.unwrapped_data", "replicate_proxy.request.repaired_path", "replicate.operation")
    assert of(spans.request, *told) == [True, True, "predictions.create"]


async def test_without_an_sdk_a_request_has_an_id_all_the_same(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)
    assert (await call(app, http_scope())).status == 200
    [request_id] = (await call(app, http_scope(headers=[]))).header(b"x-request-id")
    assert len(request_id) == 32


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
    assert of(spans.request, names.STORE_FAILED) == [True]
    assert of(spans.attempt, names.STORE_FAILED) == [None]
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


async def test_without_an_sdk_the_caller_s_trace_goes_on(upstream: RawUpstream) -> None:
    sent = f"00-{'a' * 32}-{'b' * 16}-01"
    seen = []

    def layer(forward: Forward) -> Forward:
        async def looking(request: ProxyRequest) -> ProxyResponse:
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier)
            seen.extend([request.traceparent, carrier["traceparent"]])
            raise PermissionDenied("no")

        return looking

    refused = await call(
        proxy(upstream.url, layers=[layer]), http_scope(headers=[KEY, (b"traceparent", sent.encode())])
    )
    assert refused.header(b"x-request-id") == [b"a" * 32]
    assert seen == [sent, sent]


async def test_what_a_layer_answers_with_5xx_is_an_error(tracer_provider: TracerProvider, spans: Recorded) -> None:
    def layer(forward: Forward) -> Forward:
        async def answering(request: ProxyRequest) -> ProxyResponse:
            return ProxyResponse.json(503, {})

        return answering

    await call(proxy("http://127.0.0.1:1", layers=[layer], tracer_provider=tracer_provider), http_scope())
    assert spans.request.status.status_code is StatusCode.ERROR
    assert of(spans.request, "replicate_proxy.outcome", "error.type") == ["answered", "503"]


async def test_a_path_that_is_a_secret_is_not_told(tracer_provider: TracerProvider, spans: Recorded) -> None:
    options = {"proxy_streams": True, "stream_key": "a-key-that-all-replicas-have-in-common"}
    app = proxy("http://127.0.0.1:1", tracer_provider=tracer_provider, options=options)
    await call(app, http_scope(target="/v1/-/streams/opaque"))
    found = ("url.path", "http.route", "error.type", "replicate_proxy.outcome")
    template = "/v1/-/streams/{token}"
    assert of(spans.request, *found) == [template, template, "stream_unknown", "denied"]
    assert "opaque" not in spans.request.to_json()


async def test_a_poll_of_what_is_not_there(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(b'{"id": "p1", "status": "succeeded"}', status=b"404 Not Found")
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope(target="/v1/predictions/p1"))
    found = ("replicate.prediction.id", "replicate.prediction.status", "http.response.status_code")
    assert of(spans.request, *found) == ["p1", None, 404]
    assert len(spans.all) == 2


async def test_what_was_created_stands_on_it(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(b'{"id": "p1", "status": "starting", "model": "a/b"}', status=b"201 Created")
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope("POST", "/v1/predictions"))
    found = ("replicate.prediction.id", "replicate.prediction.status", "replicate.model.name")
    assert of(spans.request, *found) == ["p1", "starting", "a/b"]


async def test_an_answer_that_is_cut(upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded) -> None:
    upstream.script = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    with pytest.raises(UpstreamAborted):
        await Caller().call(app, http_scope())
    await app.aclose()
    assert spans.request.status.status_code is StatusCode.ERROR
    found = ("replicate_proxy.outcome", "error.type", "http.response.status_code", "http.response.body.size")
    assert of(spans.request, *found) == ["upstream_error", "upstream_aborted", 200, 3]


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


async def test_what_is_counted_of_a_refusal(reader: InMemoryMetricReader) -> None:
    app = proxy("http://127.0.0.1:1", meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    [request_id] = (await call(app, http_scope("BREW", headers=[]))).header(b"x-request-id")
    assert len(request_id) == 32
    assert labels(reader, "http.server.request.duration") == [
        {
            "http.request.method": "_OTHER",
            "http.route": "/v1/{path}",
            "http.response.status_code": 401,
            "error.type": "key_missing",
        }
    ]
    assert labels(reader, "replicate_proxy.requests") == [
        {"replicate.operation": "_OTHER", "replicate_proxy.outcome": "auth_missing"}
    ]


async def test_what_is_counted_of_a_request_without_an_answer(
    upstream: RawUpstream, reader: InMemoryMetricReader
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
    with anyio.move_on_after(0.2):
        await Caller().call(app, http_scope())
    await app.aclose()
    assert labels(reader, "http.server.request.duration") == [
        {"http.request.method": "GET", "http.route": "/v1/{path}", "error.type": "cancelled"}
    ]


@pytest.mark.parametrize("observed", ["spans", "metrics", "nothing"])
async def test_the_host_s_own_context_is_left_as_it_was(
    upstream: RawUpstream, tracer_provider: TracerProvider, reader: InMemoryMetricReader, observed: str
) -> None:
    providers: dict[str, dict[str, Any]] = {
        "spans": {"tracer_provider": tracer_provider},
        "metrics": {"meter_provider": MeterProvider([reader], shutdown_on_exit=False)},
        "nothing": {},
    }
    app = proxy(upstream.url, **providers[observed])
    before = context.get_current()
    await Caller().call(app, http_scope())
    assert context.get_current() == before
    assert current() is None
    await app.aclose()


async def test_a_tenant_s_name_that_is_a_secret_of_the_request(
    upstream: RawUpstream, tracer_provider: TracerProvider, reader: InMemoryMetricReader, spans: Recorded
) -> None:
    keys = MappingKeyResolver({"pk-team-a": ReplicateKey(TOKEN, tenant="pk-team-a")})
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    app = proxy(upstream.url, key_resolver=keys, tracer_provider=tracer_provider, meter_provider=meter_provider)
    await call(app, http_scope())
    assert of(spans.request, "replicate_proxy.tenant") == ["REDACTED"]
    [counted] = labels(reader, "replicate_proxy.requests")
    assert counted["replicate_proxy.tenant"] == "REDACTED"


def test_no_traceparent_of_no_trace() -> None:
    assert traceparent(INVALID_SPAN_CONTEXT) is None
    assert traceparent(SpanContext(0xA, 0xB, is_remote=False)) == f"00-{0xA:032x}-{0xB:016x}-00"
    sampled = SpanContext(0xA, 0xB, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    assert traceparent(sampled) == f"00-{0xA:032x}-{0xB:016x}-01"


@pytest.mark.parametrize("moment", ["before", "within"])
async def test_a_caller_who_has_left_is_none_of_the_host_s_errors(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, moment: str
) -> None:
    """Where `send` says so (ASGI 2.4)."""
    caller = Caller()
    if moment == "before":
        caller.left.set()
    else:
        upstream.script = answers(b"{}")

    async def send(message: Any) -> None:
        raise OSError

    app = proxy(upstream.url, tracer_provider=tracer_provider)
    await app(http_scope("GET", "/v1/account"), caller.receive, send)
    await app.aclose()
    assert of(spans.request, "replicate_proxy.outcome", "error.type") == ["client_disconnected", None]
    assert spans.request.status.status_code is StatusCode.UNSET


async def test_replicate_s_own_499_is_an_answer_like_others(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(b"{}", b"499 X")
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope("GET", "/v1/account"))
    assert of(spans.request, "replicate_proxy.outcome", "http.response.status_code") == ["forwarded", 499]
    assert spans.request.status.status_code is StatusCode.UNSET


async def test_a_proxy_within_a_proxy_tells_nothing_for_the_other(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    upstream.script = answers(b'{"id": "p1", "status": "starting"}', b"201 Created")
    inner = proxy(upstream.url)

    def through(forward: Forward) -> Forward:
        async def answered(request: ProxyRequest) -> ProxyResponse:
            assert (await call(inner, http_scope("POST", "/v1/predictions"), b"{}")).status == 201
            return ProxyResponse.json(200, {})

        return answered

    app = proxy(upstream.url, tracer_provider=tracer_provider, layers=[through])
    await call(app, http_scope("GET", "/v1/account"))
    [span] = spans.all
    assert of(span, "replicate_proxy.outcome", "replicate.prediction.id") == ["answered", None]


async def test_what_comes_after_the_answer_is_no_part_of_the_request(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    """Neither is it the layers' to wait for."""
    order: list[str] = []
    asked = 0

    class Slow(Switched):
        async def put(self, id: str, prediction: StoredPrediction, /) -> None:
            nonlocal asked
            asked = time.time_ns()
            await anyio.sleep(0.01)
            order.append("store")
            await super().put(id, prediction)

    async def afterward() -> None:
        order.append("layer")

    async def prices(request: PriceRequest) -> Rates | None:
        order.append("prices")
        return None

    def layer(forward: Forward) -> Forward:
        async def passed(request: ProxyRequest) -> ProxyResponse:
            request.afterwards.append(afterward)
            return await forward(request)

        return passed

    upstream.script = answers(b'{"id": "p1", "status": "succeeded"}', b"201 Created")
    more: dict[str, Any] = {"store": Slow(), "layers": [layer], "prices": prices}
    app = proxy(upstream.url, tracer_provider=tracer_provider, **more)
    await call(app, http_scope("POST", "/v1/predictions"), b"{}")
    assert order == ["store", "layer", "prices"]
    [attempt] = [span for span in spans.all if span.name == "POST /v1/predictions" and span.kind is SpanKind.CLIENT]
    for span in (spans.request, attempt):
        assert span.end_time is not None
        assert span.end_time <= asked


def test_a_span_that_is_somewhere_else_can_be_printed() -> None:
    sent = f"00-{'a' * 32}-{'b' * 16}-01"
    assert repr(named(sent)) == f"Named({sent!r})"
