"""What is counted and timed, where the process has a meter provider that records."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation
from opentelemetry.trace import Span

from ..routing import STREAM, WEBHOOK, Route
from . import names
from .names import METRICS, OTHER
from .prediction import Prediction

if TYPE_CHECKING:
    from .prices import Cost

# Models that are told apart by name: they come from Replicate's answers, and so from callers.
MAX_MODELS = 200

_OWN = {STREAM.template: "streams", WEBHOOK.template: "webhooks"}

Labels = dict[str, str | int]

# Exemplars are looked for in the current context, and take half of a recording's time: only runs have them.
# Not an empty one, which the SDK takes for none.
_NOWHERE = trace.set_span_in_context(trace.INVALID_SPAN, Context())


def operation(route: Route) -> str:
    """The label of a request's operation: the operation id, `streams` or `webhooks` for the proxy's own, `_OTHER`."""
    return route.operation or _OWN.get(route.template, OTHER)


class Metrics:
    """Finds the meter provider, which a host may set after the middleware is made."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self._given = provider
        self._asked: MeterProvider | None = None
        self._instruments: Instruments | None = None

    def current(self) -> Instruments | None:
        """The instruments; None where nothing is recorded, so that nothing needs to be measured."""
        provider = self._given or metrics.get_meter_provider()
        if provider is not self._asked:
            # In this order, since another thread may look in between.
            self._instruments = _instruments(provider)
            self._asked = provider
        return self._instruments


# One set for each provider, since a meter has one instrument of a name, with one callback. By identity, since some have
# no hash, with the provider itself where nothing can refer to it weakly.
_made: dict[int, tuple[Callable[[], object], Instruments | None]] = {}
_making = threading.Lock()


def _instruments(provider: MeterProvider) -> Instruments | None:
    from importlib.metadata import version  # here, since it takes long

    if _is_the_api_s(provider):
        return None
    with _making:
        of, instruments = _made.get(id(provider), (None, None))
        if of is None or of() is not provider:
            meter = provider.get_meter("replicate_proxy_mw", version("replicate-proxy-mw"), names.SCHEMA_URL)
            instruments = None if _is_the_api_s(meter) else Instruments(meter)
            _made[id(provider)] = _reference(provider), instruments
        return instruments


def _reference(provider: MeterProvider) -> Callable[[], object]:
    key = id(provider)
    try:
        return weakref.ref(provider, lambda gone: _made.pop(key, None))
    except TypeError:
        return lambda: provider


def _is_the_api_s(provider_or_meter: object) -> bool:
    """The API's own do nothing: they stand in until an SDK is there, or where it is switched off."""
    return type(provider_or_meter).__module__.startswith("opentelemetry.metrics")


class _Sums:
    """A counter whose sums are kept here until they are asked for: an SDK's own takes twenty times as long to add."""

    def __init__(self, name: str) -> None:
        self._labels = METRICS[name].labels
        self._sums: dict[tuple[str | None, ...], float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float, *labels: str | None) -> None:
        """`labels` are the values of the metric's, in their order; None for one that is not there."""
        with self._lock:
            self._sums[labels] = self._sums.get(labels, 0) + amount

    def __call__(self, options: CallbackOptions) -> Iterable[Observation]:
        with self._lock:
            sums = list(self._sums.items())
        for values, amount in sums:
            labels = zip(self._labels, values, strict=True)
            yield Observation(amount, {name: value for name, value in labels if value is not None})


