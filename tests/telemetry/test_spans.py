from __future__ import annotations

import json
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from replicate_proxy_mw.telemetry import names, story
from replicate_proxy_mw.telemetry.request import traceparent
from replicate_proxy_mw.testing.webhooks import sign
from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.telemetry.scenarios import STREAM_KEY, Recorded, of, stream_of
from tests.tenants import answers

pytestmark = pytest.mark.anyio

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = (b"traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01".encode())


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Recorded:
    return Recorded(exporter)


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


@pytest.mark.parametrize("broken", ["nonsense", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE_ID}-{'0' * 16}-01"])
async def test_a_broken_traceparent_is_none(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, broken: str
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    await call(app, http_scope(headers=[KEY, (b"traceparent", broken.encode())]))
    assert spans.request.parent is None


@pytest.mark.parametrize(
    "sent", [f"00-{TRACE_ID}-b7ad6b7169203331-01", f"cc-{TRACE_ID}-b7ad6b7169203331-01-what-comes-later"]
)
async def test_a_traceparent_of_any_version_is_read(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, sent: str
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    await call(app, http_scope(headers=[KEY, (b"traceparent", sent.encode())]))
    parent = spans.request.parent
    assert parent is not None
    assert parent.is_remote
    assert traceparent(parent) == f"00-{TRACE_ID}-b7ad6b7169203331-01"


async def test_a_stream_is_below_the_request_that_reads_it(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded
) -> None:
    host = f"127.0.0.1:{upstream.port}"
    created = json.dumps({"id": "p1", "status": "starting", "urls": {"stream": f"http://{host}/s"}}).encode()
    options = {"proxy_streams": True, "stream_key": STREAM_KEY, "stream_hosts": [host]}
    app = proxy(upstream.url, options=options, tracer_provider=tracer_provider)
    upstream.script = answers(created, status=b"201 Created")
    target = stream_of(await call(app, http_scope("POST", "/v1/predictions")))
    upstream.script = answers(b"data: a\n\n")
    await call(app, http_scope(target=target, headers=[(b"x-portkey-trace-id", b"order-42")]))
    attempt, request = spans.all[-2:]
    assert (attempt.name, attempt.kind, attempt.parent) == ("GET", SpanKind.CLIENT, request.context)
    assert of(attempt, "portkey.trace_id", "url.full", "server.address") == ["order-42", None, "127.0.0.1"]
    assert of(request, "replicate_proxy.outcome") == ["forwarded"]
    # And where nobody wants to know:
    quiet = proxy(upstream.url, options=options)
    assert (await call(quiet, http_scope(target=target))).content == b"data: a\n\n"
    assert len(spans.all) == 4


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        ({"id": "p1", "status": "succeeded"}, "generate_content"),
        ({"id": "p1", "status": "succeeded", "urls": {"get": "https://x/v1/predictions/p1"}}, "generate_content"),
        ({"id": "t1", "status": "failed", "urls": {"get": "https://x/v1/trainings/t1"}}, "train"),
        ({"id": "p1", "status": "starting"}, None),
        ({"id": "p1"}, None),
    ],
)
@pytest.mark.parametrize("observed", [True, False])
async def test_a_delivery(
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    payload: dict[str, Any],
    name: str | None,
    observed: bool,
) -> None:
    monkeypatch.setattr(story, "GRACE", 0.0)
    secret, id, now, body = "whsec_" + "A" * 40, "msg_1", str(int(time.time())), json.dumps(payload).encode()
    headers = {"webhook-id": id, "webhook-timestamp": now, "webhook-signature": sign(secret, id, now, body)}
    provider = tracer_provider if observed else None
    app = proxy("http://127.0.0.1:1", options={"webhook_secrets": [secret]}, tracer_provider=provider)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert (await call(app, http_scope("POST", "/v1/-/webhooks", raw), body)).status == 204
    found = [span.name for span in exporter.get_finished_spans()]
    assert found == (["POST /v1/-/webhooks", *([] if name is None else [name])] if observed else [])


@pytest.mark.parametrize(("tracestate", "kept"), [(b"vendor=1", "vendor=1"), (b"vendor=pk-team-a", "")])
async def test_a_tracestate_goes_along_unless_a_secret_is_in_it(
    upstream: RawUpstream, tracer_provider: TracerProvider, spans: Recorded, tracestate: bytes, kept: str
) -> None:
    headers = [KEY, TRACEPARENT, (b"tracestate", tracestate)]
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope("GET", "/v1/account", headers))
    for span in (spans.request, spans.attempt):
        assert span.context is not None
        assert (f"{span.context.trace_id:032x}", span.context.trace_state.to_header()) == (TRACE_ID, kept)
