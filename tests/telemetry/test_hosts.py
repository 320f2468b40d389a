"""Hosts that are instrumented, each by the real package: nothing is told twice, and nothing of theirs goes missing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import pytest
import requests
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from litestar import Litestar, get
from litestar.plugins.opentelemetry import OpenTelemetryConfig, OpenTelemetryPlugin
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.httpx import AsyncOpenTelemetryTransport, HTTPXClientInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, format_span_id, format_trace_id

from replicate_proxy_mw import Forward, KeyRequest, ProxyConfig, ProxyRequest, ProxyResponse, ReplicateProxyMiddleware
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.testing import serve
from tests.raw_asgi import KEY, TOKEN, ASGIApp, Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream, answer_all

pytestmark = pytest.mark.anyio

OURS = "replicate_proxy_mw"
HTTPX = "opentelemetry.instrumentation.httpx"
TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = (
    (b"traceparent", f"00-{TRACE_ID}-{CALLER}-01".encode()),
    (b"tracestate", b"vendor=1"),
    (b"baggage", b"user=ada"),
)
PROPAGATED = (b"traceparent", b"tracestate", b"baggage")
PREDICTION = {
    "id": "p1",
    "model": "acme/canary",
    "status": "succeeded",
    "created_at": "2026-11-01T10:00:00Z",
    "completed_at": "2026-11-01T10:00:02Z",
}

Own = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Signals:
    """What the host and the middleware have told."""

    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader
    tracer_provider: TracerProvider
    meter_provider: MeterProvider

    def providers(self) -> dict[str, Any]:
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}

    def spans(self, kind: SpanKind | None = None, scope: str | None = None) -> list[ReadableSpan]:
        return [
            span
            for span in self.exporter.get_finished_spans()
            if (kind is None or span.kind is kind) and (scope is None or _scope(span) == scope)
        ]

    def one(self, kind: SpanKind, scope: str | None = None) -> ReadableSpan:
        [span] = self.spans(kind, scope)
        return span

    def metrics(self) -> set[tuple[str, str]]:
        """The scope and name of each metric that has a point."""
        data = self.reader.get_metrics_data()
        return {
            (of_scope.scope.name, metric.name)
            for of_resource in (data.resource_metrics if data else ())
            for of_scope in of_resource.scope_metrics
            for metric in of_scope.metrics
            if metric.data.data_points
        }


def _scope(span: ReadableSpan) -> str:
    return span.instrumentation_scope.name if span.instrumentation_scope else ""


def _context(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


@pytest.fixture
def signals(exporter: InMemorySpanExporter, tracer_provider: TracerProvider) -> Iterator[Signals]:
    reader = InMemoryMetricReader()
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    yield Signals(exporter, reader, tracer_provider, meter_provider)
    meter_provider.shutdown()


@pytest.fixture
def instrumented_httpx(signals: Signals) -> Iterator[None]:
    HTTPXClientInstrumentor().instrument(**signals.providers())
    yield
    HTTPXClientInstrumentor().uninstrument()


@pytest.fixture
def elsewhere() -> Iterator[RawUpstream]:
    """What the host's own calls reach."""
    with RawUpstream() as raw:
        yield raw


# --- the hosts: each has the proxy in it, and a route of its own at /own


def _telemetry(signals: Signals) -> TelemetryConfig:
    return {"logs": False, "tracer_provider": signals.tracer_provider, "meter_provider": signals.meter_provider}


def _fastapi(signals: Signals, own: Own, **keywords: Any) -> Any:
    app = FastAPI(telemetry=_telemetry(signals))
    app.add_api_route("/own", own)
    app.add_middleware(ReplicateProxyMiddleware, **keywords)
    return app


def _instrumented_fastapi(signals: Signals, own: Own, **keywords: Any) -> Any:
    app = _fastapi(signals, own, **keywords)
    FastAPIInstrumentor.instrument_app(app, **signals.providers())
    return app


def _asgi(signals: Signals, own: Own, **keywords: Any) -> Any:
    return OpenTelemetryMiddleware(ReplicateProxyMiddleware(_bare(own), **keywords), **signals.providers())


