"""One prediction, one story: from what requests see of it, its run is told once, below the request that created it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from ..errors import StoreFailed
from ..store import Ledger, StoredPrediction
from . import attributes, content, names
from .attributes import Attributes
from .prediction import Prediction
from .request import RequestSpan, Sighting, named

if TYPE_CHECKING:
    from .prices import Cost, PriceList

# Seconds in which somebody else may know more of a prediction that has ended.
GRACE = 2.0

# Predictions whose end was told by this process.
MAX_OBSERVED = 10_000

# Bytes of what is kept until the end.
MAX_DETAILS = 2048

# Seconds since the epoch: OTLP has 64 bits for nanoseconds, and what does not fit spoils the whole export.
MAX_TIME = 2.0**33

_json = json.JSONEncoder(separators=(",", ":")).encode

_SAID = frozenset(
    (names.PORTKEY_TRACE_ID, names.PORTKEY_SPAN_ID, names.PORTKEY_PARENT_SPAN_ID, names.PORTKEY_SPAN_NAME)
)

_ERRORS = {"failed": "prediction_failed", "aborted": "deadline_exceeded"}


class Details(NamedTuple):
    """What telemetry keeps of a create for the end: in the store, as text.

    Attributes:
        model, version, deployment, created_at: as the create's answer had them, for an end that does not tell.
        caller: what the caller said of itself.
        capture: whether content may be captured: not where the caller has asked for the contrary.
    """

    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    created_at: float | None = None
    caller: Mapping[str, str] | None = None
    capture: bool = False

    def text(self) -> str:
        """At most 2 KiB: where metadata is longer, all but the trace id is left off; then all names are."""
        caller = self.caller or {}
        text = self._text(caller)
        if len(text) > MAX_DETAILS:
            text = self._text({name: caller[name] for name in (names.PORTKEY_TRACE_ID,) if name in caller})
        if len(text) > MAX_DETAILS:
            text = self._replace(model=None, version=None, deployment=None)._text({})
        return text

    def _text(self, caller: Mapping[str, str]) -> str:
        known = self._asdict() | {"caller": caller}
        return _json({name: value for name, value in known.items() if value})

    @classmethod
    def of(cls, text: str | None) -> Details:
        """What was kept; nothing of it is believed beyond its type, since others may write to the store."""
        try:
            kept = json.loads(text or "{}")
        except (ValueError, RecursionError):
            kept = None
        if not isinstance(kept, dict):
            return cls()
        model, version, deployment = (
            value if isinstance(value := kept.get(name), str) else None for name in ("model", "version", "deployment")
        )
        created_at, caller = kept.get("created_at"), kept.get("caller")
        return cls(
            model=model,
            version=version,
            deployment=deployment,
            created_at=created_at if type(created_at) is float and 0 <= created_at < MAX_TIME else None,
            caller={name: value for name, value in caller.items() if isinstance(value, str) and _is_said(name)}
            if isinstance(caller, dict)
            else None,
            capture=kept.get("capture") is True,
        )


def _is_said(name: str) -> bool:
    """Whether it is what a caller says of itself, on all spans."""
    return name.startswith(names.PORTKEY_METADATA) or name in _SAID


class Story:
    """What is known of predictions beyond a request, and what becomes of it.

    Args:
        ledger: the store, bounded in time.
        tracer: makes the runs' spans.
        prices: what a run costs, None where nobody says.
        capture: whether input and output are shown, and where.
        redact: the host's own say in that.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        tracer: Tracer,
        prices: PriceList | None,
        capture: content.Mode,
        redact: content.Redact | None,
    ) -> None:
        self._ledger, self._tracer, self._prices = ledger, tracer, prices
        self._capture, self._redact = capture, redact
        self._observed: OrderedDict[str, None] = OrderedDict()

    async def tell(self, request: RequestSpan) -> None:
        """Tell what `request` has seen, and end its span: the answer has left."""
        sighting, afterwards = request.sighting, request.afterwards
        if sighting is None:  # what goes on without its request has dropped it
            request.end()
            return
        # They hold this very call: else a request, with its secrets, would be left to the garbage collector.
        request.afterwards = []
        seen = _Seen(None)
        try:
            seen = await self._look(sighting, request)
            self._link(seen.stored, sighting, request)
        finally:
            request.end()
        prediction = sighting.prediction
        if prediction is None or not prediction.is_final or (seen.stored is not None and seen.stored.reported):
            return
        # After what layers have to do: the host's prices may take their time.
        afterwards.append(partial(self._end, seen, sighting, prediction, request))

    async def _look(self, sighting: Sighting, request: RequestSpan) -> _Seen:
        """What the store has, after what was seen is added."""
        prediction = sighting.prediction
        try:
            if sighting.by == "create" and prediction is not None:
                created = self._created(prediction, request)
                await self._ledger.call(lambda store: store.put(prediction.id, created))
                return _Seen(created)
            if sighting.by == "poll" and prediction is not None:
                return _Seen(await self._ledger.call(lambda store: store.read(prediction.id, prediction.status)))
        except StoreFailed:
            return _Seen(None, failed=True)
        return await self._known(sighting.id)

    def _created(self, prediction: Prediction, request: RequestSpan) -> StoredPrediction:
        details = Details(
            model=prediction.model,
            version=prediction.version,
            deployment=prediction.deployment,
            created_at=prediction.created_at,
            caller=request.said,
            capture=request.may_capture,
        )
        return StoredPrediction(
            tenant=request.tenant,
            traceparent=request.traceparent,
            details=details.text(),
            status=prediction.status,
        )

    def _link(self, stored: StoredPrediction | None, sighting: Sighting, request: RequestSpan) -> None:
        if stored is None or sighting.by == "create":
            return
        if (created := named(stored.traceparent)) is not None:
            request.span.add_link(created.get_span_context())
        prediction = sighting.prediction
        # What was just created is starting, if nobody has looked.
        if sighting.by == "poll" and prediction is not None and prediction.status != (stored.status or "starting"):
            request.notes[names.TRANSITION] = True

    async def _end(self, seen: _Seen, sighting: Sighting, prediction: Prediction, request: RequestSpan) -> None:
        """Tell the run, unless it has been told."""
        early = seen.stored is None and not seen.failed
        if early and prediction.id in self._observed:
            return
        if sighting.by == "stream" or (early and sighting.by != "create"):
            # A stream's end comes without times and usage; an answer may be faster than the create's own record.
            await anyio.sleep(GRACE)
        if early:
            seen = await self._known(prediction.id)
        run = self._run(seen.stored, sighting, prediction, request)
        cost = None if self._prices is None else await self._prices.estimate(run.prediction, tenant=run.tenant)
        # Claimed last: whoever is stopped before it leaves the run to the next who asks.
        try:
            claimed = await self._ledger.call(lambda store: store.claim(prediction.id))
        except StoreFailed:
            claimed, seen = None, _Seen(None)
        # Of one that it created, nobody else knows.
        doubtful = seen.failed and sighting.by != "create"
        if claimed is None and (seen.stored is not None or doubtful or prediction.id in self._observed):
            return
        self._report(self._run(claimed, sighting, prediction, request), cost, request)

    async def _known(self, id: str) -> _Seen:
        try:
            return _Seen((await self._ledger.call(lambda store: store.get([id]))).get(id))
        except StoreFailed:
            return _Seen(None, failed=True)

    def _run(
        self, stored: StoredPrediction | None, sighting: Sighting, prediction: Prediction, request: RequestSpan
    ) -> _Run:
        if stored is None:
            # Nothing is known of the create, not even whether its caller minds content being captured.
            return _Run(
                prediction=prediction,
                sighting=sighting,
                below=request.span,
                tenant=request.tenant,
                caller=request.said,
            )
        return _of_store(stored, sighting, prediction, request)

    def _report(self, run: _Run, cost: Cost | None, request: RequestSpan) -> None:
        # While the store was out of order, this process may have told it already.
        is_told = run.prediction.id in self._observed
        self._observed[run.prediction.id] = None
        if len(self._observed) > MAX_OBSERVED:
            self._observed.popitem(last=False)
        span = request.span if is_told else self._span(run, cost, request)
        if request.instruments is not None and run.polls is not None:
            request.instruments.run(
                run.prediction,
                cost,
                tenant=None if run.tenant is None else request.scrub(run.tenant),
                observed_by=run.sighting.by,
                lag=run.lag,
                polls=run.polls,
                error_type=_ERRORS.get(run.prediction.status),
                span=span,
            )

    def _span(self, run: _Run, cost: Cost | None, request: RequestSpan) -> Span:
        prediction, error_type = run.prediction, _ERRORS.get(run.prediction.status)
        told = attributes.of_run(prediction, cost) | run.told() | dict(run.caller)
        if error_type is not None:
            told[names.ERROR_TYPE] = error_type
        shown = self._content(run, request)
        on_span = shown if self._capture in ("SPAN_ONLY", "SPAN_AND_EVENT") else {}
        start, end = run.times()
        span = self._tracer.start_span(
            request.scrub(run.name()),
            trace.set_span_in_context(run.below, Context()),
            SpanKind.CLIENT,
            attributes.scrubbed(told | on_span, request.scrub),
            start_time=start,
        )
        if span.is_recording():
            if prediction.started_at is not None:
                span.add_event(names.STARTED, timestamp=_nanoseconds(prediction.started_at))
            if shown and self._capture in ("EVENT_ONLY", "SPAN_AND_EVENT"):
                span.add_event(names.CONTENT, attributes.scrubbed(shown, request.scrub), end)
            if error_type is not None:
                span.set_status(StatusCode.ERROR)
        span.end(end)
        return span

    def _content(self, run: _Run, request: RequestSpan) -> Attributes:
        if self._capture == "NO_CONTENT" or not run.capture or not request.recording:
            return {}
        return {
            name: content.text(value, redact=self._redact, scrub=request.scrub)
            for name, value in ((names.INPUT, run.prediction.input), (names.OUTPUT, run.prediction.output))
            if value is not None
        }


