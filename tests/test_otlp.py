from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import requests
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags

from tests.otlp import ExportedSpan, Sink, tracing, tree

REMOTE = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


def _record(tracer_provider: TracerProvider) -> None:
    tracer = tracer_provider.get_tracer("scope", "1.0", "https://example.test/schema")
    parent = trace.set_span_in_context(trace.NonRecordingSpan(REMOTE))
    with tracer.start_as_current_span("request", parent, SpanKind.SERVER, {"text": "ü", "yes": True}) as request:
        with tracer.start_as_current_span("attempt", kind=SpanKind.CLIENT, start_time=2) as attempt:
            attempt.set_status(StatusCode.ERROR, "bad")
            attempt.set_attribute("error.type", "503")
            attempt.add_event("first", {"n": [1, 2]}, timestamp=7)
        tracer.start_span("earlier", start_time=1).end(5)
    links = [Link(request.get_span_context()), Link(REMOTE)]
    tracer.start_span("poll", links=links).end()


TREE = """\
request SERVER
  earlier INTERNAL
  attempt CLIENT ERROR 503
poll INTERNAL -> request -> ?"""


@pytest.mark.parametrize("compression", Compression)
def test_spans_as_they_were_exported(sink: Sink, compression: Compression) -> None:
    with tracing(sink, compression=compression, service_name="test") as (tracer_provider, _):
        _record(tracer_provider)
        spans = {span.name: span for span in sink.spans}
    encoding = {"none": None}.get(compression.value, compression.value)
    assert {export.headers.get("content-encoding") for export in sink.exports} == {encoding}
    request, attempt, poll = spans["request"], spans["attempt"], spans["poll"]
    assert request == ExportedSpan(
        name="request",
        kind="SERVER",
        trace_id=f"{REMOTE.trace_id:032x}",
        span_id=request.span_id,
        parent_id=f"{REMOTE.span_id:016x}",
        parent_is_remote=True,
        start=request.start,
        end=request.end,
        attributes={"text": "ü", "yes": True},
        events=[],
        links=[],
        status="UNSET",
        description="",
        scope="scope",
        schema_url="https://example.test/schema",
        resource=request.resource,
    )
    assert 0 < request.start < request.end
    assert request.resource["service.name"] == "test"
    assert (attempt.kind, attempt.status, attempt.description) == ("CLIENT", "ERROR", "bad")
    assert (attempt.parent_id, attempt.parent_is_remote) == (request.span_id, False)
    assert attempt.events == [("first", 7, {"n": [1, 2]})]
    assert (poll.parent_id, poll.parent_is_remote) == (None, False)
    assert poll.links == [(request.trace_id, request.span_id), (request.trace_id, request.parent_id)]
    assert any("ü".encode() in body for body in sink.raw)
    assert tree(sink.spans) == TREE


def test_a_remote_parent_among_the_spans_is_one_like_any_other(sink: Sink) -> None:
    with tracing(sink) as (tracer_provider, _):
        _record(tracer_provider)
    [request] = [span for span in sink.spans if span.name == "request"]
    caller = replace(
        request, name="caller", kind="CLIENT", span_id=request.parent_id or "", parent_id=None, status="OK"
    )
    assert tree([*sink.spans, caller]).startswith("caller CLIENT OK\n  request SERVER\n    earlier INTERNAL\n")
    assert tree([]) == ""


def _count(meter_provider: MeterProvider) -> None:
    meter = meter_provider.get_meter("scope")
    meter.create_counter("requests", "{request}").add(2, {"outcome": "forwarded"})
    meter.create_up_down_counter("in_flight").add(-1)
    meter.create_observable_gauge("level", [lambda _: [Observation(1.5)]], "m")
    histogram = meter.create_histogram("duration", "s", explicit_bucket_boundaries_advisory=[1.0, 2.0])
    for seconds in (0.5, 1.5, 1.75):
        histogram.record(seconds)


def test_metrics_as_they_were_exported(sink: Sink) -> None:
    with tracing(sink) as (_, meter_provider):
        _count(meter_provider)
        assert sink.metrics["requests"][0].value == 2
        counter = meter_provider.get_meter("scope").create_counter("requests", "{request}")
        counter.add(1, {"outcome": "forwarded"})
        counter.add(1, {"outcome": "denied"})
        found = sink.metrics
    points = [(point.kind, point.unit, point.attributes, point.value) for point in found["requests"]]
    assert points == [
        ("counter", "{request}", {"outcome": "forwarded"}, 3),
        ("counter", "{request}", {"outcome": "denied"}, 1),
    ]
    [in_flight], [level], [duration] = found["in_flight"], found["level"], found["duration"]
    assert (in_flight.kind, in_flight.value, in_flight.scope) == ("updown", -1, "scope")
    assert (level.kind, level.unit, level.value) == ("gauge", "m", 1.5)
    assert (duration.kind, duration.unit, duration.value) == ("histogram", "s", None)
    assert (duration.count, duration.sum, duration.bounds, duration.buckets) == (3, 3.75, [1.0, 2.0], [1, 2, 0])


def test_metrics_of_two_processes_stay_apart(sink: Sink) -> None:
    for name in ("a", "b"):
        with tracing(sink, service_instance_id=name) as (_, meter_provider):
            _count(meter_provider)
    points = sink.metrics["requests"]
    assert [(point.resource["service.instance.id"], point.value) for point in points] == [("a", 2), ("b", 2)]


def test_waiting_for_spans_of_another_thread(sink: Sink) -> None:
    with tracing(sink) as (tracer_provider, _):
        assert sink.wait(1, seconds=0) == []
        go = threading.Event()

        def record() -> None:
            go.wait()
            _record(tracer_provider)

        thread = threading.Thread(target=record)
        thread.start()
        go.set()
        assert len(sink.wait(4)) == 4
        thread.join()


def test_many_exporters_at_once(sink: Sink) -> None:
    def record() -> None:
        with tracing(sink) as (tracer_provider, _):
            _record(tracer_provider)

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sink.spans) == 32


def test_headers_are_kept_and_other_paths_tell_nothing(sink: Sink) -> None:
    requests.post(f"{sink.url}/v1/logs", b"x", headers={"Authorization": "Bearer t"}, timeout=5)
    [export] = sink.exports
    assert (export.path, export.headers["authorization"], export.body) == ("/v1/logs", "Bearer t", b"x")
    assert (sink.spans, sink.metrics) == ([], {})