def _litestar(signals: Signals, own: Own, **keywords: Any) -> Any:
    @get("/own")
    async def route() -> None:
        await own()

    telemetry = OpenTelemetryPlugin(OpenTelemetryConfig(**signals.providers()))
    return Litestar([route], plugins=[ReplicateProxyPlugin(**keywords), telemetry])


def _inner_asgi(signals: Signals, own: Own, **keywords: Any) -> Any:
    return ReplicateProxyMiddleware(OpenTelemetryMiddleware(_bare(own), **signals.providers()), **keywords)


def _inner_fastapi(signals: Signals, own: Own, **keywords: Any) -> Any:
    app = FastAPI(telemetry=_telemetry(signals))
    app.add_api_route("/own", own)
    return ReplicateProxyMiddleware(app, **keywords)


def _bare(own: Own) -> ASGIApp:
    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await own()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    return bare


Make = Callable[..., Any]
AROUND = {
    "FastAPI": _fastapi,
    "FastAPI's instrumentation": _instrumented_fastapi,
    "the ASGI instrumentation": _asgi,
    "Litestar's plugin": _litestar,
}
WITHIN = {"the ASGI instrumentation, within": _inner_asgi, "FastAPI, within": _inner_fastapi}
around = pytest.mark.parametrize("make", AROUND.values(), ids=AROUND)
within = pytest.mark.parametrize("make", WITHIN.values(), ids=WITHIN)
anywhere = pytest.mark.parametrize("make", (AROUND | WITHIN).values(), ids=AROUND | WITHIN)


async def _resolver(request: KeyRequest) -> str:
    return TOKEN


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Hosted:
    """One of the hosts."""

    app: Any

    async def ask(self, method: str, target: str, *headers: tuple[bytes, bytes]) -> Caller:
        return await Caller([b"{}"]).call(self.app, http_scope(method, target, [KEY, *TRACED, *headers]))


class Hosting:
    """Makes a host with the proxy, and closes what it has opened in the end."""

    def __init__(
        self, signals: Signals, upstream: RawUpstream, transport: Callable[[], httpx.AsyncBaseTransport]
    ) -> None:
        self._signals, self._upstream = signals, upstream
        self._transport = transport()

    async def __aenter__(self) -> Hosting:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._transport.aclose()

    def host(
        self, make: Make, *, own: Own = _nothing, options: dict[str, Any] | None = None, **keywords: Any
    ) -> Hosted:
        keywords = {"key_resolver": _resolver} | keywords
        config = ProxyConfig(upstream=self._upstream.url, **(options or {}))
        app = make(
            self._signals, own, config=config, transport=self._transport, **self._signals.providers(), **keywords
        )
        return Hosted(app)


def _plain() -> httpx.AsyncBaseTransport:
    return httpx.AsyncHTTPTransport(trust_env=False)


def _hosting(signals: Signals, upstream: RawUpstream, *, wrapped: bool = False) -> Hosting:
    """With a transport of the host's, which is the `wrapped` one of the instrumentation or what it has patched."""
    if upstream.script is answer_all:
        upstream.script = _answers
    return Hosting(
        signals,
        upstream,
        lambda: AsyncOpenTelemetryTransport(_plain(), **signals.providers()) if wrapped else _plain(),
    )


def _answers(connection: Connection) -> None:
    while connection.request():
        connection.answer(json.dumps(PREDICTION).encode(), status=b"201 Created")


def _propagated(upstream: RawUpstream) -> list[tuple[bytes, bytes]]:
    assert upstream.requests
    return [pair for request in upstream.requests for pair in request.headers if pair[0] in PROPAGATED]


def _names(spans: Sequence[ReadableSpan]) -> list[str]:
    return sorted(span.name for span in spans)


CREATE = "POST /v1/predictions"
RUN = "generate_content acme/canary"


# --- one request, one tree


