from __future__ import annotations

import io
import sys
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer
from opentelemetry.util.types import AttributeValue

from replicate_proxy_mw.devtools import SpanTreePrinter, render

SECOND = 1_000_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def tracer_of(printer: SpanTreePrinter) -> Tracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(printer)
    return provider.get_tracer("tests")


def remote(*, is_remote: bool = True) -> SpanContext:
    return SpanContext(0xABC, 0xDEF, is_remote=is_remote, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class Recorder:
    """Makes finished spans, with times of its own."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("tests")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def shape(text: str) -> list[str]:
    """The lines without the trace id, which differs from run to run."""
    first, *others = text.rstrip("\n").split("\n")
    assert first.startswith("trace ")
    return others


def test_a_tree_has_a_line_for_each_span_and_the_telling_attributes_below_it(recorder: Recorder) -> None:
    caller = {"portkey.trace_id": "t-1", "portkey.metadata.team": "design"}
    request = recorder.tracer.start_span(
        "POST /v1/predictions",
        kind=SpanKind.SERVER,
        start_time=0,
        attributes={
            "http.request.method": "POST",
            "http.route": "/v1/predictions",
            "url.path": "/v1/predictions",
            "user_agent.original": "curl",
            **caller,
            "portkey.metadata_json": '{"team":"design"}',
            "replicate.operation": "predictions.create",
            "replicate_proxy.tenant": "team-a",
            "replicate_proxy.outcome": "forwarded",
            "http.response.status_code": 201,
        },
    )
    attempt = recorder.tracer.start_span(
        "POST /v1/predictions",
        trace.set_span_in_context(request),
        kind=SpanKind.CLIENT,
        start_time=SECOND // 1000,
        attributes={
            "url.full": "https://api.replicate.com/v1/predictions",
            "gen_ai.request.model": "meta/llama",
            "http.request.resend_count": 1,
            "http.response.status_code": 201,
            **caller,
        },
    )
    attempt.end(SECOND // 100)
    request.end(SECOND // 80)
    assert shape(render(recorder.spans)) == [
        "└─ POST /v1/predictions     201    12.5 ms  SERVER",
        "   │   outcome=forwarded  tenant=team-a  operation=predictions.create",
        "   │   portkey.trace_id=t-1  portkey.metadata.team=design",
        "   └─ POST /v1/predictions  201     9.0 ms  CLIENT",
        "          url.full=https://api.replicate.com/v1/predictions  gen_ai.request.model=meta/llama",
        "          http.request.resend_count=1",
    ]


def test_siblings_come_in_the_order_of_their_start_at_any_depth(recorder: Recorder) -> None:
    root = recorder.tracer.start_span("root", start_time=0)
    inside = trace.set_span_in_context(root)
    second = recorder.tracer.start_span("second", inside, start_time=2)
    first = recorder.tracer.start_span("first", inside, start_time=1)
    below = recorder.tracer.start_span("below", trace.set_span_in_context(first), start_time=3)
    for span in (second, below, first, root):
        span.end(2 * SECOND + 3)
    assert shape(render(recorder.spans)) == [
        "└─ root         unset     2.00 s  INTERNAL",
        "   ├─ first     unset     2.00 s  INTERNAL",
        "   │  └─ below  unset     2.00 s  INTERNAL",
        "   └─ second    unset     2.00 s  INTERNAL",
    ]


def test_statuses(recorder: Recorder) -> None:
    for name, status, code in (
        ("unset", None, None),
        ("ok", Status(StatusCode.OK), None),
        ("denied", None, 403),
        ("failed", Status(StatusCode.ERROR, "boom"), None),
        ("unavailable", Status(StatusCode.ERROR), 503),
    ):
        span = recorder.tracer.start_span(name, start_time=len(recorder.spans))
        if code is not None:
            span.set_attributes({"http.response.status_code": code, "error.type": str(code)})
        if status is not None:
            span.set_status(status)
        span.end(len(recorder.spans))
    assert shape(render(recorder.spans)) == [
        "├─ unset        unset         0.0 ms  INTERNAL",
        "├─ ok           ok            0.0 ms  INTERNAL",
        "├─ denied       403           0.0 ms  INTERNAL",
        "│      error.type=403",
        "├─ failed       error         0.0 ms  INTERNAL",
        "│      status=boom",
        "└─ unavailable  503 error     0.0 ms  INTERNAL",
        "       error.type=503",
    ]
    coloured = render(recorder.spans, colour=True)
    for shown, colour in (("unset", 2), ("ok", 32), ("403", 33), ("error", 31), ("503 error", 31)):
        assert f"\x1b[{colour}m{shown.ljust(9)}\x1b[0m" in coloured


def test_an_error_type_is_repeated_other_attributes_are_not(recorder: Recorder) -> None:
    said = {"error.type": "upstream_timeout", "portkey.trace_id": "t-1"}
    request = recorder.tracer.start_span("request", start_time=0, attributes=said)
    recorder.tracer.start_span("attempt", trace.set_span_in_context(request), start_time=1, attributes=said).end(1)
    request.end(1)
    assert shape(render(recorder.spans))[1:] == [
        "   │   error.type=upstream_timeout",
        "   │   portkey.trace_id=t-1",
        "   └─ attempt  unset     0.0 ms  INTERNAL",
        "          error.type=upstream_timeout",
    ]


def test_the_path_is_told_where_there_is_no_route(recorder: Recorder) -> None:
    recorder.tracer.start_span("GET", start_time=0, attributes={"url.path": "/nowhere", "url.scheme": "http"}).end(0)
    assert shape(render(recorder.spans)) == ["└─ GET  unset     0.0 ms  INTERNAL", "       url.path=/nowhere"]


def test_values_of_every_type(recorder: Recorder) -> None:
    attributes: dict[str, AttributeValue] = {"a": True, "b": 1.5, "c": ["x", "y"], "d": "two words", "e": "", "f": "é"}
    recorder.tracer.start_span("span", start_time=0, attributes=attributes).end(0)
    assert shape(render(recorder.spans))[1:] == ['       a=true  b=1.5  c=["x", "y"]  d="two words"  e=""  f=é']


def test_a_small_amount_is_written_out(recorder: Recorder) -> None:
    attributes = {"replicate.prediction.cost": 3.8e-06, "replicate.prediction.run_time": 1.0}
    recorder.tracer.start_span("span", start_time=0, attributes=attributes).end(0)
    assert shape(render(recorder.spans))[1:] == ["       prediction.cost=0.0000038  prediction.run_time=1.0"]


def test_a_prediction_comes_before_what_was_seen_of_it_and_both_before_the_rest(recorder: Recorder) -> None:
    names = (
        "gen_ai.response.id",
        "replicate_proxy.lifecycle.polls",
        "replicate.model.name",
        "replicate.prediction.cost",
        "replicate.prediction.status",
        "replicate.prediction.id",
        "replicate.operation",
        "replicate_proxy.tenant",
        "replicate_proxy.outcome",
        "error.type",
    )
    recorder.tracer.start_span("span", start_time=0, attributes=dict.fromkeys(names, "x")).end(0)
    told = " ".join(shape(render(recorder.spans))[1:]).replace("=x", "").split()
    assert told == [name.removeprefix("replicate_proxy.").removeprefix("replicate.") for name in reversed(names)]


def test_what_callers_send_cannot_control_the_terminal(recorder: Recorder) -> None:
    attributes = {"portkey.metadata.user": "\x1b[2J\r\nada\x9b\u202e\ud800", "k\x1b": "v", "long": "x" * 1000}
    recorder.tracer.start_span("na\nme\x1b]0;title\x07", start_time=0, attributes=attributes).end(0)
    text = render(recorder.spans)
    assert text.replace("\n", "").isprintable()
    assert r"portkey.metadata.user=\x1b[2J\r\nada\x9b\u202e\ud800" in text
    assert r"na\nme\x1b]0;title\x07" in text
    assert f"long={'x' * 159}…" in text


def test_events_and_links(recorder: Recorder) -> None:
    span = recorder.tracer.start_span("span", start_time=0, links=[Link(remote())])
    span.add_event("started", timestamp=SECOND // 2)
    span.add_event("exception", {"exception.type": "KeyError", "exception.stacktrace": "…"}, timestamp=2 * SECOND)
    span.end(2 * SECOND)
    assert shape(render(recorder.spans))[1:] == [
        f'       link="trace {"0" * 29}abc"',
        "       +500.0 ms started",
        "       +2.00 s exception  exception.type=KeyError",
    ]


def test_a_parent_elsewhere_is_named(recorder: Recorder) -> None:
    for is_remote in (True, False):
        parent = trace.set_span_in_context(NonRecordingSpan(remote(is_remote=is_remote)))
        recorder.tracer.start_span("span", parent, start_time=0).end(0)
    from_caller, from_here = recorder.spans
    heading = f"trace {'0' * 29}abc  below span {'0' * 13}def"
    assert render([from_caller]).startswith(f"{heading} of the caller\n")
    assert render([from_here]).startswith(f"{heading}\n")


def test_nothing_and_unfinished_spans() -> None:
    assert render([]) == ""
    bare = ReadableSpan("bare", remote())
    assert shape(render([bare])) == ["└─ bare  unset       open  INTERNAL"]


def test_deep_traces_are_no_recursion(recorder: Recorder) -> None:
    depth = sys.getrecursionlimit() + 10
    spans = [recorder.tracer.start_span("0", start_time=0)]
    for number in range(1, depth):
        spans.append(recorder.tracer.start_span(str(number), trace.set_span_in_context(spans[-1]), start_time=number))
    for span in spans:
        span.end(depth)
    assert len(shape(render(recorder.spans))) == depth


def test_the_printer_writes_when_the_last_span_of_the_tree_has_ended() -> None:
    stream = io.StringIO()
    tracer = tracer_of(SpanTreePrinter(stream))
    root = tracer.start_span("root")
    child = tracer.start_span("child", trace.set_span_in_context(root))
    root.end()
    assert stream.getvalue() == ""
    child.end()
    assert [line.split()[1] for line in shape(stream.getvalue())] == ["root", "child"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_span_that_starts_later_is_shown_in_its_tree_once_more(is_remote: bool) -> None:
    stream = io.StringIO()
    tracer = tracer_of(SpanTreePrinter(stream))
    root = tracer.start_span("root")
    tracer.start_span("child", trace.set_span_in_context(root)).end()
    root.end()
    own = root.get_span_context()
    known = SpanContext(own.trace_id, own.span_id, is_remote=is_remote, trace_flags=own.trace_flags)
    for name in ("late", "later"):
        tracer.start_span(name, trace.set_span_in_context(NonRecordingSpan(known))).end()
    trees = [[line.split()[1] for line in shape(tree)] for tree in stream.getvalue().rstrip("\n").split("\n\n")]
    assert trees == [["root", "child"], ["root", "child", "late"], ["root", "child", "late", "later"]]


def test_of_what_was_written_the_oldest_is_forgotten() -> None:
    stream = io.StringIO()
    printer = SpanTreePrinter(stream, max_spans=2)
    tracer = tracer_of(printer)
    oldest = tracer.start_span("oldest")
    oldest.end()
    for name in ("next", "last"):
        tracer.start_span(name).end()
    stream.truncate(0)
    tracer.start_span("late", trace.set_span_in_context(oldest)).end()
    assert "oldest" not in stream.getvalue()
    assert "late" in stream.getvalue()
    assert len(printer._written) == 2


def test_a_remote_parent_in_the_same_process_is_another_tree() -> None:
    stream = io.StringIO()
    tracer = tracer_of(SpanTreePrinter(stream))
    caller = tracer.start_span("caller")
    own = caller.get_span_context()
    sent = SpanContext(own.trace_id, own.span_id, is_remote=True, trace_flags=own.trace_flags)
    tracer.start_span("server", trace.set_span_in_context(NonRecordingSpan(sent))).end()
    assert "server" in stream.getvalue()
    assert "caller  " not in stream.getvalue()
    caller.end()
    assert "caller  " in stream.getvalue()


def test_the_oldest_trees_are_dropped_when_too_many_spans_are_held() -> None:
    stream = io.StringIO()
    printer = SpanTreePrinter(stream, max_spans=3)
    tracer = tracer_of(printer)
    oldest = tracer.start_span("oldest")
    below = tracer.start_span("below", trace.set_span_in_context(oldest))
    kept = [tracer.start_span(f"kept-{number}") for number in range(3)]
    for span in (below, oldest, *kept):
        span.end()
    assert [line.split()[1] for line in stream.getvalue().split("\n") if "└" in line] == ["kept-0", "kept-1", "kept-2"]
    assert printer._trees == {}


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "1", False), ("TERM", "dumb", False), ("NO_COLOR", "", True)],
)
def test_colour_where_the_terminal_has_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, coloured: bool
) -> None:
    monkeypatch.setenv(variable, value)
    stream = Terminal()
    tracer_of(SpanTreePrinter(stream)).start_span("span").end()
    assert ("\x1b[" in stream.getvalue()) is coloured


def test_no_colour_where_there_is_no_terminal_unless_asked_for() -> None:
    plain, forced = io.StringIO(), io.StringIO()
    tracer_of(SpanTreePrinter(plain)).start_span("span").end()
    tracer_of(SpanTreePrinter(forced, colour=True)).start_span("span").end()
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in forced.getvalue()


def test_lines_are_wrapped_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    attributes = {f"attribute.{number}": "value" for number in range(6)}
    tracer_of(SpanTreePrinter(stream, colour=False)).start_span("span", attributes=attributes).end()
    assert max(map(len, stream.getvalue().split("\n")[1:])) <= 40


def test_by_default_it_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    tracer_of(SpanTreePrinter()).start_span("span").end()
    assert "span" in capsys.readouterr().err


def test_what_the_stream_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    tracer_of(SpanTreePrinter(stream)).start_span("été").end()
    assert b"?t?  unset" in raw.getvalue()


def test_errors_stay_inside() -> None:
    stream = io.StringIO()
    tracer = tracer_of(SpanTreePrinter(stream))
    stream.close()
    tracer.start_span("span").end()


def test_spans_that_started_before_the_printer_was_there_are_left_out() -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    span = provider.get_tracer("tests").start_span("span")
    stream = io.StringIO()
    provider.add_span_processor(SpanTreePrinter(stream))
    span.end()
    assert stream.getvalue() == ""


def test_many_threads() -> None:
    stream = io.StringIO()
    tracer = tracer_of(SpanTreePrinter(stream))

    def work() -> None:
        for _ in range(50):
            with tracer.start_as_current_span("root"), tracer.start_as_current_span("child"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trees = stream.getvalue().rstrip("\n").split("\n\n")
    assert len(trees) == 400
    for tree in trees:
        assert [line.split()[1] for line in shape(tree)] == ["root", "child"]
