from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.metrics import _internal as metrics_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.util._once import Once

from replicate_proxy_mw.telemetry.setup import Configured, configure_telemetry
from tests.otlp import Sink

UNSAMPLED = trace.set_span_in_context(NonRecordingSpan(SpanContext(1, 2, is_remote=True)))
SAMPLED = trace.set_span_in_context(
    NonRecordingSpan(SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)))
)


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API's globals as they are when a process starts, and no variables."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(metrics_api, "_METER_PROVIDER", None)
    monkeypatch.setattr(metrics_api, "_METER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(metrics_api, "_PROXY_METER_PROVIDER", metrics_api._ProxyMeterProvider())


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sink]:
    with Sink() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        yield sink


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


def _record(configured: Configured | None = None) -> None:
    tracer_provider = configured.tracer_provider if configured else trace.get_tracer_provider()
    tracer = tracer_provider.get_tracer("test")
    tracer.start_span("root").end()
    tracer.start_span("sampled", SAMPLED).end()
    tracer.start_span("unsampled", UNSAMPLED).end()
    meter_provider = configured.meter_provider if configured else metrics.get_meter_provider()
    meter_provider.get_meter("test").create_counter("requests").add(1)


def _exported(sink: Sink) -> set[str]:
    return {span.name for span in sink.spans} | set(sink.metrics)


def _nothing_is_set() -> bool:
    return isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider) and isinstance(
        metrics.get_meter_provider(), metrics_api._ProxyMeterProvider
    )


