from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from replicate_proxy_mw.store import Ledger, MemoryPredictionStore, PredictionStore, StoredPrediction
from replicate_proxy_mw.telemetry import PriceRequest, Rates, story
from replicate_proxy_mw.telemetry.content import Mode, Redact
from replicate_proxy_mw.telemetry.metrics import Metrics
from replicate_proxy_mw.telemetry.prediction import Prediction
from replicate_proxy_mw.telemetry.prices import PriceList, Prices
from replicate_proxy_mw.telemetry.request import ObservedBy, RequestSpan, Sighting
from replicate_proxy_mw.telemetry.story import MAX_DETAILS, Details, Story
from tests.raw_asgi import http_scope
from tests.telemetry.scenarios import labels, of
from tests.tenants import Switched, hangs, refuses

CREATED, STARTED, COMPLETED = 1_790_000_000.0, 1_790_000_002.5, 1_790_000_006.0
ENDED = Prediction(
    id="p1",
    status="succeeded",
    model="a/b",
    created_at=CREATED,
    started_at=STARTED,
    completed_at=COMPLETED,
    run_time=3.25,
    input={"prompt": "Ada"},
    output="hello",
)
STARTING = replace(ENDED, status="starting", started_at=None, completed_at=None, run_time=None, output=None)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 0.0)


class Teller:
    """One process that tells what its requests see."""

    def __init__(
        self,
        tracer_provider: TracerProvider | None,
        exporter: InMemorySpanExporter,
        *,
        store: PredictionStore | None = None,
        prices: Prices | None = None,
        capture: Mode = "NO_CONTENT",
        redact: Redact | None = None,
        reader: InMemoryMetricReader | None = None,
    ) -> None:
        self.store = MemoryPredictionStore() if store is None else store
        self._exporter = exporter
        self._tracer = trace.get_tracer("test", tracer_provider=tracer_provider)
        self._metrics = Metrics(None if reader is None else MeterProvider([reader], shutdown_on_exit=False))
        self._story = Story(
            ledger=Ledger(self.store, timeout=0.05),
            tracer=self._tracer,
            prices=None if prices is None else PriceList(prices, timeout=1.0),
            capture=capture,
            redact=redact,
        )

    def request(self, by: str, id: str) -> RequestSpan:
        return RequestSpan(
            self._tracer.start_span(by, kind=SpanKind.SERVER),
            http_scope(),
            match("GET", f"/predictions/{id}"),
            template="/v1/predictions/{prediction_id}",
            is_server=True,
            instruments=self._metrics.current(),
            afterwards=[],
            story=self._story.tell,
        )

    async def see(
        self,
        prediction: Prediction | None,
        by: ObservedBy = "poll",
        *,
        at: float = COMPLETED + 1.5,
        id: str = "p1",
        tenant: str | None = "team-a",
        said: Mapping[str, str] | None = None,
        debug: bool | None = None,
    ) -> RequestSpan:
        """A request that has seen it, and all that becomes of that."""
        span = self.request(by, id)
        afterwards = span.afterwards
        with span:
            span.tenant, span.portkey = tenant, PortkeyContext(debug=debug)
            span.said |= said or {}
            span.sighting = Sighting(prediction.id if prediction else id, "prediction", by, prediction, at)
        for afterward in afterwards:
            await afterward()
        return span

    @property
    def runs(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]

    @property
    def requests(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.SERVER]


@pytest.fixture
def teller(tracer_provider: TracerProvider, exporter: InMemorySpanExporter) -> Teller:
    return Teller(tracer_provider, exporter)


ORIGIN = ("replicate_proxy.lifecycle.origin", "replicate_proxy.lifecycle.polls", "replicate_proxy.tenant")


@pytest.mark.anyio
async def test_a_run_is_told_once_below_the_create(teller: Teller) -> None:
    created = await teller.see(STARTING, "create", said={"portkey.trace_id": "order-42"})
    await teller.see(STARTING, said={"portkey.trace_id": "poller"})
    await teller.see(ENDED, said={"portkey.trace_id": "poller"})
    await teller.see(ENDED)
    [run] = teller.runs
    assert run.parent is not None
    assert run.parent.span_id == created.span.get_span_context().span_id
    assert of(run, *ORIGIN, "portkey.trace_id") == ["store", 2, "team-a", "order-42"]
    assert (run.start_time, run.end_time) == (int(CREATED * 1e9), int(COMPLETED * 1e9))
    [event] = run.events
    assert (event.name, event.timestamp) == ("replicate.started", int(STARTED * 1e9))
    assert of(run, "replicate_proxy.lifecycle.observation_lag") == [1.5]
    assert [len(span.links) for span in teller.requests] == [0, 1, 1, 1]


