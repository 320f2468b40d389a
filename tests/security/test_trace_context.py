"""What a caller says of traces stays here, and is believed as far as the host says."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.rows import row
from tests.telemetry.scenarios import Recorded

pytestmark = pytest.mark.anyio

FORGED = "0af7651916cd43dd8448eb211c80319c"
CONTEXT = [
    (b"traceparent", f"00-{FORGED}-b7ad6b7169203331-01".encode()),
    (b"tracestate", b"vendor=1"),
    (b"baggage", b"user=ada"),
]


@row("2.26")
async def test_replicate_is_told_of_no_trace(upstream: RawUpstream, tracer_provider: TracerProvider) -> None:
    await call(proxy(upstream.url, tracer_provider=tracer_provider), http_scope(headers=[KEY, *CONTEXT]))
    for name, _ in CONTEXT:
        assert upstream.requests[0].header(name) == []


@row("2.26")
async def test_with_the_option_it_is_told_of_the_attempt_and_of_nothing_else(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider, options={"propagate_upstream": True})
    await call(app, http_scope(headers=[KEY, *CONTEXT]))
    context = Recorded(exporter).attempt.context
    assert context is not None
    assert upstream.requests[0].header(b"traceparent") == [f"00-{FORGED}-{context.span_id:016x}-01".encode()]
    assert upstream.requests[0].header(b"tracestate") == upstream.requests[0].header(b"baggage") == []


@row("2.26")
@pytest.mark.parametrize(
    ("options", "parent", "links"),
    [
        ({}, True, 0),
        ({"trust_traceparent": "link"}, False, 1),
        ({"trust_traceparent": "ignore"}, False, 0),
    ],
)
async def test_a_forged_trace_is_joined_only_where_callers_are_trusted(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    options: dict[str, Any],
    parent: bool,
    links: int,
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider, options=options)
    await call(app, http_scope(headers=[KEY, *CONTEXT]))
    span = Recorded(exporter).request
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}" == FORGED) == parent
    assert [f"{link.context.trace_id:032x}" for link in span.links] == [FORGED] * links