class _Seen(NamedTuple):
    """What the store has of a prediction, and whether it could not be asked."""

    stored: StoredPrediction | None
    failed: bool = False


class _Run(NamedTuple):
    """A run to be told, `below` a span. `polls` is None where the store does not know the create."""

    prediction: Prediction
    sighting: Sighting
    below: Span
    tenant: str | None
    caller: Mapping[str, Any]
    polls: int | None = None
    capture: bool = False

    @property
    def lag(self) -> float | None:
        """Seconds; the clocks of two machines may differ. Where a stream's end is the only one, there is none."""
        if self.prediction.completed_at is None or self.sighting.by == "stream":
            return None
        return round(max(0.0, self.sighting.at - self.prediction.completed_at), 6)

    def name(self) -> str:
        operation = "train" if self.prediction.kind == "training" else "generate_content"
        return operation if self.prediction.model is None else f"{operation} {self.prediction.model}"

    def times(self) -> tuple[int, int]:
        """Start and end in nanoseconds; where Replicate does not tell, the moment when it was seen."""
        end = self.sighting.at if self.prediction.completed_at is None else self.prediction.completed_at
        known = self.prediction.created_at, self.prediction.started_at
        start = min([moment for moment in known if moment is not None], default=end)
        return _nanoseconds(min(start, end)), _nanoseconds(end)

    def told(self) -> Attributes:
        told: Attributes = {names.OBSERVED_BY: self.sighting.by}
        if self.tenant is not None:
            told[names.TENANT] = self.tenant
        if self.lag is not None:
            told[names.OBSERVATION_LAG] = self.lag
        if self.polls is None:
            told[names.ORIGIN] = "observed"
        else:
            told[names.ORIGIN], told[names.POLLS] = "store", self.polls
        return told


def _nanoseconds(moment: float) -> int:
    return int(min(moment, MAX_TIME) * 1e9)


def _of_store(claimed: StoredPrediction, sighting: Sighting, prediction: Prediction, request: RequestSpan) -> _Run:
    details, created = Details.of(claimed.details), named(claimed.traceparent)
    if sighting.by == "stream":
        prediction = replace(
            prediction,
            model=details.model,
            version=details.version,
            deployment=details.deployment,
            created_at=details.created_at,
            completed_at=sighting.at,
        )
    return _Run(
        prediction=prediction,
        sighting=sighting,
        # Its own span, where it is the create's, keeps both in one tree.
        below=request.span if created is None or claimed.traceparent == request.traceparent else created,
        tenant=claimed.tenant,
        caller=details.caller or {},
        polls=claimed.reads,
        capture=details.capture and request.may_capture,
    )