@around
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_request_has_one_server_span_and_the_host_s_it_is(
    signals: Signals, upstream: RawUpstream, make: Make, wrapped: bool
) -> None:
    async with _hosting(signals, upstream, wrapped=wrapped) as hosting:
        caller = await hosting.host(make).ask("POST", "/v1/predictions")
    assert caller.status == 201
    server = signals.one(SpanKind.SERVER)
    assert _scope(server) != OURS
    assert server.parent is not None
    parent = (format_trace_id(server.parent.trace_id), format_span_id(server.parent.span_id), server.parent.is_remote)
    assert parent == (TRACE_ID, CALLER, True)
    request = signals.one(SpanKind.INTERNAL, OURS)
    assert (request.name, request.parent) == (CREATE, server.context)
    ours = signals.spans(SpanKind.CLIENT)
    assert {_scope(span) for span in ours} == {OURS}
    assert _names(ours) == [CREATE, RUN]
    assert [span.parent for span in ours] == [request.context] * 2
    assert {format_trace_id(_context(span).trace_id) for span in signals.spans()} == {TRACE_ID}
    assert _propagated(upstream) == []
    metrics = signals.metrics()
    assert (OURS, "replicate_proxy.request.duration") in metrics
    assert (OURS, "http.client.request.duration") in metrics
    assert (OURS, "http.server.request.duration") not in metrics
    assert HTTPX not in {scope for scope, _ in metrics}


@within
@pytest.mark.usefixtures("instrumented_httpx")
async def test_where_the_host_does_not_see_the_request_the_server_span_is_ours(
    signals: Signals, upstream: RawUpstream, make: Make
) -> None:
    async with _hosting(signals, upstream) as hosting:
        await hosting.host(make).ask("POST", "/v1/predictions")
    request = signals.one(SpanKind.SERVER)
    assert (_scope(request), request.name) == (OURS, CREATE)
    assert request.parent is not None
    assert (format_span_id(request.parent.span_id), request.parent.is_remote) == (CALLER, True)
    assert sorted(span.name for span in signals.spans()) == [CREATE, CREATE, RUN]
    assert [span.parent for span in signals.spans(SpanKind.CLIENT)] == [request.context] * 2
    assert _propagated(upstream) == []
    assert (OURS, "http.server.request.duration") in signals.metrics()


@anywhere
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.usefixtures("instrumented_httpx")
async def test_replicate_is_told_the_attempt_and_no_more_where_the_host_wants_that(
    signals: Signals, upstream: RawUpstream, make: Make, wrapped: bool
) -> None:
    async with _hosting(signals, upstream, wrapped=wrapped) as hosting:
        await hosting.host(make, options={"propagate_upstream": True}).ask("POST", "/v1/predictions")
    [attempt] = [_context(span) for span in signals.spans(SpanKind.CLIENT, OURS) if span.name == CREATE]
    sent = f"00-{format_trace_id(attempt.trace_id)}-{format_span_id(attempt.span_id)}-01"
    assert _propagated(upstream) == [(b"traceparent", sent.encode())]


@anywhere
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_poll_tells_the_run_below_the_create(signals: Signals, upstream: RawUpstream, make: Make) -> None:
    def script(connection: Connection) -> None:
        while (received := connection.request()) is not None:
            starting = received.line.startswith(b"POST")
            connection.answer(json.dumps(PREDICTION | ({"status": "starting"} if starting else {})).encode())

    upstream.script = script
    async with _hosting(signals, upstream) as hosting:
        host = hosting.host(make)
        await host.ask("POST", "/v1/predictions")
        await Caller().call(host.app, http_scope("GET", "/v1/predictions/p1"))
    [create] = [span for span in signals.spans(scope=OURS) if span.name == CREATE and span.kind is not SpanKind.CLIENT]
    [poll] = [
        span
        for span in signals.spans(scope=OURS)
        if span.name == "GET /v1/predictions/{prediction_id}" and span.kind is not SpanKind.CLIENT
    ]
    [run] = [span for span in signals.spans(scope=OURS) if span.name == RUN]
    # It comes back from the store, and so as one of another process.
    assert run.parent is not None
    assert run.parent.is_remote
    assert (run.parent.trace_id, run.parent.span_id) == (_context(create).trace_id, _context(create).span_id)
    assert [link.context.span_id for link in poll.links] == [_context(create).span_id]
    assert _context(poll).trace_id != _context(create).trace_id
    assert len(signals.spans(SpanKind.SERVER)) == 2
    assert {_scope(span) for span in signals.spans(SpanKind.CLIENT)} == {OURS}


