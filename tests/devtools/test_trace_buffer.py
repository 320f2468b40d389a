from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags, Tracer

from replicate_proxy_mw import MappingKeyResolver, ReplicateProxyMiddleware
from replicate_proxy_mw.devtools import TraceBuffer
from replicate_proxy_mw.devtools.trace_buffer import _OVERHEAD
from tests.raw_asgi import TOKEN, call, http_scope

OURS = "replicate_proxy_mw"


class Process:
    """What is in a process: a buffer, the proxy's tracer and a host's."""

    def __init__(self, **options: Any) -> None:
        self.buffer = TraceBuffer(**options)
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(self.buffer)
        self.proxy: Tracer = self.provider.get_tracer(OURS)
        self.host: Tracer = self.provider.get_tracer("host")

    @property
    def names(self) -> list[list[str]]:
        """Of the spans of each trace, that in which something happened last being the last."""
        return [[span.name for span in held.spans] for held in self.buffer.snapshot().traces]

    def request(self, name: str, *, links: tuple[Link, ...] = ()) -> Any:
        span = self.proxy.start_span(name, kind=SpanKind.SERVER, links=links)
        span.end()
        return span


def below(span: Any) -> Any:
    return trace.set_span_in_context(span)


def named(context: SpanContext) -> Any:
    """As a `traceparent` names it."""
    known = SpanContext(context.trace_id, context.span_id, is_remote=True, trace_flags=TraceFlags(1))
    return trace.set_span_in_context(NonRecordingSpan(known))


def tell_sizes(buffer: TraceBuffer) -> tuple[int, int]:
    """What it has counted, and what there is."""
    held = [*buffer._held.values(), *buffer._pending.values()]
    return buffer._size, sum(entry.size for one in held for entry in (*one.of_host.values(), *one.of_proxy.values()))


def test_a_trace_of_the_proxy_is_held_once_it_has_begun() -> None:
    process = Process()
    request = process.proxy.start_span("request", kind=SpanKind.SERVER)
    [held] = process.buffer.snapshot().traces
    assert (held.id, held.spans[0].end) == (f"{request.get_span_context().trace_id:032x}", None)
    request.set_attribute("said", "later")
    assert process.buffer.snapshot().traces[0].spans[0].attributes == {"said": "later"}
    request.end(5)
    [span] = process.buffer.snapshot().traces[0].spans
    assert (span.end, span.attributes) == (5, {"said": "later"})


@pytest.mark.anyio
async def test_spans_of_the_host_are_held_where_the_proxy_is_in_the_same_trace() -> None:
    process = Process()
    app = FastAPI(telemetry={"logs": False, "metrics": False, "tracer_provider": process.provider})

    @app.get("/own")
    def own() -> None:
        pass

    app.add_middleware(
        ReplicateProxyMiddleware,
        key_resolver=MappingKeyResolver({"pk-team-a": TOKEN}),
        tracer_provider=process.provider,
    )
    await call(app, http_scope("GET", "/own"))
    assert process.names == []
    await call(app, http_scope("GET", "/v1/account", []))
    [held] = process.buffer.snapshot().traces
    assert [(span.own, span.kind) for span in held.spans] == [(False, SpanKind.SERVER), (True, SpanKind.INTERNAL)]
    assert process.buffer._pending == {}
    counted, there = tell_sizes(process.buffer)
    assert counted == there > 0


def test_what_the_host_does_in_its_own_traces_is_forgotten_when_it_ends() -> None:
    process = Process()
    with process.host.start_as_current_span("page"), process.host.start_as_current_span("query"):
        pass
    assert process.names == []
    assert process.buffer._pending == {}
    assert tell_sizes(process.buffer) == (0, 0)


def test_spans_of_the_host_may_begin_before_the_proxys_and_end_after_them() -> None:
    process = Process()
    with process.host.start_as_current_span("page"):
        process.host.start_span("before").end()
        process.request("request")
        process.host.start_span("after").end()
    assert process.names == [["page", "before", "after", "request"]]


def test_what_began_before_the_buffer_was_there() -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    request = provider.get_tracer(OURS).start_span("request", kind=SpanKind.SERVER)
    page = provider.get_tracer("host").start_span("page", below(request))
    other = provider.get_tracer("host").start_span("other")
    buffer = TraceBuffer()
    provider.add_span_processor(buffer)
    for span in (page, other, request):
        span.end()
    assert [[span.name for span in held.spans] for held in buffer.snapshot().traces] == [["request"]]


