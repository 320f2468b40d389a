"""Spans and metrics by OTLP, for a host that has no OpenTelemetry set-up of its own."""

from __future__ import annotations

import atexit
import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from opentelemetry import metrics, trace

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

_EXTRA = "replicate-proxy-mw[otlp]"

Signal = Literal["TRACES", "METRICS"]

_EXPORTERS = {"TRACES": "trace_exporter.OTLPSpanExporter", "METRICS": "metric_exporter.OTLPMetricExporter"}
_PROTOCOLS = {"http/protobuf": ("http", _EXTRA), "grpc": ("grpc", "opentelemetry-exporter-otlp-proto-grpc")}

# What `opentelemetry.util.re` takes for a header in an environment variable. What it does not take it logs.
_HEADER = re.compile(r"[!#-'*+\-.0-9A-Z^-z|~]+[ \t]*=[ \t]*([ !#-+\--:<-\[\]-~]*)")


def configure_telemetry(
    *, service_name: str | None = None, resource_attributes: Mapping[str, str] | None = None
) -> Configured:
    """Send spans and metrics of this process to an OpenTelemetry collector: by default to `http://localhost:4318`.

    Needs the extra `otlp`. It sets the global `TracerProvider` and `MeterProvider`, with the settings of the
    specification's environment variables: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`,
    `OTEL_TRACES_EXPORTER` and `OTEL_METRICS_EXPORTER` (`otlp`, `console`, `none`), `OTEL_EXPORTER_OTLP_*`,
    `OTEL_BSP_*`, `OTEL_METRIC_EXPORT_*`. With `OTEL_SDK_DISABLED=true` nothing is set, and nothing is recorded.

    Without `OTEL_TRACES_SAMPLER` every request is recorded, also where the caller's `traceparent` says that the caller
    does not: spans are the log, and a log has no holes.

    Call it in the module of the app, so that each worker process calls it, and call `shutdown` when the app's lifespan
    ends: a server that ends by a signal, as uvicorn does, runs nothing at exit.

    Args:
        service_name: the service's name where the environment gives none; by default the SDK's `unknown_service`.
        resource_attributes: what else to say about the process; the environment's attributes override these.

    Raises:
        RuntimeError: there is a `TracerProvider` or `MeterProvider` already. Nothing is changed.
        ValueError: a variable has a value that is unknown here. Nothing is changed.
        ImportError: the extra, or the exporter for `grpc`, is not installed. Nothing is changed.
    """
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
    except ImportError as error:
        raise ImportError(f"configure_telemetry() needs {_EXTRA}") from error

    if _setting("OTEL_SDK_DISABLED").lower() == "true":
        return Configured(TracerProvider(shutdown_on_exit=False), MeterProvider(shutdown_on_exit=False))
    _refuse_to_replace()
    span_exporters = list(_exporters("TRACES", ConsoleSpanExporter))
    metric_exporters = list(_exporters("METRICS", ConsoleMetricExporter))

    attributes = dict(resource_attributes or {})
    if service_name is not None:
        attributes[SERVICE_NAME] = service_name
    # `create` lets its argument win over the environment.
    resource = Resource.create(attributes | dict(OTELResourceDetector().detect().attributes))
    # Without a sampler the provider reads the variables itself.
    sampler = None
    if not _setting("OTEL_TRACES_SAMPLER"):
        sampler = ParentBased(ALWAYS_ON, remote_parent_not_sampled=ALWAYS_ON)
    tracer_provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
    for span_exporter in span_exporters:
        tracer_provider.add_span_processor(BatchSpanProcessor(span_exporter))
    readers = [PeriodicExportingMetricReader(metric_exporter) for metric_exporter in metric_exporters]
    meter_provider = MeterProvider(readers, resource, shutdown_on_exit=False)
    trace.set_tracer_provider(tracer_provider)
    metrics.set_meter_provider(meter_provider)
    configured = Configured(tracer_provider, meter_provider, (_Caller(), _Caller()))
    atexit.register(configured.shutdown)
    return configured


def _setting(variable: str) -> str:
    """A variable's value; an empty one counts as unset, as the specification says."""
    return os.environ.get(variable, "").strip()


def _refuse_to_replace() -> None:
    # With these variables the API loads a provider as soon as it is asked for one.
    tracer_provider = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ or trace.get_tracer_provider()
    if not isinstance(tracer_provider, trace.ProxyTracerProvider):
        raise RuntimeError("this process has a TracerProvider for its traces already: add an exporter to that one")
    meter_provider = "OTEL_PYTHON_METER_PROVIDER" in os.environ or metrics.get_meter_provider()
    # The API's two are the one that does nothing, which somebody has set, and its proxy, which has no public name.
    is_of_api = type(meter_provider).__module__.startswith("opentelemetry.metrics")
    if not is_of_api or isinstance(meter_provider, metrics.NoOpMeterProvider):
        raise RuntimeError("this process has a MeterProvider for its metrics already: add a reader to that one")


