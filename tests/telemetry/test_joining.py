from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from replicate_proxy_mw import waiting
from replicate_proxy_mw.routing import match
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.telemetry.joining import Joint
from replicate_proxy_mw.telemetry.metrics import Metrics
from replicate_proxy_mw.telemetry.prediction import Prediction
from replicate_proxy_mw.telemetry.request import RequestSpan, Sighting
from replicate_proxy_mw.telemetry.scrub import Scrubber
from tests.raw_asgi import http_scope

ABOUT = Sighting("p1", "prediction", "poll")
SEEN = Sighting("p1", "prediction", "poll", Prediction(id="p1", status="succeeded", model="a/hunter2"), 1.0)


class Time:
    """What `Waiting` reads."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(waiting, "perf_counter", time)
    return time


@pytest.fixture
def request_span(tracer_provider: TracerProvider) -> Callable[..., RequestSpan]:
    """Requests under way, that tell nothing afterwards."""
    tracer = trace.get_tracer("test", tracer_provider=tracer_provider)

    async def nothing(span: RequestSpan) -> None:
        pass

    def make(*, recording: bool = True, counts: bool = True, story: Any = nothing) -> RequestSpan:
        afterwards: list[Callable[[], Awaitable[None]]] = []
        reader = InMemoryMetricReader()
        return RequestSpan(
            tracer.start_span("GET", kind=SpanKind.SERVER) if recording else trace.INVALID_SPAN,
            http_scope(),
            match("GET", "/predictions/p1"),
            template="/v1/predictions/{prediction_id}",
            is_server=True,
            instruments=Metrics(MeterProvider([reader], shutdown_on_exit=False)).current() if counts else None,
            afterwards=afterwards,
            story=story,
        )

    return make


Make = Callable[..., RequestSpan]


def _links(span: RequestSpan) -> list[int]:
    recorded: Any = span.span
    return [link.context.span_id for link in recorded.links]


def test_one_who_joins_links_to_the_beginner_and_has_seen_what_it_saw(request_span: Make) -> None:
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
        with joint.waiting(), other, joint.waiting():
            beginner.sighting = SEEN
    assert other.sighting == SEEN
    assert _links(other) == [beginner.span.get_span_context().span_id]
    assert other.notes == {names.COALESCED: True}
    assert other.outcome == "answered"


def test_the_beginner_is_what_it_always_was(request_span: Make) -> None:
    beginner = request_span()
    with beginner, Joint().waiting():
        beginner.sighting = SEEN
    assert beginner.sighting is SEEN
    assert (_links(beginner), beginner.notes) == ([], {})


def test_a_beginner_may_be_over(request_span: Make, exporter: InMemorySpanExporter) -> None:
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
    assert len(exporter.get_finished_spans()) == 1
    with other, joint.waiting():
        beginner.sighting = SEEN
    assert other.sighting == SEEN
    assert _links(other) == [beginner.span.get_span_context().span_id]


@pytest.mark.parametrize("sighting", [None, ABOUT])
def test_what_has_seen_nothing_yet(request_span: Make, sighting: Sighting | None) -> None:
    """The call has not begun, or failed: who waited knows what it was about all the same, as far as the call does."""
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
    beginner.sighting = sighting
    with other, pytest.raises(ZeroDivisionError), joint.waiting():
        raise ZeroDivisionError
    assert other.sighting == sighting


@pytest.mark.parametrize("prediction", [SEEN.prediction, None])
def test_a_creation_is_told_by_its_beginner_alone(request_span: Make, prediction: Prediction | None) -> None:
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
    beginner.sighting = Sighting("p1", "prediction", "create", prediction)
    with other, joint.waiting():
        pass
    assert other.sighting is None
    recorded: Any = other.span
    assert recorded.attributes.get(names.PREDICTION_STATUS) == (prediction and "succeeded")


@pytest.mark.anyio
async def test_what_is_seen_when_the_beginner_is_over_is_told_then(request_span: Make) -> None:
    told: list[RequestSpan] = []

    async def story(span: RequestSpan) -> None:
        told.append(span)

    beginner, knows = request_span(story=story), request_span(story=story)
    with beginner:
        joint = Joint()
    with knows:
        other = Joint()
        knows.sighting = SEEN
    await joint.over()
    assert told == [], "nothing was seen"
    beginner.sighting = SEEN
    for call in (joint, joint, other, Joint()):
        await call.over()
    assert told == [beginner], "the other one tells with its end"


def test_nothing_of_one_s_own_secrets_is_in_what_one_has_seen(request_span: Make) -> None:
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
    beginner.sighting = SEEN
    with other, joint.waiting():
        other.scrub = Scrubber.of(http_scope()["headers"]).with_secret("hunter2")
    assert other.sighting is not None
    assert other.sighting.prediction is not None
    assert "hunter2" not in str(other.sighting.prediction.model)
    assert SEEN.prediction is not None
    assert SEEN.prediction.model == "a/hunter2"


def test_waiting_is_no_overhead(request_span: Make, time: Time) -> None:
    beginner, other = request_span(), request_span()
    with beginner:
        joint = Joint()
        with joint.waiting():
            time.now += 1
            with other, joint.waiting():
                time.now += 2
    assert beginner.waiting is not None
    assert other.waiting is not None
    assert (beginner.waiting.seconds, other.waiting.seconds) == (3, 2)


@pytest.mark.parametrize("begins", ["before the beginner leaves", "afterwards"])
def test_an_attempt_that_goes_on_takes_nothing_from_what_its_beginner_has_waited(
    request_span: Make, time: Time, begins: str
) -> None:
    beginner = request_span()
    with beginner:
        own = beginner.waiting
        assert own is not None
        with Joint().waiting():
            of_attempt = beginner.waiting
            assert of_attempt is not None
            if begins == "before the beginner leaves":
                of_attempt.__enter__()
            time.now += 30
        assert beginner.waiting is own
        assert own.seconds == 30
        with own:  # the answer to a time limit
            time.now += 1
        assert own.seconds == 31


def test_an_attempt_s_own_waiting_is_not_counted_twice(request_span: Make, time: Time) -> None:
    beginner = request_span()
    with beginner:
        own = beginner.waiting
        with Joint().waiting():
            assert beginner.waiting is not None
            with beginner.waiting:
                time.now += 1
    assert own is not None
    assert own.seconds == 1


def test_spans_without_metrics(request_span: Make) -> None:
    beginner, other = request_span(counts=False), request_span(counts=False)
    with beginner:
        joint = Joint()
        with joint.waiting():
            assert beginner.waiting is None
    with other, joint.waiting():
        assert other.waiting is None
    assert other.waiting is None
    assert len(_links(other)) == 1


def test_metrics_without_spans(request_span: Make) -> None:
    beginner, other = request_span(recording=False), request_span(recording=False)
    with beginner:
        joint = Joint()
    beginner.sighting = SEEN
    with other, joint.waiting():
        pass
    assert other.sighting == SEEN


def test_nobody_wants_to_know() -> None:
    with Joint().waiting():
        pass


def test_a_beginner_that_nobody_wanted_to_know_of(request_span: Make) -> None:
    joint = Joint()
    other = request_span()
    with other, joint.waiting():
        pass
    assert (_links(other), other.notes, other.sighting) == ([], {names.COALESCED: True}, None)


def test_one_that_nobody_wants_to_know_of(request_span: Make) -> None:
    beginner, other = request_span(), request_span(recording=False, counts=False)
    with beginner:
        joint = Joint()
    beginner.sighting = SEEN
    with other, joint.waiting():
        pass
    assert (other.sighting, other.notes) == (None, {})