class Instruments:
    """One of each metric of the registry. Nothing that a caller sends becomes a label."""

    def __init__(self, meter: Meter) -> None:
        def histogram(name: str) -> Histogram:
            metric = METRICS[name]
            return meter.create_histogram(
                name, metric.unit, metric.meaning, explicit_bucket_boundaries_advisory=metric.buckets
            )

        def counter(name: str) -> _Sums:
            metric, sums = METRICS[name], _Sums(name)
            up_and_down = metric.kind == "up/down counter"
            create = meter.create_observable_up_down_counter if up_and_down else meter.create_observable_counter
            create(name, [sums], metric.unit, metric.meaning)
            return sums

        self._server_duration = histogram(names.SERVER_DURATION)
        self._client_duration = histogram(names.CLIENT_DURATION)
        self._request_duration = histogram(names.REQUEST_DURATION)
        self._requests = counter(names.REQUESTS)
        self._in_flight = counter(names.IN_FLIGHT)
        self._overhead = histogram(names.OVERHEAD)
        self._retries = counter(names.RETRIES)
        self._queue_duration = histogram(names.QUEUE_DURATION)
        self._run_duration = histogram(names.RUN_DURATION)
        self._total_duration = histogram(names.TOTAL_DURATION)
        self._terminal = counter(names.TERMINAL)
        self._cost = counter(names.COST_TOTAL)
        self._lag = histogram(names.LAG)
        self._polls = histogram(names.READS)
        self._gen_ai_duration = histogram(names.GEN_AI_DURATION)
        self._gen_ai_tokens = histogram(names.GEN_AI_TOKENS)
        self._models: set[str] = set()

    def begin(self, route: Route) -> None:
        self._in_flight.add(1, operation(route))

    def end(
        self,
        route: Route,
        *,
        outcome: str,
        tenant: str | None,
        seconds: float,
        own: float,
        server: Labels | None,
    ) -> None:
        """A request has ended. `own` are the proxy's of all `seconds`; `server` labels a SERVER span that is ours."""
        name = operation(route)
        self._in_flight.add(-1, name)
        self._requests.add(1, name, outcome, tenant)
        self._overhead.record(own, {names.REPLICATE_OPERATION: name}, _NOWHERE)
        labels = {names.REPLICATE_OPERATION: name, names.OUTCOME: outcome}
        self._request_duration.record(seconds, labels, _NOWHERE)
        if server is not None:
            self._server_duration.record(seconds, server, _NOWHERE)

    def attempt(self, seconds: float, labels: Labels) -> None:
        self._client_duration.record(seconds, labels, _NOWHERE)

    def retry(self, reason: str) -> None:
        self._retries.add(1, reason)

    def gen_ai(self, operation: str, seconds: float, *, model: str | None, error_type: str | None) -> None:
        """Something was done with a prediction; `model` as Replicate says, None where no answer named it."""
        labels = self._of_gen_ai(operation, model)
        if error_type is not None:
            labels[names.ERROR_TYPE] = error_type
        self._gen_ai_duration.record(seconds, labels, _NOWHERE)

    def run(
        self,
        prediction: Prediction,
        cost: Cost | None,
        *,
        tenant: str | None,
        observed_by: str,
        lag: float | None,
        polls: int,
        error_type: str | None,
        span: Span,
    ) -> None:
        """A prediction has come to its end. Of a training only the cost is counted: it runs for hours."""
        model = self._model(prediction.model)
        if cost is not None:
            self._cost.add(cost.amount, model, tenant, cost.currency)
        if prediction.kind == "training":
            return
        labels: Labels = {names.MODEL_NAME: model, names.PREDICTION_STATUS: prediction.status}
        below = trace.set_span_in_context(span, _NOWHERE)
        for histogram, seconds in (
            (self._queue_duration, prediction.queue_time),
            (self._run_duration, prediction.run_time),
            (self._total_duration, prediction.total_time),
        ):
            if seconds is not None:
                histogram.record(seconds, labels, below)
        self._terminal.add(1, model, prediction.status, observed_by)
        by: Labels = {names.OBSERVED_BY: observed_by}
        if lag is not None:
            self._lag.record(lag, by, _NOWHERE)
        self._polls.record(polls, by, _NOWHERE)
        if prediction.total_time is not None:
            self.gen_ai("generate_content", prediction.total_time, model=prediction.model, error_type=error_type)
        for kind, tokens in (("input", prediction.input_tokens), ("output", prediction.output_tokens)):
            if tokens is not None:
                of_run = self._of_gen_ai("generate_content", prediction.model)
                self._gen_ai_tokens.record(tokens, {**of_run, names.GEN_AI_TOKEN_TYPE: kind}, _NOWHERE)

    def _of_gen_ai(self, operation: str, model: str | None) -> Labels:
        labels: Labels = {names.GEN_AI_OPERATION_NAME: operation, names.GEN_AI_PROVIDER_NAME: "replicate"}
        if model is not None:
            labels[names.GEN_AI_RESPONSE_MODEL] = self._model(model)
        return labels

    def _model(self, model: str | None) -> str:
        if model is None:
            return OTHER
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                return OTHER
            self._models.add(model)
        return model