def test_one_line_sends_spans_and_metrics(sink: Sink) -> None:
    configured = configure_telemetry(service_name="shop")
    assert trace.get_tracer_provider() is configured.tracer_provider
    assert metrics.get_meter_provider() is configured.meter_provider
    _record()
    assert configured.flush()
    assert _exported(sink) == {"root", "sampled", "unsampled", "requests"}
    assert {span.resource["service.name"] for span in sink.spans} == {"shop"}
    assert sink.metrics["requests"][0].resource["service.name"] == "shop"
    trace.get_tracer("test").start_span("last").end()
    assert configured.shutdown()
    assert configured.shutdown()
    assert "last" in _exported(sink)


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, {"service_name": "a"}, {"service.name": "a"}),
        ({}, {"resource_attributes": {"x": "1"}, "service_name": "a"}, {"service.name": "a", "x": "1"}),
        ({}, {"resource_attributes": {"service.name": "b"}, "service_name": "a"}, {"service.name": "a"}),
        ({"OTEL_SERVICE_NAME": "env"}, {"service_name": "a"}, {"service.name": "env"}),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=env,x=2"}, {"service_name": "a"}, {"service.name": "env"}),
        ({"OTEL_RESOURCE_ATTRIBUTES": "x=2"}, {"resource_attributes": {"x": "1", "y": "1"}}, {"x": "2", "y": "1"}),
    ],
)
def test_the_environment_overrides_what_the_code_says_of_the_process(
    sink: Sink,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: dict[str, Any],
    expected: dict[str, str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configured = configure_telemetry(**arguments)
    _record()
    assert configured.shutdown()
    for resource in (sink.spans[0].resource, sink.metrics["requests"][0].resource):
        assert resource["telemetry.sdk.language"] == "python"
        assert {name: resource.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OTEL_TRACES_SAMPLER": ""}, {"root", "sampled", "unsampled"}),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, {"root", "sampled"}),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, set()),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, {"sampled"}),
    ],
)
def test_the_sampler_of_the_environment(
    sink: Sink, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: set[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configured = configure_telemetry()
    _record()
    assert configured.shutdown()
    assert _exported(sink) == expected | {"requests"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, {"requests"}),
        ({"OTEL_METRICS_EXPORTER": "none"}, {"root", "sampled", "unsampled"}),
        ({"OTEL_TRACES_EXPORTER": "", "OTEL_METRICS_EXPORTER": "NONE"}, {"root", "sampled", "unsampled"}),
        ({"OTEL_TRACES_EXPORTER": "otlp, otlp", "OTEL_METRICS_EXPORTER": "none"}, {"root", "sampled", "unsampled"}),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, {"root", "sampled", "unsampled", "requests"}),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
            | {"OTEL_METRICS_EXPORTER": "none"},
            {"root", "sampled", "unsampled"},
        ),
    ],
)
def test_the_exporters_of_the_environment(
    sink: Sink, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: set[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configured = configure_telemetry()
    _record()
    assert configured.shutdown()
    assert _exported(sink) == expected
    assert len(sink.spans) in (0, 3)


def test_the_console_beside_a_collector(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp,console")
    configured = configure_telemetry()
    _record()
    assert configured.shutdown()
    assert _exported(sink) == {"root", "sampled", "unsampled", "requests"}


def test_headers_and_compression_are_the_exporters_own_concern(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20hunter2, x-a=b c=d,")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "authorization=other")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    configured = configure_telemetry()
    _record()
    assert configured.shutdown()
    sent = {export.path: export.headers for export in sink.exports}
    assert {path: headers["content-encoding"] for path, headers in sent.items()} == dict.fromkeys(sent, "gzip")
    assert sent["/v1/traces"]["authorization"] == "Bearer hunter2"
    assert sent["/v1/traces"]["x-a"] == "b c=d"
    assert sent["/v1/metrics"]["authorization"] == "other"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: 'zipkin' is none of otlp, console and none"),
        ("OTEL_METRICS_EXPORTER", "otlp,", "OTEL_METRICS_EXPORTER: '' is none of otlp, console and none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json' is neither"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "x", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL: 'x' is neither"),
    ],
)
def test_a_value_that_is_unknown(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        configure_telemetry()
    assert _nothing_is_set()


@pytest.mark.parametrize("value", ["hunter2", "Bearer hunter2,a=b", 'a="hunter2"', "a=hunter2;b=c", "a=hunter2%0D%0Ab"])
@pytest.mark.parametrize("signal", ["", "TRACES_", "METRICS_"])
def test_headers_that_cannot_be_sent_are_told_to_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, signal: str, value: str
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}HEADERS", value)
    with pytest.raises(ValueError, match=f"OTEL_EXPORTER_OTLP_{signal}HEADERS: ") as raised:
        configure_telemetry()
    told = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    # The first frame is this test's.
    told.stack.pop(0)
    assert "hunter2" not in "".join(told.format()) + caplog.text
    assert _nothing_is_set()


@pytest.mark.parametrize(
    ("module", "protocol", "message"),
    [
        ("sdk.metrics", "", r"configure_telemetry\(\) needs replicate-proxy-mw\[otlp\]"),
        ("exporter.otlp.proto.http.trace_exporter", "", r"traces by http/protobuf needs replicate-proxy-mw\[otlp\]"),
        ("exporter.otlp.proto.grpc.trace_exporter", "grpc", "by grpc needs opentelemetry-exporter-otlp-proto-grpc"),
    ],
)
def test_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, protocol: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, f"opentelemetry.{module}", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with pytest.raises(ImportError, match=message):
        configure_telemetry()
    assert _nothing_is_set()


@pytest.mark.parametrize(
    ("host_sets", "signal"),
    [
        (lambda: trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False)), "traces"),
        (lambda: trace.set_tracer_provider(trace.NoOpTracerProvider()), "traces"),
        (lambda: metrics.set_meter_provider(MeterProvider(shutdown_on_exit=False)), "metrics"),
        (lambda: metrics.set_meter_provider(metrics.NoOpMeterProvider()), "metrics"),
        (lambda: os.environ.update(OTEL_PYTHON_TRACER_PROVIDER="missing"), "traces"),
        (lambda: os.environ.update(OTEL_PYTHON_METER_PROVIDER="missing"), "metrics"),
    ],
)
def test_what_the_host_has_set_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, host_sets: Callable[[], None], signal: str
) -> None:
    for variable in ("OTEL_PYTHON_TRACER_PROVIDER", "OTEL_PYTHON_METER_PROVIDER"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    host_sets()
    before = trace._TRACER_PROVIDER, metrics_api._METER_PROVIDER
    with pytest.raises(RuntimeError, match=f"for its {signal} already"):
        configure_telemetry()
    assert before == (trace._TRACER_PROVIDER, metrics_api._METER_PROVIDER)


def test_a_second_call_is_refused(sink: Sink) -> None:
    configured = configure_telemetry()
    with pytest.raises(RuntimeError, match="already"):
        configure_telemetry()
    _record()
    assert configured.shutdown()
    assert "root" in _exported(sink)


def test_disabled_by_the_environment(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    configured = configure_telemetry()
    assert _nothing_is_set()
    _record(configured)
    assert configured.flush()
    assert configured.shutdown()
    assert sink.exports == []


@pytest.mark.usefixtures("silent")
def test_a_collector_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    configured = configure_telemetry()
    _record()
    assert not configured.flush(0.05)
    assert not configured.shutdown(0.05)


PROGRAM = """
import os, sys
from opentelemetry import metrics, trace
from replicate_proxy_mw.telemetry.setup import configure_telemetry
configured = configure_telemetry()
counter = metrics.get_meter("test").create_counter("requests")
counter.add(1)
trace.get_tracer("test").start_span("root").end()
"""


def _run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=15,
        check=True,
    )


def test_the_exit_of_the_process_sends_what_is_left(sink: Sink) -> None:
    done = _run(PROGRAM)
    assert (done.stdout, done.stderr) == ("", "")
    assert _exported(sink) == {"root", "requests"}


def test_a_shutdown_before_the_exit_is_the_only_one(sink: Sink) -> None:
    done = _run(PROGRAM + "assert configured.shutdown()")
    assert (done.stdout, done.stderr) == ("", "")
    assert _exported(sink) == {"root", "requests"}


@pytest.mark.usefixtures("silent")
def test_the_exit_of_the_process_does_not_wait_for_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter2")
    done = _run(PROGRAM)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_exit_without_a_collector_prints_only_what_the_sdk_has_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter2")
    done = _run(PROGRAM)
    assert done.stdout == ""
    assert "Connection refused" in done.stderr
    assert "replicate_proxy_mw" not in done.stderr
    assert "hunter2" not in done.stderr


FORK = """
child = os.fork()
trace.get_tracer("test").start_span("parent" if child else "child").end()
if child:
    assert os.waitpid(child, 0) == (child, 0)
"""


def test_a_worker_that_was_forked_sends_its_own(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    done = _run(PROGRAM + FORK, "-W", "ignore::DeprecationWarning")
    assert (done.stdout, done.stderr) == ("", "")
    names = [span.name for span in sink.spans]
    assert sorted(names) == ["child", "parent", "root"]


def test_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "console")
    done = _run(PROGRAM)
    assert done.stdout.count('"name": "root"') == done.stdout.count('"name": "requests"') == 1
    assert done.stderr == ""


def test_without_the_extra_the_module_can_be_imported() -> None:
    missing = "import sys\nsys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"
    done = _run(missing + "import replicate_proxy_mw.telemetry.setup as setup\nprint(setup.Configured.__name__)")
    assert done.stdout == "Configured\n"
