"""What telemetry costs per request: `python benchmarks/telemetry.py`.

Four requests: a read of the catalogue, a create, a poll that sees a prediction under way, and one that sees the end,
with the run. By themselves: the request span, the attempt and what follows the answer, around an answer at hand; with
OpenTelemetry's API alone, with the SDK's spans (in batches, to an exporter that drops them) and metrics, and, for
comparison, the SDK's own calls alone: as many spans with as many attributes, as many recordings with as many labels. In
an exchange: what the same adds to the whole middleware, on a transport that answers at once. CPU time of the process,
all threads, taken in turns in batches; printed are medians.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import httpx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import (
    Forward,
    MappingKeyResolver,
    ProxyRequest,
    ProxyResponse,
    Rates,
    ReplicateKey,
    ReplicateProxyMiddleware,
    portkey,
    routing,
)
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.telemetry import Telemetry

TOKEN = "r8_0000000000000000000000000000"
KEY = ReplicateKey(TOKEN, tenant="team-a")
BATCH, ROUNDS = 100, 60
INPUT = {"prompt": "an astronaut on a horse, " * 8, "seed": 42, "guidance": 7.5}
BODY = json.dumps({"input": INPUT}).encode()
PRICES = {"acme/painter": Rates(per_second=0.000725)}
HEADERS = [
    (b"host", b"app.example"),
    (b"user-agent", b"portkey-python/2.3"),
    (b"content-type", b"application/json"),
    (b"accept", b"application/json"),
    (b"x-portkey-api-key", b"pk-team-a"),
    (b"x-portkey-provider", b"@replicate"),
    (b"x-portkey-trace-id", b"order-42"),
    (b"x-portkey-metadata", b'{"_user":"ada","team":"design"}'),
]
CALLER = portkey.read(HEADERS)
JSON = ((b"content-type", b"application/json"),)
CREATE = "/models/acme/painter/predictions"


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    status: str
    path: str | None = None
    reads: bool = False


CREATION = Case("create", "POST", "starting", CREATE)
CASES = (
    Case("catalogue", "GET", "none", "/models/acme/painter"),
    CREATION,
    Case("poll, under way", "GET", "processing", reads=True),
    Case("poll, end and run", "GET", "succeeded", reads=True),
)


def answer(id: str, status: str) -> bytes:
    shown: dict[str, Any] = {
        "id": id,
        "model": "acme/painter",
        "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
        "input": INPUT,
        "logs": "",
        "output": None,
        "error": None,
        "status": status,
        "created_at": "2026-11-21T09:00:00.000000Z",
        "urls": {"get": f"https://api.replicate.com/v1/predictions/{id}"},
    }
    if status == "succeeded":
        shown |= {
            "output": ["https://replicate.delivery/pbxt/out-0.png"],
            "started_at": "2026-11-21T09:00:01.250000Z",
            "completed_at": "2026-11-21T09:00:04.500000Z",
            "metrics": {"predict_time": 3.25, "total_time": 4.5},
        }
    return json.dumps(shown).encode()


class AtOnce(httpx.AsyncBaseTransport):
    """Answers with a prediction: a new one to a create, and to a read the one it asks for, in `status`."""

    def __init__(self, status: str) -> None:
        self._status = status
        self._ids = itertools.count()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for _ in request.stream:
            pass
        id = request.url.path.rpartition("/")[2] if request.method == "GET" else f"gm3qorzdhg{next(self._ids):016}"
        return httpx.Response(
            200 if request.method == "GET" else 201,
            headers={"content-type": "application/json"},
            stream=httpx.ByteStream(answer(id, self._status)),
        )


class Dropping(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Sdk:
    """Spans in batches and metrics."""

    def __init__(self) -> None:
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(BatchSpanProcessor(Dropping()))
        self.meter_provider = MeterProvider([InMemoryMetricReader()])

    def keywords(self) -> dict[str, Any]:
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}


async def host(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not the host's")


def middleware(status: str, **providers: Any) -> ReplicateProxyMiddleware:
    keys = MappingKeyResolver({"pk-team-a": KEY})
    return ReplicateProxyMiddleware(host, key_resolver=keys, transport=AtOnce(status), prices=PRICES, **providers)


def scope_of(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": "/v1" + path,
        "raw_path": b"/v1" + path.encode(),
        "query_string": b"",
        "headers": HEADERS,
        "client": ("192.0.2.1", 1234),
        "server": ("app.example", 443),
    }


# By themselves.


def requests(case: Case, count: int) -> tuple[list[ProxyRequest], list[bytes]]:
    """As many requests of a kind, each for another prediction, and what they are answered."""
    made, answers = [], []
    for number in range(count):
        id = f"gm3qorzdhg{number:016}"
        path = f"/predictions/{id}" if case.reads else case.path or ""
        content = BODY if case.method == "POST" else b""
        made.append(
            ProxyRequest(
                method=case.method,
                target=path,
                route=routing.match(case.method, path),
                headers=(),
                body=Chunks([content] if content else []),
                content_length=len(content),
                key=KEY,
                portkey=CALLER,
                scope=scope_of(case.method, path),
            )
        )
        answers.append(answer(id, case.status))
    return made, answers


async def told(telemetry: Telemetry | None, case: Case, count: int) -> float:
    """Microseconds for each of `count` requests."""
    made, answers = requests(case, count)
    contents = iter(answers)

    async def forward(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse(status=200, headers=JSON, body=Chunks([next(contents)]))

    attempt = forward if telemetry is None else telemetry.attempts(forward)
    start = time.process_time()
    for request in made:
        if telemetry is None:
            response = await attempt(request)
            async for _ in response.body:
                pass
            await response.aclose()
            continue
        afterwards: list[Callable[[], Awaitable[None]]] = []
        with telemetry.request(request.scope, request.route, afterwards) as span:
            span.caller(CALLER)
            span.resolved(KEY)
            response = await attempt(request)
            async for _ in response.body:
                pass
            await response.aclose()
            span.status, span.complete = 200, True
        for afterward in afterwards:
            await afterward()
    return (time.process_time() - start) / count * 1e6


async def by_themselves(case: Case, telemetry: Telemetry, sdk: Sdk | None) -> float:
    bare = await told(None, case, BATCH)
    if case.reads:
        await told(telemetry, CREATION, BATCH)
    spent = await told(telemetry, case, BATCH)
    if case.reads:
        store: Any = telemetry._story._ledger._store
        store._entries.clear()
    if sdk is not None:
        start = time.process_time()
        sdk.tracer_provider.force_flush()
        spent += (time.process_time() - start) / BATCH * 1e6
    return spent - bare


async def sdk_alone(case: Case) -> Callable[[], float]:
    """The SDK's own calls for one request: what `case` leaves, seen once, and then repeated without us."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracer_provider, meter_provider = TracerProvider(), MeterProvider([reader])
    tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = middleware(case.status, tracer_provider=tracer_provider, meter_provider=meter_provider)._telemetry
    if case.reads:
        await told(telemetry, CREATION, 1)
    before = len(exporter.get_finished_spans()), {key: count for key, _, count in _recorded(reader)}
    await told(telemetry, case, 1)
    spans = [(span.kind, dict(span.attributes or {})) for span in exporter.get_finished_spans()[before[0] :]]
    records = [labels for key, labels, count in _recorded(reader) for _ in range(count - before[1].get(key, 0))]
    sdk = Sdk()
    tracer, meter = sdk.tracer_provider.get_tracer("alone"), sdk.meter_provider.get_meter("alone")
    histograms = [(meter.create_histogram(f"histogram.{n}"), labels) for n, labels in enumerate(records)]

    def batch() -> float:
        start = time.process_time()
        for _ in range(BATCH):
            for kind, attributes in spans:
                span = tracer.start_span("GET /v1/predictions/{prediction_id}", kind=kind)
                span.set_attributes(attributes)
                span.end()
            for histogram, labels in histograms:
                histogram.record(0.01, labels)
        sdk.tracer_provider.force_flush()
        return (time.process_time() - start) / BATCH * 1e6

    print(f"{case.name:<20}{len(spans)} spans, {sum(len(attributes) for _, attributes in spans)} attributes,", end=" ")
    print(f"{len(records)} recordings, {sum(map(len, records))} labels")
    return batch