def test_a_snapshot_has_another_version_when_anything_has_changed() -> None:
    process = Process()
    versions = [process.buffer.snapshot().version, process.buffer.snapshot().version]
    request = process.proxy.start_span("request")
    versions.append(process.buffer.snapshot().version)
    request.end()
    versions.append(process.buffer.snapshot().version)
    process.host.start_span("page").end()
    versions.append(process.buffer.snapshot().version)
    assert versions[0] == versions[1] < versions[2] < versions[3] == versions[4] < 2**53


def test_the_version_is_told_without_reading_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process()
    request = process.proxy.start_span("request")
    with monkeypatch.context() as patch:
        patch.setattr(type(request), "attributes", property(lambda span: pytest.fail("it is read")))
        version = process.buffer.version
        assert version == process.buffer.version
    request.end()
    assert process.buffer.version > version


def test_one_process_has_another_version_than_the_one_before() -> None:
    before = Process()
    for _ in range(10):
        before.request("request")
    after = Process()
    after.request("request")
    assert before.buffer.snapshot().version != after.buffer.snapshot().version


def test_of_too_many_traces_that_is_dropped_where_nothing_has_happened_for_longest() -> None:
    process = Process(max_traces=3)
    create, other, *_ = [process.request(name) for name in ("create", "other", "third")]
    process.request("poll", links=(Link(create.get_span_context()),))
    assert process.names == [["third"], ["create"], ["poll"]]
    late = process.proxy.start_span("run", named(create.get_span_context()), SpanKind.CLIENT)
    late.end()
    process.request("next")
    assert process.names == [["poll"], ["create", "run"], ["next"]]
    process.request("gone", links=(Link(other.get_span_context()),))
    assert process.names == [["create", "run"], ["next"], ["gone"]]
    counted, there = tell_sizes(process.buffer)
    assert counted == there > 0


def test_what_comes_to_a_trace_that_was_dropped_is_held_anew() -> None:
    process = Process(max_traces=1)
    create = process.request("create")
    stream = process.proxy.start_span("stream", kind=SpanKind.SERVER)
    process.request("poll")
    stream.end()
    assert process.names == [["stream"]]
    process.proxy.start_span("run", named(create.get_span_context()), SpanKind.CLIENT).end()
    assert process.names == [["run"]]


def test_of_too_many_spans_in_a_trace_those_of_the_host_are_left_off_first() -> None:
    process = Process(max_spans_per_trace=3)
    page = process.host.start_span("page")
    process.proxy.start_span("first", below(page)).end()
    process.host.start_span("send", below(page)).end()
    dropped = process.host.start_span("left off", below(page))
    assert process.names == [["page", "send", "first"]]
    dropped.end()
    for name in ("second", "third"):
        process.proxy.start_span(name, below(page)).end()
    assert process.names == [["first", "second", "third"]]
    page.end()
    process.proxy.start_span("fourth", below(page)).end()
    assert process.names == [["second", "third", "fourth"]]
    assert tell_sizes(process.buffer)[0] == tell_sizes(process.buffer)[1]
    [held] = process.buffer._held.values()
    assert held.open == 0


def test_open_traces_of_the_host_are_bounded_too() -> None:
    process = Process(max_traces=2)
    pages = [process.host.start_span(f"page {number}") for number in range(3)]
    for page in pages:
        process.proxy.start_span("request", below(page)).end()
    assert process.names == [["page 1", "request"], ["page 2", "request"]]
    for page in pages:
        page.end()
    assert tell_sizes(process.buffer)[0] == tell_sizes(process.buffer)[1]


def test_long_texts_leave_room_for_fewer_traces() -> None:
    process = Process(max_bytes=5 * _OVERHEAD)
    page = process.host.start_span("page")
    for number in range(4):
        process.request(f"request {number}")
    assert process.names == [["request 0"], ["request 1"], ["request 2"], ["request 3"]]
    texts: dict[str, Any] = {"text": "x" * _OVERHEAD, "list": ["y" * 200], "number": 1.5}
    span = process.proxy.start_span("long", attributes=texts)
    assert process.names == [["request 0"], ["request 1"], ["request 2"], ["request 3"], ["long"]]
    assert len(process.buffer._pending) == 0
    span.add_event("event", {"text": "z" * _OVERHEAD})
    span.end()
    page.end()
    assert process.names == [["request 3"], ["long"]]
    assert 5 * _OVERHEAD > process.buffer._size > 3 * _OVERHEAD + 200
    assert tell_sizes(process.buffer)[0] == tell_sizes(process.buffer)[1]


