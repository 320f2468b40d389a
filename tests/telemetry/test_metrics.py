from __future__ import annotations

import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from opentelemetry import metrics as metrics_api
from opentelemetry.metrics import Meter, NoOpMeterProvider
from opentelemetry.metrics import _internal as globals_of_metrics
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader, Metric, Sum
from opentelemetry.sdk.metrics.export import Histogram as Buckets
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from replicate_proxy_mw import Forward, KeyRequest, ProxyRequest, ProxyResponse, Rates, ReplicateKey, waiting
from replicate_proxy_mw.telemetry import attempt, request
from replicate_proxy_mw.telemetry.metrics import MAX_MODELS, Metrics
from replicate_proxy_mw.telemetry.names import METRICS
from tests.raw_asgi import KEY, TOKEN, Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.tenants import JSON, answers

NOBODY = "http://127.0.0.1:1"
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
ENDED = {
    "id": "p1",
    "model": "a/b",
    "version": "v1",
    "status": "succeeded",
    "created_at": "2026-01-01T00:00:00Z",
    "started_at": "2026-01-01T00:00:02Z",
    "completed_at": "2026-01-01T00:00:10Z",
    "metrics": {"predict_time": 8.0, "input_token_count": 5, "output_token_count": 70},
    "output": "x",
}
PRICES = {"a/b": Rates(per_second=0.5)}
OF_RUN = {"replicate.model.name": "a/b", "replicate.prediction.status": "succeeded"}
OF_GEN_AI = {
    "gen_ai.operation.name": "generate_content",
    "gen_ai.provider.name": "replicate",
    "gen_ai.response.model": "a/b",
}


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


def _metrics(reader: InMemoryMetricReader) -> dict[str, Metric]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    scopes = [of_scope for of_resource in data.resource_metrics for of_scope in of_resource.scope_metrics]
    assert {of_scope.scope.name for of_scope in scopes} <= {"replicate_proxy_mw"}
    return {metric.name: metric for of_scope in scopes for metric in of_scope.metrics}


def _sums(reader: InMemoryMetricReader, name: str) -> list[tuple[dict[str, Any], float]]:
    """Labels and values; of a histogram, the sum of what was recorded."""
    metric = _metrics(reader).get(name)
    if metric is None:
        return []
    return [
        (dict(point.attributes or {}), point.sum if isinstance(metric.data, Buckets) else point.value)  # type: ignore[union-attr]
        for point in metric.data.data_points
    ]


async def _serve(app: Any, *scopes: dict[str, Any], body: bytes = b"{}") -> None:
    for scope in scopes:
        await Caller([body if scope["method"] == "POST" else b""]).call(app, scope)
    await app.aclose()


CREATE = http_scope("POST", "/v1/models/a/b/predictions")
ACCOUNT = http_scope(target="/v1/account")


def _ended(**more: Any) -> bytes:
    return json.dumps(ENDED | more).encode()