def _recorded(reader: InMemoryMetricReader) -> list[tuple[Any, dict[str, Any], int]]:
    data = reader.get_metrics_data()
    found = []
    for resource in data.resource_metrics if data else []:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if isinstance(metric.data, Histogram):
                    for point in metric.data.data_points:
                        labels = dict(point.attributes or {})
                        found.append(((metric.name, *sorted(labels.items())), labels, point.count))
    return found


# In an exchange.


class NoSpan:
    """A request span that is none."""

    id = "0" * 32
    traceparent = waiting = status = portkey = tenant = None
    outcome = "forwarded"
    complete = False
    request_size = response_size = 0

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}

    def __enter__(self) -> NoSpan:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def caller(self, portkey: object) -> None:
        pass

    def resolved(self, key: object) -> None:
        pass


class Silent:
    def request(self, *arguments: object) -> NoSpan:
        return NoSpan()


def untold(telemetry: Telemetry, forward: Forward) -> Forward:
    return forward


def without(status: str) -> ReplicateProxyMiddleware:
    with patch.object(Telemetry, "attempts", untold):
        app = middleware(status)
    silent: Any = Silent()
    app._telemetry = silent
    return app


async def once(app: ReplicateProxyMiddleware, method: str, path: str) -> str:
    messages = [{"type": "http.request", "body": BODY if method == "POST" else b"", "more_body": False}]
    content = b""

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal content
        content += message.get("body", b"")

    await app(scope_of(method, path), receive, send)
    return str(json.loads(content)["id"])