@pytest.mark.anyio
async def test_what_is_seen_after_a_request_is_told_then(teller: Teller, caplog: pytest.LogCaptureFixture) -> None:
    for before in (None, STARTING):
        span = await teller.see(before, "create" if before is None else "poll", id="p0")
        told = len(teller.runs)
        await span.follow_up()
        assert len(teller.runs) == told, "there is nothing new"
        span.sighting = Sighting("p1", "prediction", "create", replace(ENDED, id=f"of-{before and before.status}"), 1.0)
        for _ in "ab":
            await span.follow_up()
        run = teller.runs[told]
        assert len(teller.runs) == told + 1
        assert run.parent is not None
        assert run.parent.span_id == span.span.get_span_context().span_id
        assert of(run, *ORIGIN) == ["store", 0, "team-a"]
    assert caplog.records == []


@pytest.mark.anyio
async def test_nothing_follows_while_a_request_is_under_way(teller: Teller) -> None:
    span = teller.request("create", "p1")
    with span:
        span.sighting = Sighting("p1", "prediction", "create", ENDED, 1.0)
        await span.follow_up()
    assert teller.runs == []


@pytest.mark.anyio
async def test_what_was_seen_may_be_dropped_before_it_is_told(teller: Teller) -> None:
    span = teller.request("poll", "p1")
    with span:
        span.sighting = Sighting("p1", "prediction", "poll", ENDED, 1.0)
    span.sighting = None
    [afterward] = span.afterwards
    await afterward()
    assert (len(teller.requests), teller.runs) == (1, [])


@pytest.mark.anyio
async def test_an_end_that_the_create_has_seen_is_in_its_own_tree(teller: Teller) -> None:
    created = await teller.see(ENDED, "create")
    [run] = teller.runs
    assert run.parent == created.span.get_span_context()
    assert not run.parent.is_remote
    assert of(run, *ORIGIN) == ["store", 0, "team-a"]


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["poll", "cancel", "webhook", "stream"])
async def test_an_end_of_which_the_store_knows_no_create(teller: Teller, by: ObservedBy) -> None:
    seen = await teller.see(ENDED, by)
    await teller.see(ENDED, by)
    [run] = teller.runs
    assert run.parent == seen.span.get_span_context()
    assert of(run, *ORIGIN) == ["observed", None, "team-a"]
    assert [len(span.links) for span in teller.requests] == [0, 0]


@pytest.mark.anyio
async def test_only_so_many_are_remembered(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "MAX_OBSERVED", 2)
    for id in ("p1", "p2", "p3", "p3", "p2", "p1"):
        await teller.see(replace(ENDED, id=id))
    assert [of(run, "replicate.prediction.id")[0] for run in teller.runs] == ["p1", "p2", "p3", "p1"]


@pytest.mark.anyio
@pytest.mark.parametrize("seen", [None, STARTING, replace(STARTING, status="processing")])
async def test_what_has_not_ended_is_not_told(teller: Teller, seen: Prediction | None) -> None:
    await teller.see(STARTING, "create")
    await teller.see(seen)
    assert teller.runs == []
    assert [len(span.links) for span in teller.requests] == [0, 1]


