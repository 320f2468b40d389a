"""One CLIENT span for each attempt to reach Replicate: from before the first byte until the last one is here."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator
from dataclasses import replace
from time import perf_counter

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from ..errors import ClientDisconnected, Overloaded, ProxyError, UpstreamAborted, UpstreamUnreachable
from ..exchange import AtOnce, Chunks, Forward, Opened, ProxyRequest, ProxyResponse, nothing_to_close
from ..json_bodies import plain_of
from ..operations import OPERATIONS
from ..routing import Route
from . import attributes, names
from .attributes import Attributes, Origin
from .event_stream import EventScanner
from .metrics import Labels
from .prediction import Kind, Prediction, read, scrubbed
from .request import ObservedBy, RequestSpan, Sighting, current, traceparent

# Bytes, as they come and as decoded: what is longer is not looked at. Inputs with files inside are.
MAX_SIZE = 1 << 20

# Instrumentations of HTTP clients leave alone what is sent under it. It has no public name.
_SUPPRESS = getattr(context, "_SUPPRESS_HTTP_INSTRUMENTATION_KEY", "suppress_http_instrumentation")
_SUPPRESSED = context.Context({_SUPPRESS: True})


def attempts(forward: Forward, *, tracer: Tracer, origin: Origin, propagate: bool) -> Forward:
    """The innermost layer.

    Args:
        origin: where attempts go.
        propagate: whether Replicate is told the attempt's `traceparent`.
    """

    def attempt(request: ProxyRequest) -> Awaitable[ProxyResponse]:
        above = current()
        return unobserved(forward(request)) if above is None else observed(request, above)

    async def observed(request: ProxyRequest, above: RequestSpan) -> ProxyResponse:
        above.forwarded(request)
        route = request.route
        known = attributes.of_attempt(request, origin)
        span = tracer.start_span(
            attributes.span_name(request.method, origin.path + route.template),
            kind=SpanKind.CLIENT,
            attributes=above.shown(known),
        )
        attempt = Attempt(span, above, known, about=_about(route))
        if request.resend_count and above.instruments is not None and above.waiting is not None:
            above.instruments.retry(above.failure or names.OTHER)
            # The pause was for Replicate's sake.
            above.waiting.seconds += perf_counter() - above.failed_at
        sent = attempt.counted(request)
        if propagate and span.is_recording() and (own := traceparent(span.get_span_context())) is not None:
            sent = replace(sent, headers=(*sent.headers, (b"traceparent", own.encode())))
        return await attempt.run(forward(sent), request.opened)

    return attempt


async def unobserved(forwarding: Awaitable[ProxyResponse]) -> ProxyResponse:
    """What `forwarding` answers, for requests of which nothing is told by us: neither by others."""
    around = context.get_current()
    attached = context.attach(context.set_value(_SUPPRESS, True, around) if around else _SUPPRESSED)
    try:
        return await forwarding
    finally:
        context.detach(attached)


def _subjects() -> Iterator[tuple[str, tuple[Kind, ObservedBy]]]:
    for operation in OPERATIONS:
        subject = operation.creates or operation.reads
        if subject is not None and subject != "file":
            later: ObservedBy = "cancel" if operation.id.endswith(".cancel") else "poll"
            yield operation.id, (subject, "create" if operation.creates else later)


# What an answer is about, by operation, and how it is seen.
_SUBJECTS = dict(_subjects())


def _about(route: Route) -> Sighting | None:
    """What an answer is about, as far as the path tells: a create's answer names it."""
    if route.operation not in _SUBJECTS:
        return None
    subject, by = _SUBJECTS[route.operation]
    return Sighting(route.params.get(f"{subject}_id", ""), subject, by)