def test_one_trace_is_held_however_long_it_is() -> None:
    process = Process(max_bytes=1)
    for name in ("first", "second"):
        process.request(name)
    assert process.names == [["second"]]


@pytest.mark.parametrize("option", ["max_traces", "max_spans_per_trace", "max_bytes"])
def test_bounds_are_at_least_one(option: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TraceBuffer(**{option: 0})


class Broken(ReadableSpan):
    """Its attributes cannot be read."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        raise RuntimeError("broken")


class BrokenSpan(Broken, Span):
    def __new__(cls, *args: Any, **keywords: Any) -> BrokenSpan:
        return object.__new__(cls)

    def __init__(self, context: SpanContext | None) -> None:
        ReadableSpan.__init__(self, "broken", context, instrumentation_scope=InstrumentationScope(OURS))


def test_errors_stay_inside() -> None:
    process = Process()
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    process.buffer.on_start(BrokenSpan(None))
    process.buffer.on_start(BrokenSpan(context))
    process.request("request")
    assert process.names == [[], ["request"]]
    process.buffer.on_end(BrokenSpan(context))
    process.buffer.on_end(None)  # type: ignore[arg-type]
    assert process.names == [[], ["request"]]


def test_a_span_that_ends_while_the_buffer_is_at_work_in_the_same_thread_is_sorted_in_later() -> None:
    process = Process()
    with process.buffer._lock:  # as when the garbage collector runs a finaliser in there
        process.request("request")
    assert process.names == [["request"]]


def test_many_threads_and_a_reader() -> None:
    process = Process(max_traces=50, max_spans_per_trace=3, max_bytes=60 * _OVERHEAD)
    done = threading.Event()
    seen: list[int] = []

    def work() -> None:
        for _ in range(100):
            with process.host.start_as_current_span("page"), process.proxy.start_as_current_span("request") as span:
                process.proxy.start_span("attempt", kind=SpanKind.CLIENT).end()
                span.set_attribute("text", "x" * 100)

    def read() -> None:
        while not done.is_set():
            seen.append(len(process.buffer.snapshot().traces))

    threads = [threading.Thread(target=work) for _ in range(6)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert 0 < max(seen) <= 50
    assert 0 < len(process.names) <= 50
    assert all(span.end is not None for held in process.buffer.snapshot().traces for span in held.spans)
    assert tell_sizes(process.buffer)[0] == tell_sizes(process.buffer)[1] <= 60 * _OVERHEAD
    assert process.buffer._pending == {}


FORKED = """
import os, sys, warnings
from opentelemetry.sdk.trace import TracerProvider
from replicate_proxy_mw.devtools import TraceBuffer

buffer = TraceBuffer()
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(buffer)
tracer = provider.get_tracer("replicate_proxy_mw")
tracer.start_span("of the parent").end()
buffer._lock.acquire()  # by a thread that the child has not
if os.fork() == 0:
    empty = buffer.snapshot().traces
    tracer.start_span("of the child").end()
    [held] = buffer.snapshot().traces
    os._exit(0 if not empty and [span.name for span in held.spans] == ["of the child"] else 1)
buffer._lock.release()
_, status = os.wait()
[held] = buffer.snapshot().traces
print(os.waitstatus_to_exitcode(status), [span.name for span in held.spans])
"""


def test_a_forked_process_begins_with_an_empty_buffer() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=30)
    assert done.stdout == "0 ['of the parent']\n", done.stderr


def test_what_another_process_has_begun_is_left_to_it() -> None:
    process = Process()
    process.request("of the parent")
    process.buffer._lock.acquire()
    process.buffer._process = -1  # as if this were its child
    process.request("of the child")
    assert process.names == [["of the child"]]


def test_copies_are_the_buffer_itself() -> None:
    buffer = TraceBuffer()
    assert copy.deepcopy([buffer]) == [buffer]