@pytest.mark.anyio
@pytest.mark.parametrize("seen", [STARTING, ENDED])
async def test_a_request_that_was_told_waits_for_no_garbage_collector(teller: Teller, seen: Prediction) -> None:
    """It knows its caller's secrets, and the content."""
    gc.disable()
    try:
        for by in get_args(ObservedBy):
            request = weakref.ref(await teller.see(seen, by))
            assert request() is None
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_transitions(teller: Teller) -> None:
    processing = replace(STARTING, status="processing")
    await teller.see(STARTING, "create")
    for seen in (STARTING, processing, None, processing, ENDED, ENDED):
        await teller.see(seen)
    await teller.see(processing, "webhook")
    found = [of(span, "replicate_proxy.lifecycle.transition")[0] for span in teller.requests]
    assert found == [None, None, True, None, None, True, None, None]


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "transition"), [("starting", None), ("processing", True)])
async def test_what_was_just_created_is_starting(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, status: str, transition: bool | None
) -> None:
    """The store knows it from the layer that records owners, and its answer was not looked at."""
    teller = Teller(tracer_provider, exporter)
    await teller.store.put("p1", StoredPrediction(tenant="team-b", traceparent=f"00-{1:032x}-{2:016x}-01"))
    await teller.see(replace(STARTING, status=status))
    assert of(teller.requests[0], "replicate_proxy.lifecycle.transition") == [transition]
    await teller.see(ENDED)
    [run] = teller.runs
    assert run.parent is not None
    assert (run.parent.trace_id, run.parent.span_id, of(run, *ORIGIN)) == (1, 2, ["store", 2, "team-b"])


@pytest.mark.anyio
@pytest.mark.parametrize("traceparent", [None, "", "nonsense", f"00-{0:032x}-{2:016x}-01", f"01-{1:032x}-{2:016x}-01"])
async def test_a_create_without_a_trace(teller: Teller, traceparent: str | None) -> None:
    await teller.store.put("p1", StoredPrediction(tenant=None, traceparent=traceparent))
    seen = await teller.see(ENDED)
    [run] = teller.runs
    assert run.parent == seen.span.get_span_context()
    assert of(run, *ORIGIN) == ["store", 1, None]
    assert teller.requests[0].links == ()


@pytest.mark.anyio
async def test_a_create_that_was_not_sampled(teller: Teller) -> None:
    await teller.store.put("p1", StoredPrediction(tenant=None, traceparent=f"00-{1:032x}-{2:016x}-00"))
    await teller.see(ENDED)
    assert teller.runs == []


@pytest.mark.anyio
async def test_a_stream_tells_no_times_of_its_own(teller: Teller) -> None:
    await teller.see(STARTING, "create")
    await teller.see(Prediction(id="p1", status="succeeded"), "stream", at=CREATED + 9)
    [run] = teller.runs
    assert run.name == "generate_content a/b"
    assert (run.start_time, run.end_time) == (int(CREATED * 1e9), int((CREATED + 9) * 1e9))
    assert of(run, "replicate.prediction.total_time", "replicate.prediction.run_time") == [9.0, None]
    assert of(run, "replicate_proxy.lifecycle.observation_lag") == [None]


@pytest.mark.anyio
async def test_a_request_span_does_not_wait_for_more_than_a_stream_tells(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "GRACE", 30.0)
    await teller.see(STARTING, "create")
    with anyio.move_on_after(0.05):
        await teller.see(Prediction(id="p1", status="succeeded"), "stream")
    assert (len(teller.requests), teller.runs) == (2, [])
    await teller.see(ENDED)
    assert of(teller.runs[0], "replicate_proxy.lifecycle.observed_by") == ["poll"]


