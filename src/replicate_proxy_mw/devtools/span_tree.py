"""Spans as a tree of text: what an exporter would send away, seen at once in the terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext, StatusCode, format_span_id, format_trace_id

DEFAULT_WIDTH = 100
MAX_TEXT = 160

# What the line above already says (method, route, status code), and what tells one machine from another.
_UNTOLD = ("http.", "url.", "network.", "net.", "server.", "client.", "user_agent.", "portkey.metadata_json")
_TOLD = frozenset(("http.request.resend_count", "url.full"))
# Groups in the order in which they are told; the longest prefix counts.
_ORDER = (
    "error.type",
    "replicate_proxy.outcome",
    "replicate_proxy.",
    "replicate.operation",
    "replicate.prediction.id",
    "replicate.prediction.status",
    "replicate.prediction.",
    "replicate.",
    "replicate_proxy.lifecycle.",
    "",
    "portkey.",
)

Paint = Callable[[str, str], str]

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _CYAN = "1", "2", "31", "32", "33", "36"


class TextStream(Protocol):
    """What is written to: `sys.stderr`, a file, a `StringIO`."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class SpanTreePrinter(SpanProcessor):
    """Writes each trace as a tree, as soon as the last of its spans in this process has ended.

        provider = TracerProvider()
        provider.add_span_processor(SpanTreePrinter())
        trace.set_tracer_provider(provider)

    It shows the spans of every instrumentation. For a span that starts when its tree is already written, as the run of
    a prediction does, the tree is written once more, with it. It may be used from any thread, and an error in it never
    reaches the app.

    Args:
        stream: where to write; `sys.stderr` by default.
        colour: by default where `stream` is a terminal and neither `NO_COLOR` nor `TERM=dumb` is set.
        max_spans: so many are held at most in trees that have not ended, and in those that were written; the oldest
            tree is dropped for a new one.
    """

    def __init__(
        self, stream: TextStream | None = None, *, colour: bool | None = None, max_spans: int = 10_000
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = _is_terminal(self._stream)
        self._colour = self._terminal and _colour_wanted() if colour is None else colour
        self._max_spans = max_spans
        self._trees: dict[tuple[int, int], _Tree] = {}
        self._written: dict[tuple[int, int], _Tree] = {}
        # Re-entrant: a finaliser that the garbage collector runs in here may end a span.
        self._lock = threading.RLock()
        self._writing = threading.RLock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        with suppress(Exception), self._lock:
            parent = span.parent
            tree = None
            if parent is not None:
                key = parent.trace_id, parent.span_id
                if not parent.is_remote:
                    tree = self._trees.get(key)
                if tree is None and (written := self._written.get(key)) is not None:
                    tree = _Tree([*written.spans])
            if tree is None:
                tree = _Tree()
            tree.spans.append(span)
            tree.open += 1
            self._hold(self._trees, [span], tree)

    def on_end(self, span: ReadableSpan) -> None:
        with suppress(Exception):
            with self._lock:
                tree = self._trees.get(_key(span))
                if tree is None:
                    return
                tree.open -= 1
                # Not when the root ends: a server's span may end with the last byte, before those below it.
                if tree.open:
                    return
                for ended in tree.spans:
                    self._trees.pop(_key(ended), None)
                self._hold(self._written, tree.spans, tree)
            self._write(tree.spans)

    def _hold(self, trees: dict[tuple[int, int], _Tree], spans: Sequence[ReadableSpan], tree: _Tree) -> None:
        for span in spans:
            trees.pop(_key(span), None)  # to the end of the order
            trees[_key(span)] = tree
        while len(trees) > self._max_spans:
            for span in next(iter(trees.values())).spans:
                trees.pop(_key(span), None)

    def _write(self, spans: Sequence[ReadableSpan]) -> None:
        width = shutil.get_terminal_size((DEFAULT_WIDTH, 0)).columns if self._terminal else DEFAULT_WIDTH
        text = render(spans, colour=self._colour, width=width)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        with self._writing:
            self._stream.write(text)
            self._stream.flush()


@dataclass(eq=False)
class _Tree:
    spans: list[Span] = field(default_factory=list)
    open: int = 0


def _context(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def _key(span: ReadableSpan) -> tuple[int, int]:
    context = _context(span)
    return context.trace_id, context.span_id


def _is_terminal(stream: TextStream) -> bool:
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())


def _colour_wanted() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render(spans: Iterable[ReadableSpan], *, colour: bool = False, width: int = DEFAULT_WIDTH) -> str:
    """The spans of one trace as text: a line for each with name, status, duration and kind, and what else it tells.

    Namespaces of the proxy's own (`replicate_proxy.`, `replicate.`) are left off, and what a span has in common with
    its parent is said once. Characters that would control a terminal are shown as escapes: values come from callers.
    """
    paint = _paint if colour else _plain
    rows = list(_rows(spans))
    if not rows:
        return ""
    name_width = max(len(row.before + row.name) for row in rows)
    status_width = max(len(_status(row.span)[0]) for row in rows)
    lines = [_heading(rows[0].span, paint)]
    for row in rows:
        status, status_colour = _status(row.span)
        name = paint(row.name, _BOLD) + " " * (name_width - len(row.before + row.name))
        duration = _duration(row.span.start_time, row.span.end_time).rjust(9)
        columns = (name, paint(status.ljust(status_width), status_colour), duration, paint(row.span.kind.name, _CYAN))
        lines.append(paint(row.before, _DIM) + "  ".join(columns))
        for group in _details(row.span, row.parent):
            for line in _wrapped(group, width - len(row.below)):
                lines.append(paint(row.below, _DIM) + "  ".join(paint(key, _DIM) + value for key, value in line))
    return "\n".join(lines) + "\n\n"


@dataclass(frozen=True)
class _Row:
    """A span in its place: `before` stands before its name, `below` before the lines under it."""

    span: ReadableSpan
    parent: ReadableSpan | None
    name: str
    before: str
    below: str


def _rows(spans: Iterable[ReadableSpan]) -> Iterator[_Row]:
    """Depth first, each parent's children in the order of their start. Not recursive: traces may be deep."""
    by_id = {_context(span).span_id: span for span in spans}
    children: dict[int | None, list[ReadableSpan]] = {}
    for span in sorted(by_id.values(), key=lambda span: span.start_time or 0, reverse=True):
        parent_id = span.parent.span_id if span.parent is not None and span.parent.span_id in by_id else None
        children.setdefault(parent_id, []).append(span)
    stack = [(span, "", index == 0) for index, span in enumerate(children.get(None, ()))]
    while stack:
        span, before, last = stack.pop()
        below = before + ("   " if last else "│  ")
        under = children.get(_context(span).span_id, [])
        stack.extend((child, below, index == 0) for index, child in enumerate(under))
        parent = by_id.get(span.parent.span_id) if span.parent is not None else None
        branch = "└─ " if last else "├─ "
        yield _Row(span, parent, _visible(span.name), before + branch, below + ("│   " if under else "    "))


def _heading(span: ReadableSpan, paint: Paint) -> str:
    text = f"trace {format_trace_id(_context(span).trace_id)}"
    if span.parent is not None:
        whose = " of the caller" if span.parent.is_remote else ""
        text += f"  below span {format_span_id(span.parent.span_id)}{whose}"
    return paint(text, _DIM)


def _status(span: ReadableSpan) -> tuple[str, str]:
    """The status code that was answered, or the span's own status; and its colour."""
    code = (span.attributes or {}).get("http.response.status_code")
    if span.status.status_code is StatusCode.ERROR:
        return (f"{code} error" if isinstance(code, int) else "error"), _RED
    if isinstance(code, int):
        return str(code), _YELLOW if code >= 400 else _GREEN
    return span.status.status_code.name.lower(), _GREEN if span.status.status_code is StatusCode.OK else _DIM


def _duration(start: int | None, end: int | None) -> str:
    if start is None or end is None:
        return "open"
    seconds = (end - start) / 1e9
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _details(span: ReadableSpan, parent: ReadableSpan | None) -> Iterator[list[tuple[str, str]]]:
    """What else a span tells, as groups of `key=` and value, each of which begins a line."""
    attributes = span.attributes or {}
    known = (parent.attributes if parent is not None else None) or {}
    told = [
        (name, value)
        for name, value in attributes.items()
        if _is_told(name, attributes) and (name == "error.type" or known.get(name) != value)
    ]
    told.sort(key=lambda item: _rank(item[0]))
    own = [_pair(name, value) for name, value in told if not name.startswith("portkey.")]
    if span.status.description:
        own.insert(0, _pair("status", span.status.description))
    own += [_pair("link", f"trace {format_trace_id(link.context.trace_id)}") for link in span.links]
    yield own
    yield [_pair(name, value) for name, value in told if name.startswith("portkey.")]
    for event in span.events:
        said = [
            _pair(name, value) for name, value in (event.attributes or {}).items() if not name.endswith("stacktrace")
        ]
        yield [(f"+{_duration(span.start_time, event.timestamp)} ", _visible(event.name)), *said]


def _is_told(name: str, attributes: Mapping[str, Any]) -> bool:
    if name == "url.path":
        return "http.route" not in attributes
    return name in _TOLD or not name.startswith(_UNTOLD)


def _rank(name: str) -> int:
    return _ORDER.index(max((prefix for prefix in _ORDER if name.startswith(prefix)), key=len))


def _pair(name: str, value: Any) -> tuple[str, str]:
    if isinstance(value, float):
        text = format(Decimal(repr(value)), "f")  # small amounts of money without an exponent
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = _visible(text)
    label = _visible(name.removeprefix("replicate_proxy.").removeprefix("replicate."))
    return f"{label}=", f'"{text}"' if isinstance(value, str) and (" " in text or not text) else text


def _visible(text: str) -> str:
    """Shortened; without control characters, lone surrogates and marks that reverse the direction of writing."""
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 1] + "…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _wrapped(pairs: Iterable[tuple[str, str]], width: int) -> Iterator[list[tuple[str, str]]]:
    line: list[tuple[str, str]] = []
    length = 0
    for key, value in pairs:
        size = len(key) + len(value) + 2
        if line and length + size > width:
            yield line
            line, length = [], 0
        line.append((key, value))
        length += size
    if line:
        yield line


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def _plain(text: str, colour: str) -> str:
    return text