class Attempt:
    """An attempt while it is under way: until its answer is closed, not only until its head is there.

    Args:
        known: what its span was begun with.
        about: what the answer is about, None where it is not looked at.
        events: scans the answer, where it is a stream of events.
    """

    def __init__(
        self,
        span: Span,
        above: RequestSpan,
        known: Attributes,
        *,
        about: Sighting | None,
        events: EventScanner | None = None,
    ) -> None:
        self._span, self._above, self._known = span, above, known
        self._about, self._events = about, events
        self._sent: _Counted | None = None
        self._length = 0
        self._received: _Received | None = None
        self._response: ProxyResponse | None = None
        self._closed = False
        self._started = perf_counter()

    def counted(self, request: ProxyRequest) -> ProxyRequest:
        """`request`, whose body is counted as it is sent."""
        if isinstance(request.body, Chunks) and request.body.at_hand is not None:
            self._length = len(request.body.at_hand)
            return request
        self._sent = _Counted(request.body)
        return replace(request, body=self._sent)

    async def run(self, forwarding: Awaitable[ProxyResponse], opened: list[Opened]) -> ProxyResponse:
        """What `forwarding` answers, whose end will be that of the attempt.

        Args:
            opened: what is closed when the exchange ends.
        """
        about, waiting = self._about, self._above.waiting
        if about is not None and about.id:
            self._above.sighting = about
        attached = context.attach(trace.set_span_in_context(self._span, context.set_value(_SUPPRESS, True)))
        try:
            if waiting is None:
                response = await forwarding
            else:
                with waiting:
                    response = await forwarding
        except BaseException as error:
            self._end(perf_counter(), time.time_ns(), error)
            raise
        finally:
            context.detach(attached)
        self._response = response
        copies = about is not None and 200 <= response.status < 300
        self._received = _Received(response.body, self._above, self._started, copies=copies, events=self._events)
        body = response.body
        if response.aclose is nothing_to_close and isinstance(body, Chunks) and (whole := body.at_hand) is not None:
            self._received.take(whole)
            closing: Opened = AtOnce(self._close)
        else:
            body, closing = self._received, self
        opened.append(closing)
        return ProxyResponse(status=response.status, headers=response.headers, body=body, aclose=closing.aclose)

    async def aclose(self) -> None:
        """Close the answer, which ends the attempt."""
        assert self._response is not None
        try:
            await self._response.aclose()
        finally:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            assert self._received is not None
            self._end(*self._received.ended(), None)

    def _end(self, at: float, at_ns: int, error: BaseException | None) -> None:
        """A caller who leaves is no error of the attempt, and neither is a cancellation."""
        told: Attributes = {names.HTTP_REQUEST_BODY_SIZE: self._size(error)}
        error_type = error.code if isinstance(error, ProxyError) and not isinstance(error, ClientDisconnected) else None
        prediction = None
        if self._response is not None and self._received is not None:
            status = self._response.status
            told[names.HTTP_RESPONSE_STATUS_CODE] = status
            told[names.HTTP_RESPONSE_BODY_SIZE] = self._received.size
            if status >= 400:
                error_type = str(status)
            elif self._received.failed:
                error_type = UpstreamAborted.code
            prediction = self._seen(self._response, self._received)
            if prediction is not None:
                told |= attributes.of_fetched(prediction)
            if self._events is not None and status < 400:
                told[names.STREAM_EVENTS] = self._events.events
                told[names.STREAM_COMPLETE] = self._events.complete
                if self._received.first_data is not None:
                    told[names.GEN_AI_TIME_TO_FIRST_CHUNK] = self._received.first_data
        self._above.failure, self._above.failed_at = error_type, perf_counter()
        if error_type is not None:
            told[names.ERROR_TYPE] = error_type
        self._count(at - self._started, told, error_type, prediction)
        if self._span.is_recording():
            self._span.set_attributes(attributes.scrubbed(told, self._above.scrub))
            if error_type is not None:
                self._span.set_status(StatusCode.ERROR)
            self._span.end(at_ns)

    def _size(self, error: BaseException | None) -> int:
        """Bytes of body that were sent."""
        if self._sent is not None:
            return self._sent.size
        return 0 if isinstance(error, (Overloaded, UpstreamUnreachable)) else self._length

    def _seen(self, response: ProxyResponse, received: _Received) -> Prediction | None:
        """What the answer shows; it has left already."""
        about = self._about
        if about is None:
            return None
        prediction = None
        if self._events is not None:
            if about.id and self._events.final_status is not None:
                prediction = Prediction(id=about.id, status=self._events.final_status)
        elif (body := received.copy) is not None:
            plain = plain_of(response, body, max_size=MAX_SIZE)
            prediction = None if plain is None else read(plain, about.kind)
        if prediction is None or (about.id and prediction.id != about.id):
            return None
        prediction = scrubbed(prediction, self._above.scrub)
        self._above.sighting = Sighting(prediction.id, about.kind, about.by, prediction, time.time())
        return None if self._events is not None else prediction

    def _count(self, seconds: float, told: Attributes, error_type: str | None, prediction: Prediction | None) -> None:
        instruments = self._above.instruments
        if instruments is None:
            return
        labels: Labels = {}
        for name in (names.HTTP_REQUEST_METHOD, names.SERVER_ADDRESS, names.URL_TEMPLATE):
            if name in self._known:
                labels[name] = str(self._known[name])
        if self._response is not None:
            labels[names.HTTP_RESPONSE_STATUS_CODE] = self._response.status
        if error_type is not None:
            labels[names.ERROR_TYPE] = error_type
        instruments.attempt(seconds, labels)
        if self._known.get(names.GEN_AI_OPERATION_NAME) == "create_prediction":
            model = None if prediction is None else prediction.model
            instruments.gen_ai("create_prediction", seconds, model=model, error_type=error_type)


