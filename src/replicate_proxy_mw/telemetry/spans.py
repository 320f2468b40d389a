"""The telemetry of one middleware: what observes its requests, its attempts and, after them, its predictions."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..exchange import Forward, ProxyResponse
from ..routing import Route
from ..store import Ledger
from . import attempt, attributes, content, names, prediction
from .attempt import Attempt
from .attributes import Origin
from .event_stream import EventScanner
from .metrics import Metrics
from .request import RequestSpan, Sighting, named
from .scrub import Scrubber
from .story import Story

if TYPE_CHECKING:
    from .prices import PriceList, Prices

TrustTraceparent = Literal["parent", "link", "ignore"]

# Seconds for a host's own prices: the answer has left, and nobody waits.
PRICES_TIMEOUT = 2.0

_PROPAGATOR = TraceContextTextMapPropagator()
_PROPAGATED = frozenset((b"traceparent", b"tracestate"))
_NOWHERE = Context()


class Telemetry:
    """Spans and metrics. Without an SDK in the process every call here is close to free.

    Args:
        prefix, upstream: what the proxy takes, and where it leads.
        trust_traceparent: what a caller's `traceparent` is to the request span.
        propagate_upstream: whether Replicate is told the attempt's.
        ledger: the store, where predictions are remembered from one request to the next.
        prices: what runs cost.
        capture_content: whether input and output are shown, None to read OpenTelemetry's variable for it.
        redact: the host's say in that.
        tracer_provider, meter_provider: by default OpenTelemetry's global ones.

    Raises:
        ValueError: `prices` or `capture_content` is not what it should be.
    """

    def __init__(
        self,
        *,
        prefix: str,
        upstream: str,
        trust_traceparent: TrustTraceparent,
        propagate_upstream: bool,
        ledger: Ledger,
        prices: Prices | None,
        capture_content: bool | str | None,
        redact: content.Redact | None,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        from importlib.metadata import version  # here, since it takes long

        self._prefix = prefix
        self._origin = Origin.of(upstream)
        self._trust, self._propagate = trust_traceparent, propagate_upstream
        self._metrics = Metrics(meter_provider)
        self._tracer = trace.get_tracer(
            "replicate_proxy_mw", version("replicate-proxy-mw"), tracer_provider, names.SCHEMA_URL
        )
        self._story = Story(
            ledger=ledger,
            tracer=self._tracer,
            prices=None if prices is None else _price_list(prices),
            capture=content.mode(capture_content, os.environ),
            redact=redact,
        )

    def request(
        self, scope: Mapping[str, Any], route: Route, afterwards: list[Callable[[], Awaitable[None]]]
    ) -> RequestSpan:
        """The request span: SERVER, or INTERNAL below a span that the host has opened for the same request.

        What remains to be told when it is left comes to `afterwards`.
        """
        around = trace.get_current_span()
        local = around is not trace.INVALID_SPAN and _is_local(around.get_span_context())
        parent, links = (None, ()) if local else self._caller(scope)
        template = self._prefix + route.template
        span = self._tracer.start_span(
            attributes.span_name(scope["method"], template),
            parent,
            SpanKind.INTERNAL if local else SpanKind.SERVER,
            {names.HTTP_REQUEST_METHOD: attributes.method(scope["method"]), names.HTTP_ROUTE: template},
            links,
        )
        return RequestSpan(
            span,
            scope,
            route,
            template,
            is_server=not local,
            instruments=self._metrics.current(),
            afterwards=afterwards,
            story=self._story.tell,
        )

    def _caller(self, scope: Mapping[str, Any]) -> tuple[Context | None, tuple[Link, ...]]:
        """The caller's own span, as a parent or as a link, as far as it is trusted."""
        if self._trust == "ignore":
            return None, ()
        carrier: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name in _PROPAGATED:
                carrier[name.decode()] = value.decode("latin-1")
        if "traceparent" not in carrier:
            return None, ()
        if "tracestate" in carrier and not Scrubber.of(scope["headers"]).passes(carrier["tracestate"]):
            del carrier["tracestate"]
        # The propagator takes several times as long for what nearly all send.
        sent = named(carrier["traceparent"]) if len(carrier) == 1 else None
        context = trace.set_span_in_context(sent, _NOWHERE) if sent else _PROPAGATOR.extract(carrier, _NOWHERE)
        if self._trust == "parent":
            return context, ()
        return None, (Link(trace.get_current_span(context).get_span_context()),)

    def attempts(self, forward: Forward) -> Forward:
        """The innermost layer: a CLIENT span for each request that is sent, until its answer's last byte."""
        return attempt.attempts(forward, tracer=self._tracer, origin=self._origin, propagate=self._propagate)

    async def stream(
        self, above: RequestSpan, fetching: Awaitable[ProxyResponse], *, host: str, port: int, prediction_id: str
    ) -> ProxyResponse:
        """What `fetching` answers, with a CLIENT span until the stream's end."""
        above.outcome = "forwarded"
        if not above.observes:
            return await attempt.unobserved(fetching)
        known = attributes.of_stream(host=host, port=port, prediction_id=prediction_id)
        span = self._tracer.start_span("GET", kind=SpanKind.CLIENT, attributes=above.shown(known))
        about = Sighting(prediction_id, "prediction", "stream")
        observed = Attempt(span, above, known, about=about, events=EventScanner())
        return await observed.run(fetching, [])

    def delivered(self, above: RequestSpan, payload: Mapping[str, Any]) -> None:
        """A webhook of Replicate's is what `above` was about."""
        if not above.observes:
            return
        urls = payload.get("urls")
        training = isinstance(urls, dict) and "/trainings/" in str(urls.get("get"))
        seen = prediction.of(payload, "training" if training else "prediction")
        if seen is not None:
            seen = prediction.scrubbed(seen, above.scrub)
            above.sighting = Sighting(seen.id, seen.kind, "webhook", seen, time.time())


def _price_list(prices: Prices) -> PriceList:
    from .prices import PriceList  # here, since few hosts have prices

    return PriceList(prices, timeout=PRICES_TIMEOUT)


def _is_local(span_context: SpanContext) -> bool:
    return span_context.is_valid and not span_context.is_remote
