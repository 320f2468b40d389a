"""What becomes of requests, played on one stage: the proxy before a FakeReplicate, with real exporters to a sink."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from redis.asyncio import Redis

from replicate_proxy_mw import MappingKeyResolver, Policy, ReplicateKey
from replicate_proxy_mw.checks.patterns import matches
from replicate_proxy_mw.layers.cache import cache_catalogue
from replicate_proxy_mw.layers.coalescing import coalesce_polls
from replicate_proxy_mw.layers.guardrails import guardrails
from replicate_proxy_mw.store.redis import RedisPredictionStore
from replicate_proxy_mw.telemetry import Rates, configure_telemetry, names
from replicate_proxy_mw.testing import FakeReplicate
from replicate_proxy_mw.testing.catalogue import seed
from replicate_proxy_mw.testing.serve import serve
from tests.otlp import ExportedSpan, Point, Sink, tracing
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.tenants import HELLO_WORLD, JSON, MINE, Switched, refuses

Header = tuple[bytes, bytes]

# Seconds; long, so that no delay of the machine has a prediction begin or end before the test lets it.
QUEUE, RUN = 60.0, 120.0

ALWAYS_FAILS = "replicate/always-fails"
LLAMA = "meta/meta-llama-3-8b-instruct"
STREAM_KEY = "a-key-that-all-replicas-have-in-common"
PRICES = {LLAMA: Rates(per_second=0.5, per_input_token=0.25), "replicate/hello-world": Rates(per_run=2.0)}
CALLER: tuple[Header, ...] = (
    (b"x-portkey-trace-id", b"order-42"),
    (b"x-portkey-span-id", b"span-1"),
    (b"x-portkey-parent-span-id", b"span-0"),
    (b"x-portkey-span-name", b"Summary"),
    (b"x-portkey-metadata", b'{"_user": "u1", "team space": "t"}'),
    (b"x-portkey-provider", b"@team"),
    (b"user-agent", b"test/1"),
)


@dataclass
class Stage:
    """The parts of a scenario. `fake`'s predictions wait for `QUEUE` and run for `RUN` seconds of its clock."""

    fake: FakeReplicate
    sink: Sink
    tracer_provider: TracerProvider
    meter_provider: MeterProvider

    def proxy(self, upstream: str | None = None, **keywords: Any) -> Any:
        """A process of its own, but for its exporters."""
        return proxy(
            upstream or self.fake.url,
            **({"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider} | keywords),
        )

    def streaming(self, **keywords: Any) -> Any:
        options = {
            "proxy_streams": True,
            "stream_key": STREAM_KEY,
            "stream_hosts": [httpx.URL(self.fake.streams_url).netloc.decode()],
        }
        return self.proxy(options=options, **keywords)

    async def ask(
        self, app: Any, method: str, target: str, content: object = None, *headers: Header, who: Header = KEY
    ) -> Caller:
        scope = http_scope(method, target, [who, *headers])
        return await call(app, scope, b"" if content is None else json.dumps(content).encode())

    async def create(self, app: Any, *headers: Header, version: str = HELLO_WORLD, **more: Any) -> str:
        content = {"version": version, "input": {"text": "Ada", "prompt": "Ada Lovelace"}, **more}
        return id_of(await self.ask(app, "POST", "/v1/predictions", content, *headers))

    async def poll(self, app: Any, id: str, *headers: Header, seconds: float = 0.0) -> str:
        """The status, when so many seconds more have gone by."""
        self.fake.clock.advance(seconds)
        status: str = told(await self.ask(app, "GET", f"/v1/predictions/{id}", None, *headers))["status"]
        return status

    @property
    def runs(self) -> list[ExportedSpan]:
        return [span for span in self.sink.spans if kind(span) == "run"]

    @property
    def run(self) -> ExportedSpan:
        [run] = self.runs
        return run

    @property
    def requests(self) -> list[ExportedSpan]:
        """In the order of their start."""
        return sorted((span for span in self.sink.spans if kind(span) == "request"), key=lambda span: span.start)

    @property
    def attempts(self) -> list[ExportedSpan]:
        return sorted((span for span in self.sink.spans if kind(span) == "attempt"), key=lambda span: span.start)

    def points(self, name: str) -> list[Point]:
        return self.sink.metrics.get(name, [])


class Recorded:
    """The spans of one test, by kind, as the SDK has them."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def unchecked(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    @property
    def all(self) -> list[ReadableSpan]:
        spans = self.unchecked
        for span in spans:
            assert span.attributes is not None
            assert [name for name in span.attributes if not names.known(name)] == []
            assert not span.events
            assert span.status.description is None
            assert "pk-team-a" not in span.to_json()
            assert TOKEN not in span.to_json()
        return spans

    def one(self, kind: SpanKind) -> ReadableSpan:
        [span] = [span for span in self.all if span.kind is kind]
        return span

    @property
    def request(self) -> ReadableSpan:
        return self.one(SpanKind.SERVER)

    @property
    def attempt(self) -> ReadableSpan:
        return self.one(SpanKind.CLIENT)


def of(span: ReadableSpan, *found: str) -> list[Any]:
    assert span.attributes is not None
    return [span.attributes.get(name) for name in found]


def labels(reader: InMemoryMetricReader, name: str) -> list[dict[str, Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    return [
        dict(point.attributes or {})
        for of_resource in data.resource_metrics
        for of_scope in of_resource.scope_metrics
        for metric in of_scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


@contextmanager
def stage(**options: Any) -> Iterator[Stage]:
    defaults: dict[str, Any] = {"tokens": {TOKEN: "acme"}, "models": [MINE], "queue_time": QUEUE, "run_time": RUN}
    with FakeReplicate(**(defaults | options)).serve() as fake, Sink() as sink, tracing(sink) as providers:
        yield Stage(fake, sink, *providers)


def kind(span: ExportedSpan) -> str:
    """Which of the three it is; `host` for those of others."""
    if span.scope != "replicate_proxy_mw":
        return "host"
    if span.kind in ("SERVER", "INTERNAL"):
        return "request"
    return "run" if span.name.split()[0] in ("generate_content", "train") else "attempt"


def told(caller: Caller) -> Any:
    return json.loads(caller.content)


def id_of(caller: Caller) -> str:
    assert caller.status in (201, 202), caller.content
    return str(told(caller)["id"])


def stream_of(caller: Caller) -> str:
    """The target of the stream of what was created."""
    return httpx.URL(told(caller)["urls"]["stream"]).raw_path.decode()


async def asynchronous(stage: Stage) -> None:
    app = stage.proxy()
    id = await stage.create(app, *CALLER)
    statuses = [
        await stage.poll(app, id),
        await stage.poll(app, id, (b"x-portkey-trace-id", b"poller"), seconds=QUEUE + 1),
        await stage.poll(app, id),
        await stage.poll(app, id, (b"x-portkey-trace-id", b"poller"), seconds=RUN),
        await stage.poll(app, id),
    ]
    assert statuses == ["starting", "processing", "processing", "succeeded", "succeeded"]


async def synchronous(stage: Stage) -> None:
    app, caller = stage.proxy(prices=PRICES), Caller([b'{"input": {"prompt": "Ada Lovelace"}}'])
    scope = http_scope("POST", f"/v1/models/{LLAMA}/predictions", [KEY, (b"prefer", b"wait"), *CALLER])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, scope)
        while not caller.complete:
            stage.fake.clock.advance(QUEUE + RUN)
            await anyio.sleep(0.01)
    await app.aclose()
    assert told(caller)["status"] == "succeeded"


async def official(stage: Stage) -> None:
    app = stage.proxy(prices=PRICES)
    content = {"input": {"prompt": "Ada Lovelace"}}
    id = id_of(await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", content, *CALLER))
    await stage.poll(app, id, seconds=QUEUE + RUN)


async def deployment(stage: Stage) -> None:
    app = stage.proxy(prices={"deployments/acme/hello": Rates(per_second=0.5)})
    content = {"input": {"text": "Ada"}}
    id = id_of(await stage.ask(app, "POST", "/v1/deployments/acme/hello/predictions", content))
    await stage.poll(app, id, seconds=QUEUE + RUN)


async def training(stage: Stage) -> None:
    app = stage.proxy(prices={"replicate/hello-world": Rates(per_second=0.5)})
    target = f"/v1/models/replicate/hello-world/versions/{HELLO_WORLD}/trainings"
    caller = await stage.ask(app, "POST", target, {"destination": "acme/mine", "input": {"text": "Ada"}}, *CALLER)
    stage.fake.clock.advance(QUEUE + RUN)
    await stage.ask(app, "GET", f"/v1/trainings/{id_of(caller)}")


async def canceled(stage: Stage) -> None:
    app = stage.proxy()
    id = await stage.create(app)
    stage.fake.clock.advance(QUEUE + 1)
    await stage.ask(app, "POST", f"/v1/predictions/{id}/cancel")


async def failed(stage: Stage) -> None:
    [version] = next(model.versions or () for model in seed() if model.full_name == ALWAYS_FAILS)
    app = stage.proxy()
    id = await stage.create(app, version=version.id)
    await stage.poll(app, id, seconds=QUEUE + RUN)


async def aborted(stage: Stage) -> None:
    app = stage.proxy()
    id = await stage.create(app, (b"cancel-after", b"30s"))
    await stage.poll(app, id, seconds=31)


async def streamed(stage: Stage) -> None:
    app = stage.streaming()
    content = {"input": {"prompt": "Ada Lovelace"}}
    created = await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", content, *CALLER)
    stage.fake.clock.advance(QUEUE + RUN)
    caller = await stage.ask(app, "GET", stream_of(created), None, *CALLER)
    assert caller.content.endswith(b"data: {}\n\n")


async def delivered(stage: Stage) -> None:
    taken: list[str] = []

    async def on_webhook(event: Any) -> None:
        taken.append(event.prediction["status"])

    app = stage.proxy(options={"webhook_secrets": [stage.fake.webhook_secret]}, on_webhook=on_webhook)
    with serve(app) as served:
        hook: dict[str, Any] = {
            "webhook": f"{served.url}/v1/-/webhooks",
            "webhook_events_filter": ["start", "completed"],
        }
        await stage.create(app, *CALLER, **hook)
        stage.fake.clock.advance(QUEUE + RUN)
        with anyio.fail_after(10):
            while len(stage.fake.deliveries) < 2:  # noqa: ASYNC110 - another thread delivers
                await anyio.sleep(0.01)
    assert taken[-1] == "succeeded"


async def refused(stage: Stage) -> None:
    """By the proxy, and by Replicate."""
    policy = Policy(operations=["account.get"])
    keys = {"pk-team-a": ReplicateKey(TOKEN, tenant="team-a", policy=policy)}
    app, strict = stage.proxy(), stage.proxy(key_resolver=MappingKeyResolver(keys))
    await call(app, http_scope(headers=[]))
    await stage.ask(app, "GET", "/v1/account", None, who=(b"x-portkey-api-key", b"pk-nobody"))
    await stage.ask(app, "GET", "/v1/a/../b")
    await stage.ask(strict, "POST", "/v1/predictions", {})
    for status in (401, 422, 429, 503):
        stage.fake.fail(status, operation="predictions.create")
        await stage.ask(app, "POST", "/v1/predictions", {}, (b"x-portkey-metadata", b"{"))


async def resent(stage: Stage) -> None:
    stage.fake.fail(503, operation="account.get", retry_after=0)
    await stage.ask(stage.proxy(options={"safe_retries": 1}), "GET", "/v1/account")


async def unreachable(stage: Stage) -> None:
    with RawUpstream() as gone:
        url = gone.url
    await stage.ask(stage.proxy(url), "POST", "/v1/predictions", {})


async def mended(stage: Stage) -> None:
    content = {"data": {"version": HELLO_WORLD, "input": {"text": "Ada"}}}
    await stage.ask(stage.proxy(), "POST", "/v1predictions", content, (b"content-type", b"application/json"))


async def not_recorded(stage: Stage) -> None:
    """Own predictions, with a store that takes what was created at the second try."""
    store, failures = Switched(), [refuses]

    async def once(id: str) -> None:
        if id != "-" and failures:
            await failures.pop()(id)

    store.before_put = once
    keys = {"pk-team-a": ReplicateKey(TOKEN, tenant="team-a", policy=Policy(own_predictions=True))}
    app = stage.proxy(store=store, key_resolver=MappingKeyResolver(keys))
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)


async def restarted(stage: Stage) -> None:
    id = await stage.create(stage.proxy())
    app = stage.proxy()
    for _ in range(2):
        await stage.poll(app, id, (b"x-portkey-trace-id", b"poller"), seconds=QUEUE + RUN)


async def captured(stage: Stage) -> None:
    for mode in ("SPAN_ONLY", "EVENT_ONLY"):
        app = stage.proxy(options={"capture_content": mode})
        id = await stage.create(app)
        await stage.poll(app, id, seconds=QUEUE + RUN)


async def below_a_host(stage: Stage) -> None:
    app = stage.proxy()
    with stage.tracer_provider.get_tracer("host").start_as_current_span("GET", kind=SpanKind.SERVER):
        await stage.ask(app, "GET", "/v1/account")


async def layered(stage: Stage) -> None:
    """A denied create and one that is not, a read of the catalogue that is answered again, and three polls at once."""
    layers = [
        guardrails(input=[matches("nightjar", name="no birds")]),
        cache_catalogue(),
        coalesce_polls(interval=0.01),
    ]
    app = stage.proxy(layers=layers)
    for text in ("a nightjar", "Ada"):
        content = {"version": HELLO_WORLD, "input": {"text": text}}
        created = await stage.ask(app, "POST", "/v1/predictions", content, JSON)
    for _ in range(2):
        await stage.ask(app, "GET", "/v1/hardware")
    stage.fake.clock.advance(QUEUE + RUN)
    async with anyio.create_task_group() as polls:
        for _ in range(3):
            polls.start_soon(stage.poll, app, id_of(created))


SCENARIOS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    delivered,
    asynchronous,
    synchronous,
    official,
    deployment,
    training,
    canceled,
    failed,
    aborted,
    streamed,
    refused,
    resent,
    unreachable,
    mended,
    not_recorded,
    restarted,
    captured,
    below_a_host,
    layered,
)
"""All on one stage, too: first what needs the right time, since the others let it go by."""


def application() -> Any:
    """One of several processes that share a Redis: named by the environment, as are upstream and collector."""
    configure_telemetry()
    store = RedisPredictionStore(Redis.from_url(os.environ["REDIS"]))
    return proxy(os.environ["UPSTREAM"], store=store)
