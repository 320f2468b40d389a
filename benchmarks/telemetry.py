"""What telemetry costs per request: `python benchmarks/telemetry.py`.

A create, a poll that sees a prediction under way and a poll that sees the end of another one, each through the whole
middleware on a transport that answers at once: without any telemetry, with OpenTelemetry's API alone, and with the SDK,
spans in batches to an exporter that drops them and metrics that are aggregated. CPU time of the process, all threads,
taken in turns in batches; printed are medians, and the median of the differences of neighbours.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import httpx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from replicate_proxy_mw import Forward, MappingKeyResolver, Rates, ReplicateKey, ReplicateProxyMiddleware
from replicate_proxy_mw.telemetry import Telemetry

TOKEN = "r8_0000000000000000000000000000"
BATCH, ROUNDS = 400, 60
INPUT = {"prompt": "an astronaut on a horse, " * 8, "seed": 42, "guidance": 7.5}
BODY = json.dumps({"input": INPUT}).encode()
PRICES = {"acme/painter": Rates(per_second=0.000725)}
METADATA = b'{"_user":"ada","team":"design"}'


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
        prediction: dict[str, Any] = {
            "id": id,
            "model": "acme/painter",
            "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
            "input": INPUT,
            "logs": "",
            "output": None,
            "error": None,
            "status": self._status,
            "created_at": "2026-11-21T09:00:00.000000Z",
            "urls": {"get": f"https://api.replicate.com/v1/predictions/{id}"},
        }
        if self._status == "succeeded":
            prediction |= {
                "output": ["https://replicate.delivery/pbxt/out-0.png"],
                "started_at": "2026-11-21T09:00:01.250000Z",
                "completed_at": "2026-11-21T09:00:04.500000Z",
                "metrics": {"predict_time": 3.25, "total_time": 4.5},
            }
        headers = {"content-type": "application/json"}
        return httpx.Response(
            200 if request.method == "GET" else 201,
            headers=headers,
            stream=httpx.ByteStream(json.dumps(prediction).encode()),
        )


class Dropping(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


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


class Silent:
    def request(self, *arguments: object) -> NoSpan:
        return NoSpan()


def untold(telemetry: Telemetry, forward: Forward) -> Forward:
    return forward


async def host(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not the host's")


def middleware(status: str, *, telemetry: str) -> ReplicateProxyMiddleware:
    keys = MappingKeyResolver({"pk-team-a": ReplicateKey(TOKEN, tenant="team-a")})
    providers: dict[str, Any] = {}
    if telemetry == "sdk":
        tracer_provider = TracerProvider()
        tracer_provider.add_span_processor(BatchSpanProcessor(Dropping(), max_queue_size=100_000))
        providers = {
            "tracer_provider": tracer_provider,
            "meter_provider": MeterProvider([InMemoryMetricReader()]),
        }
    with patch.object(Telemetry, "attempts", untold) if telemetry == "none" else nullcontext():
        app = ReplicateProxyMiddleware(host, key_resolver=keys, transport=AtOnce(status), prices=PRICES, **providers)
    if telemetry == "none":
        silent: Any = Silent()
        app._telemetry = silent
    return app


def exchanges(app: ReplicateProxyMiddleware, method: str) -> Callable[[], Awaitable[float]]:
    """A batch of requests, each for a prediction of its own; those that are read have been created before."""

    async def once(method: str, path: str) -> str:
        messages = [{"type": "http.request", "body": BODY if method == "POST" else b"", "more_body": False}]
        content = b""

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal content
            content += message.get("body", b"")

        headers = [
            (b"host", b"app.example"),
            (b"user-agent", b"portkey-python/2.3"),
            (b"content-type", b"application/json"),
            (b"accept", b"application/json"),
            (b"x-portkey-api-key", b"pk-team-a"),
            (b"x-portkey-provider", b"@replicate"),
            (b"x-portkey-trace-id", b"order-42"),
            (b"x-portkey-metadata", METADATA),
        ]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "client": ("192.0.2.1", 1234),
            "server": ("app.example", 443),
        }
        await app(scope, receive, send)
        return str(json.loads(content)["id"])

    async def batch() -> float:
        paths = ["/v1/models/acme/painter/predictions"] * BATCH
        if method == "GET":
            paths = [f"/v1/predictions/{await once('POST', paths[0])}" for _ in range(BATCH)]
        start = time.process_time()
        for path in paths:
            await once(method, path)
        return (time.process_time() - start) / BATCH * 1e6

    return batch


async def compare(name: str, method: str, status: str) -> None:
    variants = [exchanges(middleware(status, telemetry=telemetry), method) for telemetry in ("none", "api", "sdk")]
    rounds = [[await variant() for variant in variants] for _ in range(ROUNDS)][5:]
    without = statistics.median(row[0] for row in rounds)
    api, sdk = (statistics.median(row[i] - row[0] for row in rounds) for i in (1, 2))
    print(f"{name:<22}{without:>12.1f} µs{api:>+12.1f} µs{sdk:>+12.1f} µs")


async def main() -> None:
    print(f"{'':<22}{'none':>15}{'API alone':>15}{'with SDK':>15}")
    await compare("create", "POST", "starting")
    await compare("poll, under way", "GET", "processing")
    await compare("poll, end, with run", "GET", "succeeded")


if __name__ == "__main__":
    asyncio.run(main())