@pytest.mark.anyio
async def test_a_webhook_that_is_faster_than_the_answer_to_the_create(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "GRACE", 0.5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(teller.see, ENDED, "webhook")
        await anyio.wait_all_tasks_blocked()
        assert len(teller.requests) == 1
        await teller.see(ENDED, "create")
    [run] = teller.runs
    assert of(run, *ORIGIN, "replicate_proxy.lifecycle.observed_by") == ["store", 0, "team-a", "create"]


@pytest.mark.anyio
async def test_a_poll_that_is_faster_than_the_record_of_the_create(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "GRACE", 0.5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(teller.see, ENDED)
        await anyio.wait_all_tasks_blocked()
        await teller.see(STARTING, "create")
    [run] = teller.runs
    assert of(run, *ORIGIN) == ["store", 0, "team-a"]


@pytest.mark.anyio
async def test_who_sees_the_end_of_what_is_known_does_not_wait(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 60.0)
    await teller.see(STARTING, "create")
    await teller.see(ENDED, "webhook")
    await teller.see(Prediction(id="p1", status="succeeded"), "stream")
    await teller.see(replace(ENDED, id="p2"), "create")
    assert len(teller.runs) == 2


@pytest.mark.anyio
async def test_a_stream_s_run_is_that_of_its_deployment_and_version(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    prices = {"a/b": Rates(per_run=7.0), "deployments/a/d": Rates(per_run=1.0)}
    teller = Teller(tracer_provider, exporter, prices=prices)
    await teller.see(replace(STARTING, deployment="a/d", version="v1"), "create")
    await teller.see(Prediction(id="p1", status="succeeded"), "stream")
    [run] = teller.runs
    found = of(run, "replicate.deployment", "replicate.model.version", "replicate.prediction.cost")
    assert found == ["a/d", "v1", 1.0]


@pytest.mark.anyio
async def test_an_end_is_claimed_when_nothing_can_stop_it_any_more(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    asked = 0

    async def prices(request: PriceRequest) -> Rates | None:
        nonlocal asked
        asked += 1
        if asked == 1:
            await anyio.sleep_forever()
        return Rates(per_run=1.0)

    teller = Teller(tracer_provider, exporter, prices=prices)
    await teller.see(STARTING, "create")
    with anyio.move_on_after(0.05):
        await teller.see(ENDED)
    assert (len(teller.requests), teller.runs) == (2, [])
    await teller.see(ENDED)
    [run] = teller.runs
    assert of(run, *ORIGIN, "replicate.prediction.cost") == ["store", 2, "team-a", 1.0]


@pytest.mark.anyio
async def test_a_webhook_that_knows_of_no_end_does_not_wait(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 60.0)
    await teller.see(STARTING, "webhook")
    await teller.see(None, "stream")
    assert len(teller.requests) == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "is_error", "error_type"),
    [
        ("failed", True, "prediction_failed"),
        ("aborted", True, "deadline_exceeded"),
        ("canceled", False, None),
        ("succeeded", False, None),
    ],
)
async def test_how_it_ended(teller: Teller, status: str, is_error: bool, error_type: str | None) -> None:
    await teller.see(replace(ENDED, status=status))
    [run] = teller.runs
    assert (run.status.status_code is StatusCode.ERROR) is is_error
    assert (run.status.description, of(run, "error.type")) == (None, [error_type])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("known", "start", "end", "lag"),
    [
        ({"created_at": None}, STARTED, COMPLETED, 1.5),
        ({"created_at": None, "started_at": None}, COMPLETED, COMPLETED, 1.5),
        ({"completed_at": None}, CREATED, COMPLETED + 1.5, None),
        ({"completed_at": CREATED - 9}, CREATED - 9, CREATED - 9, COMPLETED + 1.5 - CREATED + 9),
        ({"completed_at": COMPLETED + 9}, CREATED, COMPLETED + 9, 0.0),
        ({"created_at": None, "started_at": None, "completed_at": None}, COMPLETED + 1.5, COMPLETED + 1.5, None),
    ],
)
async def test_times_that_are_missing_or_odd(
    teller: Teller, known: dict[str, Any], start: float, end: float, lag: float | None
) -> None:
    await teller.see(replace(ENDED, **known))
    [run] = teller.runs
    assert (run.start_time, run.end_time) == (int(start * 1e9), int(end * 1e9))
    assert of(run, "replicate_proxy.lifecycle.observation_lag") == [lag]


@pytest.mark.anyio
async def test_without_a_model_the_name_is_that_of_the_operation(teller: Teller) -> None:
    await teller.see(replace(ENDED, model=None))
    await teller.see(replace(ENDED, id="t1", kind="training"))
    assert [run.name for run in teller.runs] == ["generate_content", "train a/b"]


@pytest.mark.anyio
async def test_a_name_is_no_place_for_a_secret(teller: Teller) -> None:
    """`pk-team-a` is the caller's key."""
    await teller.see(replace(ENDED, model="pk-team-a/b"), tenant="pk-team-a")
    [run] = teller.runs
    assert run.name == "generate_content REDACTED/b"
    assert "pk-team-a" not in run.to_json()


@pytest.mark.anyio
@pytest.mark.parametrize("how", [refuses, hangs])
async def test_a_store_that_is_out_of_order(
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    how: Callable[[str], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Switched):
        async def claim(self, id: str, /) -> StoredPrediction | None:
            await how(id)
            return None

    store = Broken()
    store.before_put = store.before_get = how
    teller = Teller(tracer_provider, exporter, store=store)
    with caplog.at_level(logging.ERROR, "replicate_proxy_mw"):
        await teller.see(STARTING, "create")
        await teller.see(ENDED)
        await teller.see(ENDED)
    assert len(teller.requests) == 3
    assert [of(run, *ORIGIN) for run in teller.runs] == [["observed", None, "team-a"]]
    assert {record.message.partition(":")[0] for record in caplog.records} == {"prediction store failed"}


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["poll", "cancel"])
async def test_a_store_that_could_not_be_read_may_know_that_it_was_told(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, by: ObservedBy
) -> None:
    store = Switched()
    await Teller(tracer_provider, exporter, store=store).see(STARTING, "create")
    first, second = (Teller(tracer_provider, exporter, store=store) for _ in range(2))
    await first.see(ENDED)
    store.before_get = refuses
    await second.see(ENDED, by)
    assert [of(run, *ORIGIN) for run in second.runs] == [["store", 1, "team-a"]]


@pytest.mark.anyio
async def test_a_create_that_could_not_be_recorded_is_told_by_the_one_who_knows(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    store = Switched()
    store.before_put = refuses
    teller = Teller(tracer_provider, exporter, store=store)
    await teller.see(ENDED, "create")
    assert [of(run, *ORIGIN) for run in teller.runs] == [["observed", None, "team-a"]]


@pytest.mark.anyio
async def test_a_store_that_fails_while_it_is_waited_for(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "GRACE", 0.5)
    store = Switched()
    teller = Teller(tracer_provider, exporter, store=store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(teller.see, ENDED)
        await anyio.wait_all_tasks_blocked()
        store.before_get = refuses
    assert teller.runs == []


@pytest.mark.anyio
async def test_what_was_told_while_the_store_was_out_of_order_is_only_counted_later(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    class Claims(Switched):
        fails = True

        async def claim(self, id: str, /) -> StoredPrediction | None:
            if self.fails:
                raise OSError
            return await super().claim(id)

    reader, store = InMemoryMetricReader(), Claims()
    teller = Teller(tracer_provider, exporter, store=store, reader=reader)
    await teller.see(STARTING, "create")
    await teller.see(ENDED)
    store.fails = False
    for _ in range(2):
        await teller.see(ENDED)
    assert [of(run, *ORIGIN) for run in teller.runs] == [["observed", None, "team-a"]]
    data = reader.get_metrics_data()
    assert data is not None
    [counted] = [
        point.value
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == "replicate.prediction.terminal"
        for point in metric.data.data_points
        if isinstance(point, NumberDataPoint)
    ]
    assert counted == 1


@pytest.mark.anyio
async def test_a_request_span_ends_even_if_the_rest_is_stopped(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    async def prices(request: PriceRequest) -> Rates | None:
        await anyio.sleep_forever()
        return None

    teller = Teller(tracer_provider, exporter, prices=prices)
    with anyio.move_on_after(0.05):
        await teller.see(ENDED)
    assert len(teller.requests) == 1


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.mark.anyio
@pytest.mark.parametrize("traced", [True, False])
async def test_what_is_counted(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, reader: InMemoryMetricReader, traced: bool
) -> None:
    prices = {"a/b": Rates(per_run=2.0)}
    teller = Teller(tracer_provider if traced else None, exporter, prices=prices, reader=reader)
    await teller.see(STARTING, "create")
    for _ in range(2):
        await teller.see(ENDED, tenant="team-b")
    await teller.see(replace(ENDED, id="p2"))
    of_run = {"replicate.model.name": "a/b", "replicate.prediction.status": "succeeded"}
    assert labels(reader, "replicate.prediction.duration") == [of_run]
    assert labels(reader, "replicate.prediction.terminal") == [
        {**of_run, "replicate_proxy.lifecycle.observed_by": "poll"}
    ]
    assert labels(reader, "replicate.prediction.cost") == [
        {
            "replicate.model.name": "a/b",
            "replicate_proxy.tenant": "team-a",
            "replicate.prediction.cost.currency": "USD",
        }
    ]
    assert len(teller.runs) == (2 if traced else 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("capture", "attributes", "events"),
    [
        ("NO_CONTENT", [None, None], 0),
        ("SPAN_ONLY", ['{"prompt":"Ada"}', '"HELLO"'], 0),
        ("EVENT_ONLY", [None, None], 1),
        ("SPAN_AND_EVENT", ['{"prompt":"Ada"}', '"HELLO"'], 1),
    ],
)
async def test_content(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, capture: Mode, attributes: list[Any], events: int
) -> None:
    def redact(path: tuple[str | int, ...], value: object) -> object:
        return value if path else str(value).upper()

    teller = Teller(tracer_provider, exporter, capture=capture, redact=redact)
    await teller.see(STARTING, "create")
    await teller.see(ENDED)
    [run] = teller.runs
    assert of(run, "replicate.input", "replicate.output") == attributes
    shown = [event for event in run.events if event.name == "replicate.content"]
    assert len(shown) == events
    for event in shown:
        assert event.timestamp == run.end_time
        assert event.attributes == {"replicate.input": '{"prompt":"Ada"}', "replicate.output": '"HELLO"'}


@pytest.mark.anyio
@pytest.mark.parametrize("capture", ["SPAN_ONLY", "EVENT_ONLY"])
@pytest.mark.parametrize("case", ["create", "poll", "no create", "no content"])
async def test_content_that_is_not_shown(
    tracer_provider: TracerProvider, exporter: InMemorySpanExporter, capture: Mode, case: str
) -> None:
    teller = Teller(tracer_provider, exporter, capture=capture)
    if case != "no create":
        await teller.see(STARTING, "create", debug=False if case == "create" else None)
    ended = replace(ENDED, input=None, output=None) if case == "no content" else ENDED
    await teller.see(ended, debug=case != "poll")
    [run] = teller.runs
    assert of(run, "replicate.input", "replicate.output") == [None, None]
    assert [event.name for event in run.events] == ["replicate.started"]


def test_details_are_kept() -> None:
    said = {"portkey.trace_id": "order-42", "portkey.metadata._user": "ü"}
    kept = Details(model="a/b", version="v", deployment="a/d", created_at=CREATED, caller=said, capture=True)
    assert Details.of(kept.text()) == kept
    assert Details.of(Details().text()) == Details(caller=None)
    assert len(kept.text()) < 200


def test_of_long_metadata_the_trace_id_is_kept() -> None:
    said = {"portkey.trace_id": "order-42", "portkey.metadata.a": "x" * MAX_DETAILS}
    kept = Details(model="a/b", created_at=CREATED, caller=said, capture=True)
    assert Details.of(kept.text()) == kept._replace(caller={"portkey.trace_id": "order-42"})
    assert Details.of(kept._replace(caller={"portkey.metadata.a": "x" * MAX_DETAILS}).text()).caller is None


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        '{"model": 1, "created_at": "now", "caller": ["a"], "capture": "yes"}',
        '{"created_at": true, "capture": 1}',
        '{"created_at": NaN}',
        '{"created_at": 1e999}',
        '{"created_at": 1e300}',
        '{"created_at": -1.0}',
    ],
)
def test_what_others_have_written_is_not_believed(text: str | None) -> None:
    assert Details.of(text) == Details()


def test_only_what_a_caller_may_say_is_taken_for_that() -> None:
    caller = {
        "portkey.trace_id": "order-42",
        "portkey.metadata.a": "b",
        "portkey.metadata.b": 1,
        "portkey.metadata_invalid": "x",
        "replicate.prediction.cost": "0",
        "other": "x",
    }
    assert Details.of(json.dumps({"caller": caller})).caller == {
        "portkey.trace_id": "order-42",
        "portkey.metadata.a": "b",
    }


_TEXT = st.text(max_size=256)


@example(model="\N{GRINNING FACE}" * 256, created_at=CREATED, caller={"portkey.trace_id": "ü" * 256}, capture=True)
@given(
    model=st.none() | _TEXT,
    created_at=st.none() | st.floats(0, 2**33),
    caller=st.dictionaries(st.sampled_from(["portkey.trace_id", "portkey.span_id", "portkey.metadata.a"]), _TEXT),
    capture=st.booleans(),
)
def test_details_are_never_long(
    model: str | None, created_at: float | None, caller: dict[str, str], capture: bool
) -> None:
    names = {"model": model, "version": model, "deployment": model}
    text = Details(**names, created_at=created_at, caller=caller, capture=capture).text()
    assert len(text.encode()) <= MAX_DETAILS
    assert Details.of(text).capture is capture
