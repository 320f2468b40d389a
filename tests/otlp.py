"""An OTLP collector on a real socket: it keeps what real exporters send, and tells it as plain values and as a tree."""

from __future__ import annotations

import gzip
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
)
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda body: body,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}


@dataclass(frozen=True)
class Export:
    """One request of an exporter; `body` is decompressed."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class ExportedSpan:
    """A span as it arrived; ids in hex, times in nanoseconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str | None
    parent_is_remote: bool
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: Sequence[tuple[str, int, Mapping[str, Any]]]
    links: Sequence[tuple[str, str]]
    status: str
    description: str
    scope: str
    schema_url: str
    resource: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The state of one instrument for one set of attributes.

    `kind` is counter, updown, gauge or histogram; a histogram has no `value`, the others only that.
    """

    kind: str
    unit: str
    attributes: Mapping[str, Any]
    value: int | float | None = None
    count: int = 0
    sum: float = 0.0
    bounds: Sequence[float] = ()
    buckets: Sequence[int] = ()
    scope: str = ""
    resource: Mapping[str, Any] = field(default_factory=dict)


class Sink:
    """Listens on a free loopback port while it is entered; what it has got stays afterwards.

    What it is asked for is up to date: the providers of `tracing` export what they have before the answer.
    """

    def __init__(self) -> None:
        self._exports: list[Export] = []
        self._arrived = threading.Condition()
        self._flushes: list[Callable[[], object]] = []

    def __enter__(self) -> Sink:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                body = _DECODERS[self.headers.get("content-encoding", "")](body)
                sink._take(Export(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Closing waits for the threads of all requests.
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _take(self, export: Export) -> None:
        with self._arrived:
            self._exports.append(export)
            self._arrived.notify_all()

    @property
    def exports(self) -> list[Export]:
        for flush in self._flushes:
            flush()
        with self._arrived:
            return list(self._exports)

    @property
    def raw(self) -> list[bytes]:
        """The bodies of all requests, to search them for what must not be there."""
        return [export.body for export in self.exports]

    @property
    def spans(self) -> list[ExportedSpan]:
        """All spans, in the order in which they arrived."""
        return [
            span
            for export in self.exports
            if export.path == "/v1/traces"
            for span in _spans(ExportTraceServiceRequest.FromString(export.body))
        ]

    def wait(self, spans: int, seconds: float = 10.0) -> list[ExportedSpan]:
        """All spans, as soon as so many have arrived, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while len(found := self.spans) < spans and (left := deadline - time.monotonic()) > 0:
            with self._arrived:
                self._arrived.wait(min(left, 0.05))
        return found

    @property
    def metrics(self) -> dict[str, list[Point]]:
        """The last state of each metric by name, of each resource in turn."""
        latest: dict[tuple[str, str], list[Point]] = {}
        for export in self.exports:
            if export.path == "/v1/metrics":
                latest |= _points(ExportMetricsServiceRequest.FromString(export.body))
        found: dict[str, list[Point]] = {}
        for (name, _), points in latest.items():
            found.setdefault(name, []).extend(points)
        return found


def _spans(request: ExportTraceServiceRequest) -> Iterator[ExportedSpan]:
    for of_resource in request.resource_spans:
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield ExportedSpan(
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex() or None,
                    parent_is_remote=bool(span.flags & trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK),
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    events=[(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events],
                    links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    description=span.status.message,
                    scope=of_scope.scope.name,
                    schema_url=of_scope.schema_url,
                    resource=_attributes(of_resource.resource.attributes),
                )


def _points(request: ExportMetricsServiceRequest) -> dict[tuple[str, str], list[Point]]:
    found: dict[tuple[str, str], list[Point]] = {}
    for of_resource in request.resource_metrics:
        resource = _attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_metrics:
            for metric in of_scope.metrics:
                found.setdefault((metric.name, repr(sorted(resource.items()))), []).extend(
                    _point(metric, point, of_scope.scope.name, resource)
                    for point in getattr(metric, metric.WhichOneof("data") or "").data_points
                )
    return found


def _point(
    metric: Metric, point: NumberDataPoint | HistogramDataPoint, scope: str, resource: Mapping[str, Any]
) -> Point:
    data = metric.WhichOneof("data")
    common: dict[str, Any] = {
        "unit": metric.unit,
        "attributes": _attributes(point.attributes),
        "scope": scope,
        "resource": resource,
    }
    if data != "gauge":
        temporality = getattr(metric, data or "").aggregation_temporality
        assert temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    if isinstance(point, HistogramDataPoint):
        return Point(
            kind="histogram",
            count=point.count,
            sum=point.sum,
            bounds=list(point.explicit_bounds),
            buckets=list(point.bucket_counts),
            **common,
        )
    kind = "gauge" if data == "gauge" else "counter" if metric.sum.is_monotonic else "updown"
    return Point(kind=kind, value=getattr(point, point.WhichOneof("value") or ""), **common)


def _attributes(found: Iterable[KeyValue]) -> dict[str, Any]:
    return {item.key: _value(item.value) for item in found}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


@contextmanager
def tracing(
    sink: Sink, *, compression: Compression = Compression.NoCompression, **resource: str
) -> Iterator[tuple[TracerProvider, MeterProvider]]:
    """Providers of the SDK with real exporters to `sink`, which reads from them whenever it is asked.

    `resource` are attributes with `_` for `.`, to tell two processes from each other.
    """
    said = Resource.create({name.replace("_", "."): value for name, value in resource.items()})
    with requests.Session() as session:
        session.trust_env = False
        spans = OTLPSpanExporter(endpoint=f"{sink.url}/v1/traces", compression=compression, session=session)
        tracer_provider = TracerProvider(resource=said, shutdown_on_exit=False)
        tracer_provider.add_span_processor(BatchSpanProcessor(spans))
        points = OTLPMetricExporter(endpoint=f"{sink.url}/v1/metrics", compression=compression, session=session)
        reader = PeriodicExportingMetricReader(points, export_interval_millis=3_600_000)
        meter_provider = MeterProvider([reader], said, shutdown_on_exit=False)
        flushes = [tracer_provider.force_flush, meter_provider.force_flush]
        sink._flushes.extend(flushes)
        try:
            yield tracer_provider, meter_provider
        finally:
            for flush in flushes:
                sink._flushes.remove(flush)
            tracer_provider.shutdown()
            meter_provider.shutdown()


def tree(spans: Iterable[ExportedSpan]) -> str:
    """The spans of all traces as text: each below its parent, in the order of their start.

        POST /v1/predictions SERVER
          POST /v1/predictions CLIENT
        GET /v1/predictions/{prediction_id} SERVER ERROR 503 -> POST /v1/predictions

    After the kind come a status that is set, with the `error.type`, and the name of what a link leads to: `?` if it is
    not among the spans.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    names = {(span.trace_id, span.span_id): span.name for span in ordered}
    children: dict[tuple[str, str] | None, list[ExportedSpan]] = {}
    for span in ordered:
        parent = (span.trace_id, span.parent_id or "")
        children.setdefault(parent if parent in names else None, []).append(span)

    def lines(parent: tuple[str, str] | None, indent: str) -> Iterator[str]:
        for span in children.get(parent, ()):
            words = [indent + span.name, span.kind]
            if span.status != "UNSET":
                words += [span.status, str(span.attributes.get("error.type", ""))]
            words += [f"-> {names.get(link, '?')}" for link in span.links]
            yield " ".join(filter(None, words))
            yield from lines((span.trace_id, span.span_id), indent + "  ")

    return "\n".join(lines(None, ""))
