"""How much telemetry requests leave, as OTLP on the wire: `python -m benchmarks.volume [--write]`.

Requests through the whole middleware, on a transport that answers at once. Spans are encoded as the exporter does, in
batches of as many as it sends at once; polls are thinned by the conditions that docs/telemetry.md has for a collector.
None of it is a time, so that it is the same on every machine, but for ids and clocks.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import MappingKeyResolver, ReplicateKey, ReplicateProxyMiddleware

from .compare import page
from .telemetry import BODY, CREATE, HEADERS, PRICES, TOKEN, AtOnce, host, scope_of

ROOT = Path(__file__).parents[1]
# What OpenTelemetry's batch processor exports at once.
AT_ONCE = 512
POLLS = 10
TENANTS = (1, 50)


class App:
    """A middleware whose telemetry is kept here, with `tenants` that have a key each."""

    def __init__(self, tenants: int = 1) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._transport = AtOnce("starting")
        self.keys = [f"pk-team-{number}" for number in range(tenants)]
        known = {key: ReplicateKey(TOKEN, tenant=key.removeprefix("pk-")) for key in self.keys}
        self._app = ReplicateProxyMiddleware(
            host,
            key_resolver=MappingKeyResolver(known),
            transport=self._transport,
            prices=PRICES,
            tracer_provider=spans,
            meter_provider=MeterProvider([self._reader]),
        )

    async def ask(self, method: str, path: str, status: str = "starting", *, key: str | None = None) -> str:
        """The answer's body, which shows a prediction in `status`."""
        self._transport._status = status
        messages = [{"type": "http.request", "body": BODY if method == "POST" else b"", "more_body": False}]
        content = b""

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal content
            content += message.get("body", b"")

        scope = scope_of(method, path)
        given = (key or self.keys[0]).encode()
        scope["headers"] = [(name, given if name == b"x-portkey-api-key" else value) for name, value in HEADERS]
        await self._app(scope, receive, send)
        return content.decode()

    async def create(self, *, key: str | None = None) -> str:
        """The path of a new prediction."""
        found = re.search(r'"id": "(\w+)"', await self.ask("POST", CREATE, key=key))
        assert found is not None
        return f"/predictions/{found[1]}"

    def left(self) -> Sequence[ReadableSpan]:
        """Spans since the last call."""
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        return spans

    def export(self) -> tuple[int, int]:
        """Data points of metrics, and bytes of an export of all of them."""
        data = self._reader.get_metrics_data()
        assert data is not None
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics]
        return sum(len(each.data.data_points) for each in metrics), len(encode_metrics(data).SerializeToString())


async def refused(app: App) -> None:
    await app.ask("GET", "/hardware", key="pk-of-nobody")


async def catalogue(app: App) -> None:
    await app.ask("GET", "/models/acme/painter")


async def created(app: App) -> None:
    await app.create()


async def waited(app: App) -> None:
    await app.ask("POST", CREATE, "succeeded")


async def nothing_new(app: App) -> None:
    path = await app.create()
    app.left()
    await app.ask("GET", path, "starting")


async def changed(app: App) -> None:
    path = await app.create()
    app.left()
    await app.ask("GET", path, "processing")


async def ended(app: App) -> None:
    path = await app.create()
    app.left()
    await app.ask("GET", path, "succeeded")


async def whole(app: App) -> None:
    """A prediction that is polled until it has ended."""
    path = await app.create()
    for number in range(POLLS - 1):
        await app.ask("GET", path, "starting" if number < 2 else "processing")
    await app.ask("GET", path, "succeeded")


KINDS: Mapping[str, Callable[[App], Awaitable[None]]] = {
    "refused, 401": refused,
    "read of the catalogue": catalogue,
    "create": created,
    "create that waits until the end, with the run": waited,
    "poll that sees nothing new": nothing_new,
    "poll that sees a change": changed,
    "poll that sees the end, with the run": ended,
    f"a prediction with {POLLS} polls": whole,
}


@dataclass(frozen=True)
class Volume:
    """What one request, or one prediction, leaves: spans, bytes of OTLP, and both where polls are thinned."""

    spans: float
    size: float
    thinned_spans: float
    thinned_size: float


async def volume(kind: Callable[[App], Awaitable[None]]) -> Volume:
    app, spans, count = App(), list[ReadableSpan](), 0
    while len(spans) < AT_ONCE:
        await kind(app)
        spans += app.left()
        count += 1
    kept = [span for span in spans if not is_thinned(span)]
    return Volume(len(spans) / count, size(spans) / count, len(kept) / count, size(kept) / count)


def size(spans: Sequence[ReadableSpan]) -> int:
    """Bytes as they are exported."""
    batches = [spans[n : n + AT_ONCE] for n in range(0, len(spans), AT_ONCE)]
    return sum(len(encode_spans(batch).SerializeToString()) for batch in batches)


def is_thinned(span: ReadableSpan) -> bool:
    """Whether the collector of docs/telemetry.md drops it."""
    return any(eval(condition, {"attributes": span.attributes or {}}) for condition in _conditions())


@cache
def _conditions() -> list[str]:
    """Those of the collector read as Python does, but for `nil`."""
    text = (ROOT / "docs/telemetry.md").read_text(encoding="utf-8")
    found = re.findall(r"^ +- '(.*)'$", text.partition("filter/polls:")[2].partition("```")[0], re.MULTILINE)
    assert len(found) == 2
    return [re.sub(r'attributes\["([\w.]+)"\]', r'attributes.get("\1")', each).replace("nil", "None") for each in found]


async def points(tenants: int) -> tuple[int, int]:
    """Data points and bytes of an export, where each tenant has created, polled and seen the end."""
    app = App(tenants)
    for key in app.keys:
        path = await app.create(key=key)
        await app.ask("GET", path, "processing", key=key)
        await app.ask("GET", path, "succeeded", key=key)
    return app.export()


async def told() -> str:
    lines = [
        "| | spans | bytes | spans, polls thinned | bytes, polls thinned |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        lines.append(f"| {name} | " + " | ".join(f"{figure:,.0f}" for figure in astuple(await volume(kind))) + " |")
    lines += ["", "| metrics of a process that served | data points | bytes of each export |", "| --- | --- | --- |"]
    for tenants in TENANTS:
        count, taken = await points(tenants)
        lines.append(f"| {tenants} tenant{'s' * (tenants > 1)}, one model | {count:,} | {taken:,} |")
    sdk = f"opentelemetry-sdk {version('opentelemetry-sdk')}"
    when = f"{datetime.now(UTC):%Y-%m-%d}, `python -m benchmarks.volume`, {sdk}"
    return "\n".join([f"{when}; OTLP as protobuf, not compressed, in batches of {AT_ONCE} spans.", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.volume", description=__doc__)
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=ROOT / "docs/scaling.md",
        metavar="PAGE",
        help="put the tables into this page (docs/scaling.md)",
    )
    options = parser.parse_args()
    written = asyncio.run(told())
    print(written)
    if options.write:
        page.put(options.write, "volume", written)


if __name__ == "__main__":
    main()