def _exporters(signal: Signal, console: Callable[[], Any]) -> Iterator[Any]:
    variable = f"OTEL_{signal}_EXPORTER"
    for name in dict.fromkeys(part.strip().lower() for part in (_setting(variable) or "otlp").split(",")):
        if name == "otlp":
            yield _otlp_exporter(signal)
        elif name == "console":
            yield console()
        elif name != "none":
            raise ValueError(f"{variable}: {name!r} is none of otlp, console and none")


def _otlp_exporter(signal: Signal) -> Any:
    """It reads endpoint, headers, compression, time-out and certificates from the environment itself."""
    variable = _variable(signal, "PROTOCOL")
    protocol = _setting(variable) or "http/protobuf"
    if protocol not in _PROTOCOLS:
        raise ValueError(f"{variable}: {protocol!r} is neither http/protobuf nor grpc")
    variable = _variable(signal, "HEADERS")
    if not _are_headers(variable):
        raise ValueError(f"{variable}: not a list of name=value with values that are URL-encoded")
    package, distribution = _PROTOCOLS[protocol]
    module, _, name = _EXPORTERS[signal].partition(".")
    try:
        found = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{package}.{module}")
    except ImportError as error:
        raise ImportError(f"to export {signal.lower()} by {protocol} needs {distribution}") from error
    return getattr(found, name)()


def _variable(signal: Signal, what: str) -> str:
    """The name of the signal's own variable where it is set, else of the one for all signals."""
    own = f"OTEL_EXPORTER_OTLP_{signal}_{what}"
    return own if _setting(own) else f"OTEL_EXPORTER_OTLP_{what}"


def _are_headers(variable: str) -> bool:
    """Whether nothing in it ends in a log: headers hold tokens, and what cannot be sent is told in full."""
    for part in filter(None, map(str.strip, _setting(variable).split(","))):
        found = _HEADER.fullmatch(part)
        if found is None or not unquote(found[1]).isprintable():
            return False
    return True


class Configured:
    """What `configure_telemetry` has set up.

    Attributes:
        tracer_provider: the SDK's, for what a host adds, a `SpanTreePrinter` for instance.
        meter_provider: likewise.
    """

    def __init__(
        self, tracer_provider: TracerProvider, meter_provider: MeterProvider, callers: Sequence[_Caller] = ()
    ) -> None:
        self.tracer_provider = tracer_provider
        self.meter_provider = meter_provider
        # One for each provider: metrics do not wait for traces that nobody takes. None where nothing is recorded.
        self._callers = callers
        self._closed = False

    def flush(self, seconds: float = 5.0) -> bool:
        """Export what there is now, and wait for it so many seconds. Returns whether that was enough."""
        return self._call(self.tracer_provider.force_flush, self.meter_provider.force_flush, seconds)

    def shutdown(self, seconds: float = 5.0) -> bool:
        """Export what there is now and end, in so many seconds at most. Returns whether that was enough.

        The exit of the process calls it. Without a collector the exporters would go on for half a minute.
        """
        if self._closed:
            return True
        self._closed = True
        return self._call(self.tracer_provider.shutdown, self.meter_provider.shutdown, seconds)

    def _call(self, traces: Callable[[], object], metrics: Callable[[], object], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        called = [caller.call(function) for caller, function in zip(self._callers, (traces, metrics), strict=False)]
        return all([done.wait(max(0.0, deadline - time.monotonic())) for done in called])


class _Caller:
    """A thread that calls functions, there from the start: none can be started while the process exits."""

    def __init__(self) -> None:
        self._start()
        # No thread lives on in a child; Windows has no fork.
        with suppress(AttributeError):
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], object], threading.Event]] = SimpleQueue()
        threading.Thread(target=self._run, args=(self._calls,), name="configure_telemetry", daemon=True).start()

    @staticmethod
    def _run(calls: SimpleQueue[tuple[Callable[[], object], threading.Event]]) -> None:
        while True:
            call, done = calls.get()
            # The SDK reports a reader that fails by `Exception`; its exporters have logged why.
            with suppress(Exception):
                call()
            done.set()

    def call(self, function: Callable[[], object]) -> threading.Event:
        done = threading.Event()
        self._calls.put((function, done))
        return done
