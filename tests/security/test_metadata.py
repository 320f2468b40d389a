"""Metadata is bounded, and none fails a request."""

from __future__ import annotations

import json

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.rows import row
from tests.telemetry.scenarios import Recorded, of

pytestmark = pytest.mark.anyio


def _metadata(text: str) -> tuple[bytes, bytes]:
    return b"x-portkey-metadata", text.encode("latin-1")


@row("2.27")
@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"k": "x" * 30_000}),
        json.dumps({f"k{i}": i for i in range(2000)}),
        '{"k":"\\ud800',
        "[1]",
        "{",
        "\xff",
    ],
)
async def test_what_is_too_much_or_none_is_told_and_nothing_else(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, text: str
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    assert (await call(app, http_scope(headers=[KEY, _metadata(text)]))).status == 200
    spans = Recorded(exporter)
    assert [name for name in spans.request.attributes or () if name.startswith("portkey.metadata")] == [
        "portkey.metadata_invalid"
    ]


@row("2.27")
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1" + "0" * 4000, '"\\ud800"', '{"a":[{}]}'])
async def test_an_odd_value_is_a_text(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, value: str
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    assert (await call(app, http_scope(headers=[KEY, _metadata(f'{{"k":{value}}}')]))).status == 200
    [text] = of(Recorded(exporter).request, "portkey.metadata.k")
    assert isinstance(text, str)
    assert len(text.encode()) <= 256


@row("2.27")
@pytest.mark.parametrize("value", ['{"k":' * 600 + "1" + "}" * 600, "[" * 1900 + "]" * 1900])
async def test_what_is_deep_is_cut_or_told(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, value: str
) -> None:
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    assert (await call(app, http_scope(headers=[KEY, _metadata(f'{{"k":{value}}}')]))).status == 200
    # How deep a text may be is Python's to say.
    text, invalid = of(Recorded(exporter).request, "portkey.metadata.k", "portkey.metadata_invalid")
    assert invalid if text is None else len(text) <= 256


@row("2.27")
async def test_there_are_so_many_entries_on_spans_and_none_on_metrics(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    app = proxy(upstream.url, tracer_provider=tracer_provider, meter_provider=meters)
    text = json.dumps({f"k{i}": f"value-{i}" for i in range(150)}, separators=(",", ":"))
    await call(app, http_scope(headers=[KEY, _metadata(text)]))
    for span in Recorded(exporter).all:
        assert len([name for name in span.attributes or () if name.startswith("portkey.metadata.")]) == 32
    measured = reader.get_metrics_data()
    assert measured is not None
    assert "replicate_proxy.requests" in measured.to_json()
    assert "value-" not in measured.to_json()
    meters.shutdown()