class _Counted:
    """A body that counts its bytes as they pass."""

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._chunks = body.__aiter__()
        self.size = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._chunks.__anext__()
        self.size += len(chunk)
        return chunk


class _Received:
    """The answer's body: counted and timed as it passes, copied up to a bound where something is to be learnt from it.

    Attributes:
        size: bytes so far.
        failed: it was cut.
        first_data: of a stream of events, seconds from the start of the attempt until the first data began.
    """

    def __init__(
        self,
        body: AsyncIterable[bytes],
        above: RequestSpan,
        started: float,
        *,
        copies: bool,
        events: EventScanner | None,
    ) -> None:
        self._chunks = body.__aiter__()
        self._waiting = above.waiting
        self._started = started
        self._events = events
        self._copied: list[bytes] | None = [] if copies and events is None else None
        self._ended: tuple[float, int] | None = None
        self.size = 0
        self.complete = False
        self.failed = False
        self.first_data: float | None = None

    @property
    def copy(self) -> bytes | None:
        """The whole body; None if it is not all here, or too long."""
        return b"".join(self._copied) if self.complete and self._copied is not None else None

    def ended(self) -> tuple[float, int]:
        """When: by the clock that only grows, and in nanoseconds since the epoch."""
        return self._ended or (perf_counter(), time.time_ns())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            if self._waiting is None:
                chunk = await self._chunks.__anext__()
            else:
                with self._waiting:
                    chunk = await self._chunks.__anext__()
        except StopAsyncIteration:
            self.complete = True
            self._ended = perf_counter(), time.time_ns()
            raise
        except Exception:
            self.failed = True
            self._ended = perf_counter(), time.time_ns()
            raise
        self._note(chunk)
        return chunk

    def take(self, whole: bytes) -> None:
        """All of it is at hand, and passes another way."""
        self._note(whole)
        self.complete = True
        self._ended = perf_counter(), time.time_ns()

    def _note(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self._copied is not None:
            if self.size <= MAX_SIZE:
                self._copied.append(chunk)
            else:
                self._copied = None
        if self._events is not None:
            self._events.feed(chunk)
            if self.first_data is None and self._events.first_data:
                self.first_data = round(perf_counter() - self._started, 6)