@pytest.mark.anyio
async def test_every_metric_is_as_the_registry_says(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    ways = [(_ended(), b"201 Created"), (b"{}", b"503 Busy"), (b"{}", b"200 OK")]

    def script(connection: Connection) -> None:
        while connection.request():
            body, status = ways.pop(0)
            connection.answer(body, status=status, headers=b"retry-after: 0\r\n")

    upstream.script = script
    app = proxy(upstream.url, meter_provider=provider, prices=PRICES, options={"safe_retries": 1})
    await _serve(app, CREATE, ACCOUNT)
    found = _metrics(reader)
    assert {*found} == {*METRICS}
    for name, metric in found.items():
        listed, data = METRICS[name], metric.data
        assert (metric.unit, metric.description) == (listed.unit, listed.meaning)
        assert {label for point in data.data_points for label in point.attributes or {}} <= {*listed.labels}
        if isinstance(data, Buckets):
            assert listed.kind == "histogram"
            assert {tuple(point.explicit_bounds) for point in data.data_points} == {listed.buckets}
        else:
            assert isinstance(data, Sum)
            assert listed.kind == ("counter" if data.is_monotonic else "up/down counter")


@pytest.mark.anyio
async def test_the_numbers_of_a_run(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    upstream.script = answers(_ended())
    await _serve(proxy(upstream.url, meter_provider=provider, prices=PRICES), CREATE)
    assert _sums(reader, "replicate.prediction.queue.duration") == [(OF_RUN, 2.0)]
    assert _sums(reader, "replicate.prediction.run.duration") == [(OF_RUN, 8.0)]
    assert _sums(reader, "replicate.prediction.duration") == [(OF_RUN, 10.0)]
    assert _sums(reader, "replicate.prediction.terminal") == [
        (OF_RUN | {"replicate_proxy.lifecycle.observed_by": "create"}, 1)
    ]
    assert _sums(reader, "replicate_proxy.prediction.polls") == [
        ({"replicate_proxy.lifecycle.observed_by": "create"}, 0)
    ]
    assert _sums(reader, "replicate.prediction.cost") == [
        (
            {
                "replicate.model.name": "a/b",
                "replicate_proxy.tenant": "team-a",
                "replicate.prediction.cost.currency": "USD",
            },
            4.0,
        )
    ]
    assert _sums(reader, "gen_ai.client.token.usage") == [
        (OF_GEN_AI | {"gen_ai.token.type": "input"}, 5),
        (OF_GEN_AI | {"gen_ai.token.type": "output"}, 70),
    ]
    assert (OF_GEN_AI, 10.0) in _sums(reader, "gen_ai.client.operation.duration")


@pytest.mark.anyio
async def test_of_a_training_the_cost_alone_is_counted(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    upstream.script = answers(_ended())
    app = proxy(upstream.url, meter_provider=provider, prices=PRICES)
    await _serve(app, http_scope("POST", "/v1/models/a/b/versions/v1/trainings"))
    found = {name for name in _metrics(reader) if name.startswith(("replicate.", "gen_ai."))}
    assert found == {"replicate.prediction.cost"}


@pytest.mark.anyio
async def test_what_replicate_does_not_tell_is_not_counted(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    upstream.script = answers(b'{"id": "p1", "status": "succeeded"}')
    await _serve(proxy(upstream.url, meter_provider=provider), CREATE)
    assert [labels for labels, _ in _sums(reader, "replicate.prediction.terminal")] == [
        OF_RUN | {"replicate.model.name": "_OTHER", "replicate_proxy.lifecycle.observed_by": "create"}
    ]
    assert [labels for labels, _ in _sums(reader, "gen_ai.client.operation.duration")] == [
        {"gen_ai.operation.name": "create_prediction", "gen_ai.provider.name": "replicate"}
    ]
    times = {name for name in METRICS if name.startswith("replicate.prediction.") and name.endswith("duration")}
    unknown = {*times, "replicate_proxy.prediction.observation_lag", "gen_ai.client.token.usage"}
    assert unknown.isdisjoint(_metrics(reader))
    assert len(times) == 3


@pytest.mark.anyio
async def test_a_run_that_failed_and_a_create_that_was_refused(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    upstream.script = answers(_ended(status="failed"))
    await _serve(proxy(upstream.url, meter_provider=provider), CREATE)
    upstream.script = answers(_ended(), status=b"422 No")
    await _serve(proxy(upstream.url, meter_provider=provider), CREATE)
    created = OF_GEN_AI | {"gen_ai.operation.name": "create_prediction"}
    refused = {name: value for name, value in created.items() if name != "gen_ai.response.model"}
    found = [labels for labels, _ in _sums(reader, "gen_ai.client.operation.duration")]
    assert len(found) == 3
    assert OF_GEN_AI | {"error.type": "prediction_failed"} in found
    assert created in found
    assert refused | {"error.type": "422"} in found


@pytest.mark.anyio
async def test_the_labels_of_an_attempt_and_a_retry(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    upstream.script = answers(b"{}", b"503 Busy", b"retry-after: 0\r\n")
    await _serve(proxy(upstream.url, meter_provider=provider, options={"safe_retries": 2}), ACCOUNT)
    assert [labels for labels, _ in _sums(reader, "http.client.request.duration")] == [
        {
            "http.request.method": "GET",
            "server.address": "127.0.0.1",
            "url.template": "/v1/account",
            "http.response.status_code": 503,
            "error.type": "503",
        }
    ]
    assert _sums(reader, "replicate_proxy.upstream.retries") == [({"replicate_proxy.retry.reason": "503"}, 2)]


@pytest.mark.anyio
async def test_below_a_span_of_the_host_s_the_host_counts_its_requests(
    provider: MeterProvider, reader: InMemoryMetricReader, tracer_provider: TracerProvider
) -> None:
    with tracer_provider.get_tracer("host").start_as_current_span("GET"):
        await _serve(proxy(NOBODY, meter_provider=provider), http_scope(headers=[]))
    assert "http.server.request.duration" not in _metrics(reader)
    assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [1]


@pytest.mark.anyio
async def test_an_attempt_that_does_not_get_there_is_counted(
    provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    with RawUpstream() as gone:
        url = gone.url
    await _serve(proxy(url, meter_provider=provider), ACCOUNT)
    [(labels, _)] = _sums(reader, "http.client.request.duration")
    assert labels["error.type"] == "upstream_unreachable"
    assert "http.response.status_code" not in labels


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("target", "operation"),
    [
        ("/v1/account", "account.get"),
        ("/v1/invented/by/somebody", "_OTHER"),
        ("/v1/-/webhooks", "webhooks"),
        ("/v1/-/streams/x", "streams"),
    ],
)
async def test_requests_are_told_apart_by_operation(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader, target: str, operation: str
) -> None:
    options = {"webhook_secrets": [SECRET], "proxy_streams": True, "stream_key": "k" * 32}
    await _serve(proxy(upstream.url, meter_provider=provider, options=options), http_scope(target=target))
    for name in ("requests", "request.duration", "overhead.duration", "in_flight"):
        [(labels, _)] = _sums(reader, f"replicate_proxy.{name}")
        assert labels["replicate.operation"] == operation


@pytest.mark.anyio
async def test_sums_grow_from_one_collection_to_the_next(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    app = proxy(NOBODY, meter_provider=provider)
    labels = {"replicate.operation": "account.get", "replicate_proxy.outcome": "auth_missing"}
    for count in (1, 2, 3):
        await _serve(app, http_scope(target="/v1/account", headers=[]))
        assert _sums(reader, "replicate_proxy.requests") == [(labels, count)]
    assert _sums(reader, "replicate_proxy.requests") == [(labels, 3)]


@pytest.mark.anyio
async def test_a_backend_that_wants_what_is_new_gets_what_is_new() -> None:
    temporality: dict[type, AggregationTemporality] = {
        kind: AggregationTemporality.DELTA for kind in (Counter, ObservableCounter, Histogram)
    }
    reader = InMemoryMetricReader(preferred_temporality=temporality)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    app = proxy(NOBODY, meter_provider=provider)
    for count in (1, 2):
        await _serve(app, *[http_scope(headers=[])] * count)
        assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [count]
        assert [value for _, value in _sums(reader, "replicate_proxy.in_flight")] == [0]
    provider.shutdown()


@pytest.mark.anyio
async def test_two_middlewares_count_with_the_same_instruments(
    provider: MeterProvider, reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "opentelemetry"):
        for _ in range(2):
            await _serve(proxy(NOBODY, meter_provider=provider), http_scope(headers=[]))
        assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [2]
    assert caplog.messages == []


@pytest.mark.anyio
async def test_two_providers_have_their_own(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    other_reader = InMemoryMetricReader()
    other = MeterProvider([other_reader], shutdown_on_exit=False)
    await _serve(proxy(NOBODY, meter_provider=provider), http_scope(headers=[]))
    await _serve(proxy(NOBODY, meter_provider=other), *[http_scope(headers=[])] * 2)
    for of_one, count in ((reader, 1), (other_reader, 2)):
        assert [value for _, value in _sums(of_one, "replicate_proxy.requests")] == [count]
    other.shutdown()


class SlowMeterProvider(MeterProvider):
    """Takes its time to make a meter, so that the first requests of all threads find none made."""

    def get_meter(self, *arguments: Any, **keywords: Any) -> Meter:
        time.sleep(0.05)
        return super().get_meter(*arguments, **keywords)


@pytest.mark.parametrize("apart", [True, False])
def test_nothing_is_lost_between_threads(reader: InMemoryMetricReader, apart: bool) -> None:
    """Each with an event loop of its own; with a middleware for each, or one for all."""
    provider = SlowMeterProvider([reader], shutdown_on_exit=False)
    shared = proxy(NOBODY, meter_provider=provider)

    def serve() -> None:
        app = proxy(NOBODY, meter_provider=provider) if apart else shared
        anyio.run(_serve, app, *[http_scope(headers=[])] * 50)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [200]
    assert [value for _, value in _sums(reader, "replicate_proxy.in_flight")] == [0]
    provider.shutdown()


@pytest.fixture
def no_global(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API's globals as they are when a process starts."""
    monkeypatch.delenv("OTEL_PYTHON_METER_PROVIDER", raising=False)
    monkeypatch.setattr(globals_of_metrics, "_METER_PROVIDER", None)
    monkeypatch.setattr(globals_of_metrics, "_METER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(globals_of_metrics, "_PROXY_METER_PROVIDER", globals_of_metrics._ProxyMeterProvider())


@pytest.mark.anyio
@pytest.mark.usefixtures("no_global")
async def test_a_global_provider_may_be_set_later(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    app = proxy(NOBODY)
    await _serve(app, http_scope(headers=[]))
    metrics_api.set_meter_provider(provider)
    await _serve(app, http_scope(headers=[]))
    assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [1]


@pytest.mark.anyio
async def test_the_one_that_is_given_has_precedence(
    monkeypatch: pytest.MonkeyPatch, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    monkeypatch.setattr(globals_of_metrics, "_METER_PROVIDER", provider)
    other_reader = InMemoryMetricReader()
    other = MeterProvider([other_reader], shutdown_on_exit=False)
    await _serve(proxy(NOBODY, meter_provider=other), http_scope(headers=[]))
    assert _metrics(reader) == {}
    assert [value for _, value in _sums(other_reader, "replicate_proxy.requests")] == [1]
    other.shutdown()


@pytest.mark.usefixtures("no_global")
def test_without_an_sdk_there_is_nothing_to_count_with() -> None:
    assert Metrics(None).current() is None
    assert Metrics(NoOpMeterProvider()).current() is None


@pytest.mark.anyio
async def test_with_an_sdk_that_is_switched_off_neither(
    monkeypatch: pytest.MonkeyPatch, reader: InMemoryMetricReader
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = MeterProvider([reader], shutdown_on_exit=False)
    assert Metrics(provider).current() is None
    await _serve(proxy(NOBODY, meter_provider=provider), http_scope(headers=[]))
    assert _metrics(reader) == {}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_only_so_many_models_are_told_apart(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    numbers = iter([*range(MAX_MODELS + 5), 0, MAX_MODELS])

    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b'{"id": "p1", "status": "starting", "model": "a/b%d"}' % next(numbers))

    upstream.script = script
    await _serve(proxy(upstream.url, meter_provider=provider), *[CREATE] * (MAX_MODELS + 7))
    metric = _metrics(reader)["gen_ai.client.operation.duration"].data
    assert isinstance(metric, Buckets)
    counted = {(point.attributes or {})["gen_ai.response.model"]: point.count for point in metric.data_points}
    assert MAX_MODELS == 200
    assert counted == {f"a/b{number}": 1 for number in range(200)} | {"a/b0": 2, "_OTHER": 6}


@pytest.mark.anyio
async def test_runs_lead_to_their_spans_and_nothing_else_does(
    upstream: RawUpstream,
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    upstream.script = answers(_ended())
    await _serve(proxy(upstream.url, meter_provider=provider, tracer_provider=tracer_provider), CREATE)
    [run] = [span for span in exporter.get_finished_spans() if span.name == "generate_content a/b"]
    found = {
        name: [exemplar.span_id for point in metric.data.data_points for exemplar in point.exemplars]
        for name, metric in _metrics(reader).items()
    }
    assert run.context is not None
    of_runs = (
        "replicate.prediction.queue.duration",
        "replicate.prediction.run.duration",
        "replicate.prediction.duration",
    )
    assert {name: ids for name, ids in found.items() if ids} == {name: [run.context.span_id] for name in of_runs}


def test_a_provider_that_nobody_has_any_more_is_not_kept() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    anyio.run(_serve, proxy(NOBODY, meter_provider=provider), http_scope(headers=[]))
    assert _metrics(reader)
    gone = weakref.ref(provider)
    del provider, reader
    gc.collect()
    assert gone() is None


class Watch:
    """Stands still but where a test lets seconds go by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


WAIT = 500.0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    for module in (waiting, request, attempt):
        monkeypatch.setattr(module, "perf_counter", watch)
    return watch


def _times(reader: InMemoryMetricReader) -> list[float]:
    """How long requests took, and how much of that was the proxy's own."""
    return [
        sum(value for _, value in _sums(reader, f"replicate_proxy.{name}"))
        for name in ("request.duration", "overhead.duration")
    ]


@pytest.mark.anyio
async def test_an_upstream_that_keeps_one_waiting_is_no_part_of_the_proxy_s_own_time(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader, watch: Watch
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        watch.now += WAIT
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app, caller = proxy(upstream.url, meter_provider=provider), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, ACCOUNT)
        await caller.got_chunk.wait()
        await anyio.wait_all_tasks_blocked()
        watch.now += WAIT
        upstream.go_on.set()
    await app.aclose()
    assert _times(reader) == [2 * WAIT, 0.0]
    assert [value for _, value in _sums(reader, "http.client.request.duration")] == [2 * WAIT]


@pytest.mark.anyio
async def test_neither_is_the_pause_before_another_attempt(
    upstream: RawUpstream,
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def sleep(seconds: float) -> None:
        watch.now += WAIT

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(status=b"503 Unavailable")
        connection.request()
        connection.answer()

    upstream.script = script
    monkeypatch.setattr("replicate_proxy_mw.layers.resend.anyio.sleep", sleep)
    await _serve(proxy(upstream.url, meter_provider=provider, options={"safe_retries": 1}), ACCOUNT)
    assert _times(reader) == [WAIT, 0.0]
    assert _sums(reader, "replicate_proxy.upstream.retries") == [({"replicate_proxy.retry.reason": "503"}, 1)]


@pytest.mark.anyio
async def test_neither_is_an_answer_that_is_taken_slowly(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader, watch: Watch
) -> None:
    class Slow(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            watch.now += WAIT
            await super().send(message)

    app = proxy(upstream.url, meter_provider=provider)
    await Slow().call(app, ACCOUNT)
    await app.aclose()
    assert _times(reader) == [2 * WAIT, 0.0]


@pytest.mark.anyio
@pytest.mark.parametrize("content_type", [JSON, (b"content-type", b"application/octet-stream")])
async def test_nor_is_a_body_that_is_sent_slowly(
    upstream: RawUpstream,
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    watch: Watch,
    content_type: tuple[bytes, bytes],
) -> None:
    """JSON is read before anything goes up, all else as it goes up."""

    class Slow(Caller):
        async def receive(self) -> dict[str, Any]:
            if self.body:
                await anyio.wait_all_tasks_blocked()
                watch.now += WAIT
            return await super().receive()

    app = proxy(upstream.url, meter_provider=provider)
    await Slow([b'{"a":', b" 1", b"}"]).call(app, http_scope("POST", "/v1/predictions", [KEY, content_type]))
    await app.aclose()
    assert upstream.requests[0].body
    assert _times(reader) == [3 * WAIT, 0.0]


@pytest.mark.anyio
async def test_what_the_host_does_is(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader, watch: Watch
) -> None:
    async def resolver(asked: KeyRequest) -> ReplicateKey:
        watch.now += WAIT
        return ReplicateKey(TOKEN)

    def layer(forward: Forward) -> Forward:
        async def slow(asked: ProxyRequest) -> ProxyResponse:
            watch.now += WAIT
            return await forward(asked)

        return slow

    await _serve(proxy(upstream.url, meter_provider=provider, key_resolver=resolver, layers=[layer]), ACCOUNT)
    assert _times(reader) == [2 * WAIT, 2 * WAIT]


def _holds(connection: Connection) -> None:
    connection.request()
    connection.upstream.ready.set()
    connection.upstream.go_on.wait(5)
    connection.answer()


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["answered", "left", "cancelled"])
async def test_a_request_is_in_flight_until_it_ends(
    upstream: RawUpstream, provider: MeterProvider, reader: InMemoryMetricReader, end: str
) -> None:
    upstream.script = _holds
    app, caller = proxy(upstream.url, meter_provider=provider), Caller()
    labels = {"replicate.operation": "account.get"}
    assert _sums(reader, "replicate_proxy.in_flight") == []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, ACCOUNT)
        await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        assert _sums(reader, "replicate_proxy.in_flight") == [(labels, 1)]
        ends: dict[str, Callable[[], object]] = {
            "answered": upstream.go_on.set,
            "left": caller.left.set,
            "cancelled": tasks.cancel_scope.cancel,
        }
        ends[end]()
    await app.aclose()
    assert _sums(reader, "replicate_proxy.in_flight") == [(labels, 0)]


@pytest.mark.anyio
async def test_one_that_the_host_breaks_off_is_not_in_flight_any_more(
    provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    async def receive() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await proxy(NOBODY, meter_provider=provider)(ACCOUNT, receive, Caller().send)
    assert _sums(reader, "replicate_proxy.in_flight") == [({"replicate.operation": "account.get"}, 0)]


def test_a_provider_without_a_hash(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    class Wrapped:
        def get_meter(self, *arguments: Any, **keywords: Any) -> Meter:
            return provider.get_meter(*arguments, **keywords)

        def __eq__(self, other: object) -> bool:
            return self is other

    wrapped: Any = Wrapped()
    for _ in range(2):
        anyio.run(_serve, proxy(NOBODY, meter_provider=wrapped), http_scope(headers=[]))
    assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [2]


def test_a_provider_that_nothing_can_refer_to_weakly(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    class Slotted:
        __slots__ = ()

        def get_meter(self, *arguments: Any, **keywords: Any) -> Meter:
            return provider.get_meter(*arguments, **keywords)

    slotted: Any = Slotted()
    for _ in range(2):
        anyio.run(_serve, proxy(NOBODY, meter_provider=slotted), http_scope(headers=[]))
    assert [value for _, value in _sums(reader, "replicate_proxy.requests")] == [2]
