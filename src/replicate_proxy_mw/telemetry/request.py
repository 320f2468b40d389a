"""The request span: one for each request, whatever happened to it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar, Token
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, StatusCode, TraceFlags

from ..errors import ClientDisconnected, ProxyError, UpstreamAborted
from ..exchange import ProxyRequest
from ..keys import ReplicateKey
from ..portkey import PortkeyContext
from ..routing import Route
from ..waiting import Waiting
from . import attributes, names
from .attributes import Attributes
from .metrics import Instruments, Labels
from .prediction import Kind, Prediction
from .scrub import BARE, Scrubber

ObservedBy = Literal["create", "poll", "cancel", "stream", "webhook"]

# The request span above an attempt, which is several layers away from it.
_current: ContextVar[RequestSpan | None] = ContextVar("replicate_proxy_mw.request_span", default=None)


def current() -> RequestSpan | None:
    return _current.get()


class Sighting(NamedTuple):
    """What a request was about, and what it has seen of it. `at` is in seconds since the epoch."""

    id: str
    kind: Kind
    by: ObservedBy
    prediction: Prediction | None = None
    at: float = 0.0


class RequestSpan:
    """The request span, open within `with`. What is not known yet when it ends is absent.

    Attributes:
        id: the trace id in hex, or a random one where there is no trace: what a caller can report.
        traceparent: this span's (W3C Trace Context, section 3.2), None where there is no trace.
        recording: whether `span` is.
        observes: whether anybody wants to know; else nothing is looked at.
        instruments: what is counted with, None where nothing is.
        waiting: what is spent waiting is counted here; None where nobody counts.
        scrub: what every text passes that goes out from here.
        said: what the caller says of itself, on all spans of its request.
        notes: what layers have to say, by names of the registry.
        portkey, tenant: the caller, as far as it is known.
        outcome: a word of the list in `errors`; `forwarded` where Replicate answered, `answered` where a layer did.
        status: the status that went out; None if none did.
        request_size, response_size: bytes of body, read and sent.
        complete: the answer went out to its last byte.
        failure, failed_at: what the attempt before came to, and when, by `perf_counter`.
        sighting: the prediction or training it was about, where Replicate was asked for one.
    """

    portkey: PortkeyContext | None = None
    tenant: str | None = None
    outcome = "answered"
    status: int | None = None
    request_size = 0
    response_size = 0
    complete = False
    failure: str | None = None
    failed_at = 0.0
    sighting: Sighting | None = None
    _error_type: str | None = None
    _attached: Token[Context] | None = None
    _ended_at = 0
    _told_of: Sighting | None = None

    def __init__(
        self,
        span: Span,
        scope: Mapping[str, Any],
        route: Route,
        template: str,
        *,
        is_server: bool,
        instruments: Instruments | None,
        afterwards: list[Callable[[], Awaitable[None]]],
        story: Callable[[RequestSpan], Awaitable[None]],
    ) -> None:
        self.span, self.route, self.instruments = span, route, instruments
        self.recording = span.is_recording()
        self.observes = self.recording or instruments is not None
        self.waiting = None if instruments is None else Waiting()
        self.scrub = Scrubber.of(scope["headers"]) if self.observes else BARE
        self.said: dict[str, str] = {}
        self.notes: dict[str, bool | int | float | str] = {}
        self.traceparent = span.traceparent if type(span) is Named else traceparent(span.get_span_context())
        self.id = random.randbytes(16).hex() if self.traceparent is None else self.traceparent[3:35]  # nosec B311 # a name
        self._scope, self._template, self._is_server = scope, template, is_server
        self.afterwards, self._story = afterwards, story
        self._told: Attributes = {}
        self._started = perf_counter()

    def __enter__(self) -> RequestSpan:
        # None of another proxy's, which this one may be within.
        self._token = _current.set(self if self.observes else None)
        if self.traceparent is not None:
            self._attached = context.attach(trace.set_span_in_context(self.span))
        if self.instruments is not None:
            self.instruments.begin(self.route)
        if self.recording:
            self._told = attributes.of_scope(self._scope)
            self._told |= attributes.of_route(self.route)
            if self.route.is_secret:
                self._told[names.URL_PATH] = self._template
        return self

    def caller(self, portkey: PortkeyContext) -> None:
        self.portkey = portkey
        if self.recording:
            self.said, told = attributes.of_caller(portkey, self.scrub)
            self._told |= told

    def resolved(self, key: ReplicateKey) -> None:
        """The key is known, and whose it is; Replicate may tell the token back."""
        self.tenant = key.tenant
        if self.observes:
            self.scrub = self.scrub.with_secret(key.authorization().decode().removeprefix("Bearer "))

    def forwarded(self, request: ProxyRequest) -> None:
        """The request goes to Replicate, as the layers have made it."""
        self.outcome = "forwarded"
        if request.unwrapped_data:
            self._told[names.UNWRAPPED_DATA] = True
        if request.repaired_path:
            self._told[names.REPAIRED_PATH] = True

    def refuse(self, error: ProxyError) -> None:
        """The answer is our own."""
        self.outcome = error.outcome
        self._error_type = error.code

    def joined(self, prediction: Prediction) -> None:
        """It is about what another request has created, which tells its story."""
        self._told |= attributes.of_prediction(prediction)

    @property
    def may_capture(self) -> bool:
        """Whether the caller has nothing against its content being shown."""
        return self.portkey is None or self.portkey.debug is not False

    def shown(self, told: Attributes) -> Attributes:
        """`told` as it stands on a span of this request, with what the caller says of itself."""
        return attributes.scrubbed(told, self.scrub) | self.said

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._attached is not None:
            context.detach(self._attached)
        _current.reset(self._token)
        if not self.observes:
            return
        self._ended_at = time.time_ns()
        seconds = perf_counter() - self._started
        if error is not None:
            self._fail(error)
        self._conclude()
        if self.instruments is not None and self.waiting is not None:
            self.instruments.end(
                self.route,
                outcome=self.outcome,
                tenant=None if self.tenant is None else self.scrub(self.tenant),
                seconds=seconds,
                own=max(0.0, seconds - self.waiting.seconds),
                server=self._server_labels() if self._is_server else None,
            )
        self._told_of = self.sighting
        if self.sighting is None:
            self.end()
        else:
            # First, since what else there is to do may take all the time that there is.
            self.afterwards.insert(0, partial(self._story, self))

    def _fail(self, error: BaseException) -> None:
        """There is no answer, or only a part of one."""
        if isinstance(error, (ClientDisconnected, UpstreamAborted)):
            self.outcome, self._error_type = error.outcome, error.code
        elif isinstance(error, Exception):
            self.outcome, self._error_type = "bad_request", "host_error"
        else:
            self.outcome, self._error_type = "client_disconnected", "cancelled"

    def _conclude(self) -> None:
        if self._error_type is None and self.status is not None and self.status >= 500:
            self._error_type = str(self.status)
        if self._error_type == ClientDisconnected.code:
            # 499 is only for a host that insists on an answer.
            self._error_type, self.status = None, None if self.status == ClientDisconnected.status else self.status
        elif self.recording and (not self.complete or self.status is None or self.status >= 500):
            self.span.set_status(StatusCode.ERROR)

    def _server_labels(self) -> Labels:
        labels: Labels = {
            names.HTTP_REQUEST_METHOD: attributes.method(self._scope["method"]),
            names.HTTP_ROUTE: self._template,
        }
        if self.status is not None:
            labels[names.HTTP_RESPONSE_STATUS_CODE] = self.status
        if self._error_type is not None:
            labels[names.ERROR_TYPE] = self._error_type
        return labels

    def end(self) -> None:
        """Close the span, as of the moment when the request ended; notes may be added until then."""
        if not self.span.is_recording():
            return
        told = self._told
        told[names.OUTCOME] = self.outcome
        told[names.HTTP_REQUEST_BODY_SIZE] = self.request_size
        told[names.HTTP_RESPONSE_BODY_SIZE] = self.response_size
        if self.status is not None:
            told[names.HTTP_RESPONSE_STATUS_CODE] = self.status
        if self._error_type is not None:
            told[names.ERROR_TYPE] = self._error_type
        if self.tenant is not None:
            told[names.TENANT] = self.tenant
        if self.sighting is not None and self.sighting.prediction is not None:
            told |= attributes.of_prediction(self.sighting.prediction)
        told |= self.notes
        self.span.set_attributes(self.shown(told))
        self.span.end(self._ended_at)

    async def follow_up(self) -> None:
        """Tell what was seen since the request was over: something that it has begun went on."""
        if not self._ended_at or self.sighting is None or self.sighting is self._told_of:
            return
        self._told_of = self.sighting
        afterwards = self.afterwards = []
        await self._story(self)
        for afterward in afterwards:
            await afterward()


_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


class Named(NonRecordingSpan):
    """A span that is somewhere else, by its `traceparent`: taken apart when someone asks, which is an SDK."""

    _read: SpanContext | None = None

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def __repr__(self) -> str:
        return f"Named({self.traceparent!r})"

    def get_span_context(self) -> SpanContext:
        if self._read is None:
            trace_id, span_id, flags = (int(part, 16) for part in self.traceparent.split("-")[1:])
            self._read = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
        return self._read


def named(traceparent: str | None) -> Named | None:
    """The span of that `traceparent`; None if it has another version, or names none."""
    return Named(traceparent) if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def traceparent(span_context: SpanContext) -> str | None:
    """W3C Trace Context, section 3.2; None where there is no trace."""
    if not span_context.is_valid:
        return None
    # As a number in hex they take several times as long.
    trace_id, span_id = span_context.trace_id.to_bytes(16), span_context.span_id.to_bytes(8)
    return f"00-{trace_id.hex()}-{span_id.hex()}-{span_context.trace_flags:02x}"