async def in_exchange(case: Case, app: ReplicateProxyMiddleware, sdk: Sdk | None) -> float:
    paths = [case.path or CREATE] * BATCH
    if case.reads:
        paths = [f"/predictions/{await once(app, 'POST', CREATE)}" for _ in range(BATCH)]
    start = time.process_time()
    for path in paths:
        await once(app, case.method, path)
    if sdk is not None:
        sdk.tracer_provider.force_flush()
    return (time.process_time() - start) / BATCH * 1e6


async def measure(case: Case) -> None:
    sdk, telling = Sdk(), Sdk()
    api = middleware(case.status)._telemetry
    full = middleware(case.status, **sdk.keywords())._telemetry
    apps = without(case.status), middleware(case.status), middleware(case.status, **telling.keywords())
    alone = await sdk_alone(case)
    rows = []
    for _ in range(ROUNDS):
        themselves = await by_themselves(case, api, None), await by_themselves(case, full, sdk), alone()
        exchanges = [await in_exchange(case, app, telling if app is apps[2] else None) for app in apps]
        rows.append((*themselves, exchanges[0], exchanges[1] - exchanges[0], exchanges[2] - exchanges[0]))
    print(" " * 20 + "".join(f"{statistics.median(column):>12.1f}" for column in list(zip(*rows[5:], strict=True))))


async def main() -> None:
    print("Microseconds of CPU per request.")
    print(" " * 20 + f"{'by themselves':>24}{'':>12}{'in an exchange':>36}")
    print(" " * 20 + "".join(f"{name:>12}" for name in ("API", "SDK", "SDK alone", "without", "+ API", "+ SDK")))
    for case in CASES:
        await measure(case)


if __name__ == "__main__":
    asyncio.run(main())