@anywhere
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_stream_has_no_twin_and_its_host_learns_nothing(
    signals: Signals, upstream: RawUpstream, make: Make, propagate: bool
) -> None:
    def script(connection: Connection) -> None:
        while (received := connection.request()) is not None:
            if received.line.startswith(b"POST"):
                stream = f"http://127.0.0.1:{upstream.port}/v1/files/opaque"
                created = PREDICTION | {"status": "starting", "urls": {"stream": stream}}
                connection.answer(json.dumps(created).encode(), status=b"201 Created")
            else:
                events = b"event: output\ndata: a\n\nevent: done\ndata: {}\n\n"
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
                connection.send(head % len(events) + events)

    upstream.script = script
    options = {
        "proxy_streams": True,
        "stream_key": "k" * 32,
        "stream_hosts": [f"127.0.0.1:{upstream.port}"],
        "propagate_upstream": propagate,
    }
    async with _hosting(signals, upstream) as hosting:
        host = hosting.host(make, options=options)
        created = await host.ask("POST", "/v1/predictions")
        url = json.loads(created.content)["urls"]["stream"]
        signals.exporter.clear()
        upstream.requests.clear()
        read = await host.ask("GET", url.removeprefix("http://proxy.test"))
    assert read.status == 200
    assert _propagated(upstream) == []
    assert len(signals.spans(SpanKind.SERVER)) == 1
    [request] = [span for span in signals.spans(scope=OURS) if span.kind is not SpanKind.CLIENT]
    assert request.name == "GET /v1/-/streams/{token}"
    assert {_scope(span) for span in signals.spans(SpanKind.CLIENT)} == {OURS}
    [attempt] = [span for span in signals.spans(SpanKind.CLIENT) if span.name == "GET"]
    assert attempt.parent == request.context


# --- the host's own calls


def _calling(elsewhere: RawUpstream) -> Own:
    async def call() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(elsewhere.url)).status_code == 200

    return call


def _sent_by(span: ReadableSpan) -> bytes:
    context = _context(span)
    return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-01".encode()


@anywhere
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_route_of_the_host_keeps_its_spans(
    signals: Signals, upstream: RawUpstream, elsewhere: RawUpstream, make: Make
) -> None:
    async with _hosting(signals, upstream) as hosting:
        caller = await hosting.host(make, own=_calling(elsewhere)).ask("GET", "/own")
    assert caller.status == 200
    server, client = signals.one(SpanKind.SERVER), signals.one(SpanKind.CLIENT, HTTPX)
    assert _context(client).trace_id == _context(server).trace_id
    assert signals.spans(scope=OURS) == []
    [received] = elsewhere.requests
    assert received.header(b"traceparent") == [_sent_by(client)]
    assert received.header(b"baggage") == [b"user=ada"]
    assert OURS not in {scope for scope, _ in signals.metrics()}


@anywhere
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_resolver_keeps_its_spans(
    signals: Signals, upstream: RawUpstream, elsewhere: RawUpstream, make: Make
) -> None:
    ask = _calling(elsewhere)

    async def resolver(request: KeyRequest) -> str:
        await ask()
        return TOKEN

    async with _hosting(signals, upstream) as hosting:
        await hosting.host(make, key_resolver=resolver).ask("POST", "/v1/predictions")
    [request] = [span for span in signals.spans(scope=OURS) if span.kind is not SpanKind.CLIENT]
    client = signals.one(SpanKind.CLIENT, HTTPX)
    assert client.parent == request.context
    [received] = elsewhere.requests
    assert received.header(b"traceparent") == [_sent_by(client)]
    assert _propagated(upstream) == []
    assert (HTTPX, "http.client.duration") in signals.metrics()


