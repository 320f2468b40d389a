"""The newest traces of this process, for the trace viewer."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import format_trace_id

from .trace_story import SCOPE, SeenSpan, Trace, seen

# Bytes that a span takes beside its text, as measured with 25 attributes.
_OVERHEAD = 5000


class TraceBuffer(SpanProcessor):
    """Holds the newest traces that a span of the proxy is in, for a `TraceViewer`.

        traces = TraceBuffer()
        provider.add_span_processor(traces)

    Spans of other instrumentations are held where a span of the proxy is in the same trace. Spans that are still open
    are there, too. It is of one process: each worker has a buffer of its own, and a forked process begins with an
    empty one. It may be used from any thread, and an error in it never reaches the app.

    Args:
        max_traces: so many are held at most; the one is dropped in which nothing has happened for longest, neither a
            request nor another that links to it. A poll is a trace of its own, so that a thousand are soon there.
        max_spans_per_trace: a caller whose `traceparent` is always the same has all its requests in one trace. Of the
            host's spans those that come later are left off, then the oldest of the proxy's.
        max_bytes: of memory, roughly, in all: callers decide how long their paths and their metadata are.

    Raises:
        ValueError: one of them is less than 1.
    """

    def __init__(
        self, *, max_traces: int = 1000, max_spans_per_trace: int = 500, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        if min(max_traces, max_spans_per_trace, max_bytes) < 1:
            raise ValueError("max_traces, max_spans_per_trace and max_bytes are at least 1.")
        self._max_traces, self._max_spans, self._max_bytes = max_traces, max_spans_per_trace, max_bytes
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        # Not from 0: a page that is still open would take another process's version for this one's.
        self._version = time.time_ns() // 1000
        self._size = 0
        self._held: OrderedDict[int, _Held] = OrderedDict()
        # Open traces of the host's, which a span of the proxy may come to.
        self._pending: OrderedDict[int, _Held] = OrderedDict()
        self._arrived: deque[tuple[ReadableSpan, bool]] = deque()
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self._arrive(span, ended=False)

    def on_end(self, span: ReadableSpan) -> None:
        self._arrive(span, ended=True)

    def __deepcopy__(self, memo: object) -> TraceBuffer:
        # Litestar's routers copy their handlers with all that they hold.
        return self

    @property
    def version(self) -> int:
        """Another one as soon as a span has begun or ended. As `snapshot`, not for a finaliser."""
        self._of_this_process()
        with self._lock:
            self._sort_in()
            return self._version

    def snapshot(self) -> Snapshot:
        """What is held now. Not for a finaliser, which may have interrupted a span that is read here."""
        self._of_this_process()
        with self._lock:
            self._sort_in()
            return Snapshot(self._version, tuple(held.trace() for held in self._held.values()))

    def _arrive(self, span: ReadableSpan, *, ended: bool) -> None:
        with suppress(Exception):
            self._of_this_process()
            self._arrived.append((span, ended))
            # Nobody waits: whoever has the lock, or is next, sorts this one in. A finaliser that the garbage collector
            # runs in there may end a span in the very thread that has it.
            if self._lock.acquire(blocking=False):
                try:
                    self._sort_in()
                finally:
                    self._lock.release()

    def _of_this_process(self) -> None:
        # The lock of a process that was forked may have been held by a thread that is not in this one.
        if self._process != os.getpid():
            self._begin()

    def _sort_in(self) -> None:
        while self._arrived:
            span, ended = self._arrived.popleft()
            with suppress(Exception):
                self._sort(span, ended)

    def _sort(self, span: ReadableSpan, ended: bool) -> None:
        context = span.get_span_context()
        assert context is not None
        id, own = context.trace_id, span.instrumentation_scope is not None and span.instrumentation_scope.name == SCOPE
        held = self._held.get(id)
        if held is None and own:
            held = self._held[id] = self._pending.pop(id, _Held(format_trace_id(id)))
        elif held is None and not ended:
            held = self._pending.setdefault(id, _Held(format_trace_id(id)))
        elif held is None:
            held = self._pending.get(id)
        # One of the host's that was left off, or that began before this buffer was there.
        if held is None or (ended and not own and context.span_id not in held.of_host):
            return
        size = held.size
        held.put(context.span_id, _Entry(span, ended), own=own, most=self._max_spans)
        self._size += held.size - size
        if id in self._held:
            self._version += 1
            if own:
                for link in span.links:
                    self._touch(link.context.trace_id)
                self._touch(id)
        elif not held.open:
            self._drop(self._pending, id)
        self._make_room()

    def _touch(self, id: int) -> None:
        if id in self._held:
            self._held.move_to_end(id)

    def _make_room(self) -> None:
        while len(self._pending) > self._max_traces or (self._pending and self._size > self._max_bytes):
            self._drop(self._pending, next(iter(self._pending)))
        while len(self._held) > self._max_traces or (len(self._held) > 1 and self._size > self._max_bytes):
            self._drop(self._held, next(iter(self._held)))

    def _drop(self, traces: OrderedDict[int, _Held], id: int) -> None:
        self._size -= traces.pop(id).size


class Snapshot(NamedTuple):
    """The last trace is the one where something has changed last."""

    version: int
    traces: tuple[Trace, ...]


class _Entry:
    """A span as it is in memory. It is read when somebody wants to see it, and once it has ended, no more than once."""

    def __init__(self, span: ReadableSpan, ended: bool) -> None:
        self._span, self.is_open = span, not ended
        self.size = _OVERHEAD + (_size(span) if ended else 0)
        self._seen: SeenSpan | None = None

    def seen(self) -> SeenSpan:
        if self._seen is not None:
            return self._seen
        now = seen(self._span)
        if not self.is_open:
            self._seen = now
            del self._span
        return now


def _size(span: ReadableSpan) -> int:
    told = [span.attributes or {}, *(event.attributes or {} for event in span.events)]
    return len(span.status.description or "") + sum(_length(value) for part in told for value in part.values())


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 8 if isinstance(value, (bool, int, float)) else len(str(value))


@dataclass(eq=False)
class _Held:
    """A trace. Spans that are open are there as they are, since more is said of them until they end."""

    id: str
    of_proxy: dict[int, _Entry] = field(default_factory=dict)
    of_host: dict[int, _Entry] = field(default_factory=dict)
    open: int = 0
    size: int = 0
    _trace: Trace | None = None

    def put(self, id: int, entry: _Entry, *, own: bool, most: int) -> None:
        entries = self.of_proxy if own else self.of_host
        if id in entries:
            self._count(entries[id], -1)
        elif len(self.of_proxy) + len(self.of_host) >= most:
            if not own:
                return
            self._count(self.of_host.popitem()[1] if self.of_host else entries.pop(next(iter(entries))), -1)
        entries[id] = entry
        self._count(entry, 1)
        self._trace = None

    def _count(self, entry: _Entry, sign: int) -> None:
        self.open += sign * entry.is_open
        self.size += sign * entry.size

    def trace(self) -> Trace:
        if self._trace is None or self.open:
            spans: list[SeenSpan] = []
            for entry in (*self.of_host.values(), *self.of_proxy.values()):
                with suppress(Exception):
                    spans.append(entry.seen())
            self._trace = Trace(self.id, tuple(spans))
        return self._trace
