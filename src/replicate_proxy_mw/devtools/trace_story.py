"""What the trace viewer shows: requests, and the story of one of them, made of spans. Pure: no clock, no I/O."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Literal, TypeGuard

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from ..operations import OPERATIONS
from ..routing import STREAM, WEBHOOK
from ..telemetry import names
from ..telemetry.scrub import BARE, REDACTED, is_secret_name

SCOPE = "replicate_proxy_mw"

# Characters of a value, and of a name.
MAX_TEXT = 8 * 1024
MAX_NAME = 256

# Attributes, events and links of a span, each: what OpenTelemetry's SDK has by default.
MAX_PARTS = 128

# Lines of the list, and rows of a story.
MAX_LINES = 200
MAX_ROWS = 500

# Characters of a search, each word of which is looked for in all requests.
MAX_QUERY = 500

Scalar = str | int | float | bool
Attributes = Mapping[str, Scalar]
Pairs = tuple[tuple[str, str], ...]
Kind = Literal["create", "poll", "cancel", "stream", "webhook", "request", "attempt", "queue", "run", "host"]

# Nanoseconds before and after 1970 that a browser has dates for.
MAX_TIME = 864 * 10**19

# Control characters but for tabs and line feeds, marks that change the direction of writing, lone surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What a host's own spans may tell of a caller: headers of its request, and the URL of a stream, which is a secret.
_HEADER = re.compile(r"http\.(?:request|response)\.header\.(.+)")
_STREAM = re.compile(r"(/-/streams/)[^/?#\s\"'<>]+")

_STATUS = re.compile("[1-5][0-9]{2}")

# Where the name of a model stands. Of a request that is under way, only its attempts know it.
_MODEL = (names.MODEL_NAME, names.GEN_AI_RESPONSE_MODEL, names.GEN_AI_REQUEST_MODEL)

# In what order attributes are shown; the longest prefix counts.
_ORDER = (
    "error.type",
    "replicate_proxy.outcome",
    "replicate_proxy.",
    "replicate.",
    "portkey.",
    "gen_ai.",
    "",
    "http.",
    "url.",
    "otel.",
)


@dataclass(frozen=True, slots=True)
class SeenEvent:
    name: str
    time: int
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSpan:
    """A span as it is kept: ids in hex, times in nanoseconds since the epoch, texts cut and fit to be shown.

    Attributes:
        scope: whose it is, by instrumentation scope.
        end: None while it is open.
        links: the trace and span that each leads to.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    scope: str
    kind: SpanKind
    name: str
    start: int
    end: int | None
    status: str
    description: str
    attributes: Attributes
    events: tuple[SeenEvent, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def own(self) -> bool:
        return self.scope == SCOPE

    @property
    def is_request(self) -> bool:
        return self.own and self.kind in (SpanKind.SERVER, SpanKind.INTERNAL)

    @property
    def is_run(self) -> bool:
        return self.own and names.OBSERVED_BY in self.attributes

    @property
    def seconds(self) -> float | None:
        return None if self.end is None else round((self.end - self.start) / 1e9, 6)

    def text(self, *wanted: str) -> str | None:
        """The first of these attributes that is there."""
        for name in wanted:
            if (value := self.attributes.get(name)) is not None:
                return value if isinstance(value, str) else shown(value)
        return None

    def number(self, name: str) -> float | None:
        value = self.attributes.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return value

    @property
    def code(self) -> int | None:
        value = self.number(names.HTTP_RESPONSE_STATUS_CODE)
        return None if value is None else int(value)

    @property
    def prediction_id(self) -> str | None:
        return self.text(names.PREDICTION_ID, names.TRAINING_ID)


def seen(span: ReadableSpan) -> SeenSpan:
    """`span` as it is now."""
    context, parent, scope = span.get_span_context(), span.parent, span.instrumentation_scope
    assert context is not None
    start = _time(span.start_time or 0)
    own = scope is not None and scope.name == SCOPE
    # The proxy's own have no secrets any more.
    clean = str if own else without_secrets
    return SeenSpan(
        trace_id=format_trace_id(context.trace_id),
        span_id=format_span_id(context.span_id),
        parent_id=None if parent is None else format_span_id(parent.span_id),
        scope="" if scope is None else visible(scope.name, MAX_NAME),
        kind=span.kind,
        name=clean(visible(span.name, MAX_NAME)),
        start=start,
        end=None if span.end_time is None else _time(span.end_time),
        status=span.status.status_code.name.lower(),
        description=clean(visible(span.status.description or "")),
        attributes=_attributes(span.attributes, own=own),
        events=tuple(
            SeenEvent(
                clean(visible(event.name, MAX_NAME)),
                _time(event.timestamp or start),
                _attributes(event.attributes, own=own),
            )
            for event in islice(span.events, MAX_PARTS)
        ),
        links=tuple(
            (format_trace_id(link.context.trace_id), format_span_id(link.context.span_id))
            for link in islice(span.links, MAX_PARTS)
        ),
    )


def _time(nanoseconds: int) -> int:
    return max(-MAX_TIME, min(nanoseconds, MAX_TIME))


def without_secrets(text: str) -> str:
    return _STREAM.sub(rf"\1{REDACTED}", BARE(text))


def _attributes(attributes: Mapping[str, Any] | None, *, own: bool) -> dict[str, Scalar]:
    told: dict[str, Scalar] = {}
    for name, value in islice((attributes or {}).items(), MAX_PARTS):
        text = value if _is_number(value) else shown(value) if own else _of_host(str(name), value)
        told[visible(str(name), MAX_NAME)] = text
    return told


def _of_host(name: str, value: object) -> str:
    header = _HEADER.fullmatch(name)
    if header is not None and (is_secret_name(header[1]) or header[1].endswith("config")):
        return REDACTED
    return without_secrets(shown(value))


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one, or a truth value. An integer may have more digits than anybody wants to read."""
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def shown(value: object) -> str:
    """An attribute's value as text."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")  # small amounts of money without an exponent
    try:
        return visible(json.dumps(value, ensure_ascii=False, default=str))
    except (TypeError, ValueError, RecursionError):
        return visible(repr(type(value)))


def visible(text: str, most: int = MAX_TEXT) -> str:
    """Cut, with a mark that says so. What would be seen as something else than it is becomes an escape."""
    if len(text) > most:
        text = f"{text[:most]}… (cut, {len(text)} characters)"
    if text.isprintable():
        return text
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known of a trace."""

    id: str
    spans: tuple[SeenSpan, ...]

    @cached_property
    def by_id(self) -> dict[str, SeenSpan]:
        return {span.span_id: span for span in self.spans}

    def parent(self, span: SeenSpan) -> SeenSpan | None:
        return None if span.parent_id is None else self.by_id.get(span.parent_id)

    @cached_property
    def runs(self) -> tuple[SeenSpan, ...]:
        return tuple(span for span in self.spans if span.is_run)

    def owner(self, span: SeenSpan) -> Request | None:
        """The request that a span is, or is below of."""
        return self._by_span.get(self._owners[span.span_id])

    @cached_property
    def _owners(self) -> dict[str, str]:
        owners: dict[str, str] = {}
        for span in self.spans:
            way: list[str] = []
            above: SeenSpan | None = span
            while above is not None and above.span_id not in owners and not above.is_request:
                way.append(above.span_id)
                owners[above.span_id] = ""  # until it is known; and where there is none, as in a circle
                above = self.parent(above)
            if above is not None:
                owner = above.span_id if above.is_request else owners[above.span_id]
                owners.update(dict.fromkeys((*way, above.span_id), owner))
        return owners

    @cached_property
    def _by_span(self) -> dict[str, Request]:
        below: dict[str, list[SeenSpan]] = {span.span_id: [] for span in self.spans if span.is_request}
        for span in self.spans:
            owner = self._owners[span.span_id]
            if owner and not span.is_request:
                below[owner].append(span)
        return {id: Request(self.by_id[id], tuple(spans)) for id, spans in below.items()}

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """In the order of their start."""
        return tuple(sorted(self._by_span.values(), key=lambda request: request.span.start))

    @cached_property
    def predictions(self) -> frozenset[str]:
        ids = [request.prediction_id for request in self.requests]
        return frozenset(id for id in (*ids, *(span.prediction_id for span in self.runs)) if id)


@dataclass(frozen=True, eq=False)
class Request:
    """A request span, and those below it."""

    span: SeenSpan
    below: tuple[SeenSpan, ...]

    @cached_property
    def attempts(self) -> tuple[SeenSpan, ...]:
        return tuple(span for span in self.below if span.own and not span.is_run)

    @cached_property
    def run(self) -> SeenSpan | None:
        return next((span for span in self.below if span.is_run), None)

    @cached_property
    def prediction_id(self) -> str | None:
        """An attempt knows it while the request is under way."""
        known = (attempt.text(names.GEN_AI_RESPONSE_ID) for attempt in reversed(self.attempts))
        return self.span.prediction_id or next((id for id in known if id), None)

    @cached_property
    def summary(self) -> Summary:
        span, run = self.span, self.run
        told = run or span
        metadata = len(names.PORTKEY_METADATA)
        return Summary(
            trace_id=span.trace_id,
            span_id=span.span_id,
            start=_milliseconds(span.start),
            duration=span.seconds,
            method=span.text(names.HTTP_REQUEST_METHOD),
            route=span.text(names.HTTP_ROUTE),
            status=span.code,
            outcome=span.text(names.OUTCOME),
            error=span.text(names.ERROR_TYPE) or told.text(names.ERROR_TYPE),
            operation=_operation(span),
            tenant=span.text(names.TENANT) or told.text(names.TENANT),
            model=next(filter(None, (one.text(*_MODEL) for one in (told, span, *self.attempts))), None),
            prediction_id=self.prediction_id,
            prediction_status=told.text(names.PREDICTION_STATUS),
            cost=told.number(names.COST),
            currency=told.text(names.COST_CURRENCY),
            queue_time=told.number(names.QUEUE_TIME),
            run_time=told.number(names.RUN_TIME),
            portkey_trace_id=_said(self, names.PORTKEY_TRACE_ID),
            metadata={
                name[metadata:]: shown(value)
                for name, value in _saying(self).items()
                if name.startswith(names.PORTKEY_METADATA)
            },
        )

    @cached_property
    def kind(self) -> Kind:
        return _kind(self.span)

    @cached_property
    def alike(self) -> Hashable:
        """The same for polls of a prediction that came to the same; for every other request, what is of it alone."""
        summary = self.summary
        if self.kind != "poll" or summary.duration is None or summary.prediction_id is None or self.run is not None:
            return self.span.trace_id, self.span.span_id
        return (
            *(summary.prediction_id, summary.prediction_status, summary.tenant),
            *(summary.status, summary.outcome, summary.error),
        )


def _saying(request: Request) -> Attributes:
    """What the caller says of itself is on the attempts while the request is under way."""
    if request.span.end is None and request.attempts:
        return request.attempts[0].attributes
    return request.span.attributes


def _said(request: Request, name: str) -> str | None:
    value = _saying(request).get(name)
    return None if value is None else shown(value)


@dataclass(frozen=True, eq=False)
class Summary:
    """A line of the list: a request, or the first of `count` polls that came to the same, with the start of the last in
    `until`. `start` and `until` are in milliseconds since the epoch, the other times are in seconds; what is not known
    (yet) is None. Cost, times and status are those of the run, once that is told. `first` says whether the request is
    the one that its trace's id stands for."""

    trace_id: str
    span_id: str
    start: float
    duration: float | None
    method: str | None
    route: str | None
    status: int | None
    outcome: str | None
    error: str | None
    operation: str | None
    tenant: str | None
    model: str | None
    prediction_id: str | None
    prediction_status: str | None
    cost: float | None
    currency: str | None
    queue_time: float | None
    run_time: float | None
    portkey_trace_id: str | None
    metadata: Mapping[str, str]
    first: bool = True
    count: int = 1
    until: float | None = None


@dataclass(frozen=True, eq=False)
class Listing:
    """What matches: how many requests there are, and the newest lines of them."""

    total: int
    requests: tuple[Summary, ...]


def listing(traces: Sequence[Trace], query: str) -> Listing:
    """The requests in which each word of `query` occurs, the newest first. Polls that came to the same are one line,
    where the first of them was: a client that polls each second would leave nothing else in sight."""
    requests = sorted(
        (request for trace in traces for request in trace.requests), key=lambda request: request.span.start
    )
    # A stream does not say whose it is and of which model, and a create not how its prediction stands by now.
    models: dict[str | None, str] = {}
    tenants: dict[str | None, str] = {}
    statuses: dict[str | None, str] = {}
    for request in requests:
        summary = request.summary
        if summary.model is not None:
            models[summary.prediction_id] = summary.model
        if summary.tenant is not None and request.kind == "create":
            tenants[summary.prediction_id] = summary.tenant
        if summary.prediction_status is not None:
            statuses[summary.prediction_id] = summary.prediction_status
    words = query[:MAX_QUERY].casefold().split()
    found: dict[Hashable, list[Summary]] = {}
    for request in requests:
        summary = request.summary
        if (id := summary.prediction_id) is not None:
            if summary.model is None and id in models:
                summary = replace(summary, model=models[id])
            if request.kind == "stream" and id in tenants:
                summary = replace(summary, tenant=tenants[id])
            if request.run is None and id in statuses and request.kind == "create":
                summary = replace(summary, prediction_status=statuses[id])
        if not words or _matches(summary, request.span, words):
            found.setdefault(request.alike, []).append(summary)
    named = {(trace.id, trace.requests[0].span.span_id) for trace in traces if trace.requests}
    lines = tuple(_line(alike, named) for alike in islice(reversed(found.values()), MAX_LINES))
    return Listing(sum(map(len, found.values())), lines)


def _line(alike: Sequence[Summary], named: Collection[_Key]) -> Summary:
    summary, count = alike[0], len(alike)
    first = (summary.trace_id, summary.span_id) in named
    if first and count == 1:
        return summary
    return replace(summary, first=first, count=count, until=alike[-1].start if count > 1 else None)


def _matches(summary: Summary, span: SeenSpan, words: Sequence[str]) -> bool:
    said = _text(
        *(summary.portkey_trace_id, summary.prediction_status, summary.tenant, summary.model, summary.operation),
        *(summary.outcome, summary.error, summary.route, None if summary.status is None else str(summary.status)),
        *(f"{name}={value}\n{name}:{value}" for name, value in summary.metadata.items()),
    )
    # Of many random ids some have any status code in them.
    ids = _text(summary.trace_id, summary.prediction_id, span.text(names.URL_PATH))
    return all(word in said or (word in ids and not _STATUS.fullmatch(word)) for word in words)


def _text(*fields: str | None) -> str:
    return "\n".join(field for field in fields if field).casefold()


@dataclass(frozen=True, eq=False)
class Event:
    name: str
    time: float
    attributes: Pairs


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """A line of the story. Times are in milliseconds since the epoch, `end` is None while it is open."""

    id: str
    trace_id: str
    parent: str | None
    depth: int
    kind: Kind
    name: str
    start: float
    end: float | None
    status: str
    code: int | None
    current: bool
    attributes: Pairs
    events: tuple[Event, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Story:
    """All that is known of the prediction of a request; of a request that is about none, its trace.

    `end` is None while anything of it is open; `omitted` is how many requests were left off, since they are too many.
    """

    trace_id: str
    span_id: str
    prediction_id: str | None
    model: str | None
    tenant: str | None
    start: float
    end: float | None
    rows: tuple[Row, ...]
    omitted: int


def story(traces: Sequence[Trace], trace_id: str, span_id: str | None = None) -> Story | None:
    """The story of a request: that of `span_id`, or the first in that trace. None if there is no such span."""
    trace = next((trace for trace in traces if trace.id == trace_id), None)
    if trace is None or not trace.spans or (span_id is not None and span_id not in trace.by_id):
        return None
    asked = None if span_id is None else trace.owner(trace.by_id[span_id])
    if asked is None:
        asked = next(iter(trace.requests), None)
    # Of a create that is not held any more, the run may be all that there is.
    prediction = next(iter(sorted(trace.predictions)), None) if asked is None else asked.prediction_id
    if prediction is None:
        traces, groups = (trace,), _groups(trace, (), trace.id, asked)
    else:
        members = _members(traces, prediction)
        ids = {id for id, _ in members}
        traces = [one for one in traces if one.id in ids]
        groups = [group for one in traces for group in _groups(one, _others(one, members), trace.id, asked)]
    groups.sort(key=lambda group: group[0].start)
    omitted = _thin(groups)
    rows = [row for group in groups for row in group]
    if not rows:  # each is below another: nothing that happens, but spans may say anything
        return None
    told = [] if asked is None else [asked.span, *asked.attempts]
    told += [span for one in traces for span in one.spans if span.own and span.prediction_id == prediction]
    ends = [row.end for row in rows]
    return Story(
        trace_id=trace_id,
        span_id=trace.spans[0].span_id if asked is None else asked.span.span_id,
        prediction_id=prediction,
        model=next(filter(None, (span.text(*_MODEL) for span in told)), None),
        tenant=next(filter(None, (span.text(names.TENANT) for span in told)), None),
        start=min(row.start for row in rows),
        end=None if None in ends else max(end for end in ends if end is not None),
        rows=tuple(rows),
        omitted=omitted,
    )


_Key = tuple[str, str]


def _members(traces: Iterable[Trace], prediction: str) -> set[_Key]:
    """The requests about a prediction, and its run. What only a link tells is about it, too."""
    requests = [request for trace in traces for request in trace.requests]
    about = [request for request in requests if request.prediction_id == prediction]
    members = {(request.span.trace_id, request.span.span_id) for request in about}
    linked = {link for request in about for link in request.span.links}
    for request in requests:
        key = request.span.trace_id, request.span.span_id
        if request.prediction_id is None and (key in linked or members.intersection(request.span.links)):
            members.add(key)
    for trace in traces:
        members.update((trace.id, span.span_id) for span in trace.runs if span.prediction_id == prediction)
    return members


def _others(trace: Trace, members: Collection[_Key]) -> Collection[str]:
    """The spans of `trace` that are not about it: a caller may have several requests in one trace."""
    wanted: set[str] = set()
    others: set[str] = set()
    for span in (*(request.span for request in trace.requests), *trace.runs):
        marked = wanted if (trace.id, span.span_id) in members else others
        above: SeenSpan | None = span
        while above is not None and above.span_id not in marked:
            marked.add(above.span_id)
            above = trace.parent(above)
    return others - wanted


def _groups(trace: Trace, hidden: Collection[str], trace_id: str, asked: Request | None) -> list[list[Row]]:
    """The rows of each span without a parent here: itself, then what is below it. Not recursive: traces may be deep."""
    children: dict[str, list[SeenSpan]] = {"": []}
    for span in sorted(trace.spans, key=lambda span: span.start, reverse=True):
        if span.span_id not in hidden:
            above = trace.parent(span)
            children.setdefault("" if above is None else above.span_id, []).append(span)
    groups = []
    for root in reversed(children[""]):
        group: list[Row] = []
        stack = [(root, 0)]
        while stack:
            span, depth = stack.pop()
            current = trace.id == trace_id and asked in (None, trace.owner(span))
            group += _rows(trace, span, depth, current=current)
            stack.extend((child, depth + 1) for child in children.get(span.span_id, ()))
        groups.append(group)
    return groups


def _rows(trace: Trace, span: SeenSpan, depth: int, *, current: bool) -> Iterator[Row]:
    above = trace.parent(span)
    whole = Row(
        id=span.span_id,
        trace_id=trace.id,
        parent=None if above is None else above.span_id,
        depth=depth,
        kind=_kind(span),
        name=span.name,
        start=_milliseconds(span.start),
        end=None if span.end is None else _milliseconds(span.end),
        status=span.status,
        code=span.code,
        current=current,
        attributes=_pairs(span),
        events=tuple(Event(event.name, _milliseconds(event.time), _sorted(event.attributes)) for event in span.events),
        links=tuple(dict.fromkeys(trace_id for trace_id, _ in span.links)),
    )
    started = next((event.time for event in span.events if event.name == names.STARTED), None)
    if not span.is_run or started is None:
        yield whole
        return
    told = {name: value for name, value in span.attributes.items() if name == names.QUEUE_TIME}
    yield replace(
        whole,
        id=f"{span.span_id}.queue",
        kind="queue",
        name="queue",
        end=_milliseconds(started),
        status="unset",
        attributes=_sorted(told),
        events=(),
        links=(),
    )
    yield replace(whole, start=_milliseconds(started))


def _thin(groups: list[list[Row]]) -> int:
    """Leave off what is most of it, polls mostly, beginning with the oldest; how many requests that were."""
    rows, omitted = sum(map(len, groups)), 0
    for group in [*groups]:
        if rows <= MAX_ROWS:
            break
        if not any(row.current or row.kind in ("create", "queue", "run") for row in group):
            groups.remove(group)
            rows -= len(group)
            omitted += sum(row.depth == 0 for row in group)
    return omitted


def _kind(span: SeenSpan) -> Kind:
    if not span.own:
        return "host"
    if span.is_run:
        # One that was given up before it began has only waited; of a stream's end nobody knows the times.
        waited = span.text(names.PREDICTION_STATUS) != "succeeded" and span.text(names.OBSERVED_BY) != "stream"
        return "queue" if waited and not any(event.name == names.STARTED for event in span.events) else "run"
    if not span.is_request:
        return "attempt"
    route = span.text(names.HTTP_ROUTE) or ""
    if route.endswith(STREAM.template):
        return "stream"
    if route.endswith(WEBHOOK.template):
        return "webhook"
    kind = _KINDS.get(_operation(span) or "", "request")
    # A stranger who asks for it has seen nothing of it.
    return "request" if kind == "poll" and span.text(names.OUTCOME) in _REFUSED else kind


def _kinds() -> Iterator[tuple[str, Kind]]:
    for operation in OPERATIONS:
        if operation.creates in ("prediction", "training"):
            yield operation.id, "create"
        elif operation.reads in ("prediction", "training"):
            yield operation.id, "cancel" if operation.id.endswith(".cancel") else "poll"


_KINDS = dict(_kinds())
_REFUSED = frozenset(("auth_missing", "auth_invalid", "denied", "limited", "bad_request"))


def _operation(span: SeenSpan) -> str | None:
    """While it is open, a request span has no more than method and route."""
    told = span.text(names.REPLICATE_OPERATION)
    if told is not None:
        return told
    method, route = span.text(names.HTTP_REQUEST_METHOD), span.text(names.HTTP_ROUTE) or ""
    fits = [operation for operation in OPERATIONS if method == operation.method and route.endswith(operation.path)]
    return max(fits, key=lambda operation: len(operation.path)).id if fits else None


def _pairs(span: SeenSpan) -> Pairs:
    told = dict(span.attributes)
    if span.description:
        told["otel.status_description"] = span.description
    if not span.own:
        told["otel.scope.name"] = span.scope
    return _sorted(told)


def _sorted(attributes: Attributes) -> Pairs:
    told = sorted(attributes.items(), key=lambda pair: (_rank(pair[0]), pair[0]))
    return tuple((name, value if isinstance(value, str) else shown(value)) for name, value in told)


@lru_cache(4096)
def _rank(name: str) -> int:
    return _ORDER.index(max((prefix for prefix in _ORDER if name.startswith(prefix)), key=len))


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)