@anywhere
@pytest.mark.usefixtures("instrumented_httpx")
async def test_a_layer_keeps_its_spans_before_behind_and_within_an_answer(
    signals: Signals, upstream: RawUpstream, elsewhere: RawUpstream, make: Make
) -> None:
    ask = _calling(elsewhere)

    def layer(forward: Forward) -> Forward:
        async def asking(request: ProxyRequest) -> ProxyResponse:
            await ask()
            response = await forward(request)
            await ask()

            async def body() -> AsyncIterator[bytes]:
                async for chunk in response.body:
                    await ask()
                    yield chunk

            return ProxyResponse(status=response.status, headers=response.headers, body=body(), aclose=response.aclose)

        return asking

    async with _hosting(signals, upstream) as hosting:
        caller = await hosting.host(make, layers=[layer]).ask("POST", "/v1/predictions")
    assert json.loads(caller.content) == PREDICTION
    [request] = [span for span in signals.spans(scope=OURS) if span.kind is not SpanKind.CLIENT]
    clients = signals.spans(SpanKind.CLIENT, HTTPX)
    assert [span.parent for span in clients] == [request.context] * 3
    assert [received.header(b"traceparent") for received in elsewhere.requests] == [[_sent_by(one)] for one in clients]
    assert _propagated(upstream) == []


@around
@pytest.mark.usefixtures("instrumented_httpx")
async def test_where_nothing_of_ours_is_recorded_there_is_no_twin_either(
    signals: Signals, upstream: RawUpstream, make: Make
) -> None:
    """A host that records its own, and has switched ours off, does not tell Replicate its trace all the same."""

    def quiet(signals: Signals, own: Own, **keywords: Any) -> Any:
        return make(signals, own, **keywords | {"tracer_provider": None, "meter_provider": None})

    async with _hosting(signals, upstream) as hosting:
        await hosting.host(quiet).ask("POST", "/v1/predictions")
    assert signals.spans(SpanKind.CLIENT) == []
    assert len(signals.spans(SpanKind.SERVER)) == 1
    assert _propagated(upstream) == []


# --- served


@around
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.usefixtures("instrumented_httpx")
async def test_behind_a_real_server(
    signals: Signals, upstream: RawUpstream, elsewhere: RawUpstream, make: Make
) -> None:
    """With the transport that the middleware opens itself, and requests at the same time."""

    def script(connection: Connection) -> None:
        while connection.request():
            # Of a prediction that was told nothing is told again.
            created = PREDICTION | {"id": f"p{len(upstream.requests)}"}
            connection.answer(json.dumps(created).encode(), status=b"201 Created")

    upstream.script = script
    config = ProxyConfig(upstream=upstream.url)
    app = make(signals, _calling(elsewhere), config=config, key_resolver=_resolver, **signals.providers())
    headers = {"x-portkey-api-key": "pk-team-a", "baggage": "user=ada"}

    def ask(url: str, span_id: str) -> None:
        # Not by httpx, which is instrumented.
        with requests.Session() as session:
            session.trust_env = False
            session.headers.update({**headers, "traceparent": f"00-{TRACE_ID}-{span_id}-01"})
            assert session.post(f"{url}/v1/predictions", json={}, timeout=10).status_code == 201
            assert session.get(f"{url}/own", timeout=10).status_code == 200

    callers = [f"{number:016x}" for number in range(1, 6)]
    with serve(app, lifespan="auto") as served:
        async with anyio.create_task_group() as tasks:
            for span_id in callers:
                tasks.start_soon(anyio.to_thread.run_sync, ask, served.url, span_id)
    by_id = {_context(span).span_id: span for span in signals.spans()}
    ours = signals.spans(SpanKind.INTERNAL, OURS)
    assert len(ours) == 5
    above = []
    for request in ours:
        assert request.parent is not None
        server = by_id[request.parent.span_id]
        assert server.kind is SpanKind.SERVER
        assert server.parent is not None
        above.append(format_span_id(server.parent.span_id))
        below = [span for span in signals.spans(SpanKind.CLIENT, OURS) if span.parent == request.context]
        assert _names(below) == [CREATE, RUN]
    assert sorted(above) == callers
    assert _propagated(upstream) == []
