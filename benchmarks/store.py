"""What a shared store costs per create and poll: `python -m benchmarks.store [--write]`; needs redis-server.

The same exchanges in one process, on a transport that answers at once, one after the other: with the memory of the
process, and with a Redis on loopback, in turns. Round trips are counted, and Redis tells itself what its commands took.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from redis.asyncio import Redis

from replicate_proxy_mw import (
    MappingKeyResolver,
    MemoryPredictionStore,
    Policy,
    PredictionStore,
    ReplicateKey,
    ReplicateProxyMiddleware,
)
from replicate_proxy_mw.store import StoredPrediction
from replicate_proxy_mw.store.redis import RedisPredictionStore

from .compare import page
from .compare.processes import LOAD_CORE, free_port, started
from .telemetry import BODY, CREATE, TOKEN, Dropping, answer, host, scope_of

ROOT = Path(__file__).parents[1]
BATCH = 100
WARM_UP = 2


@dataclass(frozen=True)
class Use:
    """What asks the store."""

    name: str
    owns: bool = False
    records: bool = False


USES = (
    Use("`own_predictions`", owns=True),
    Use("spans", records=True),
    Use("both", owns=True, records=True),
)
CREATES, POLLS, ENDS = REQUESTS = ("create", "poll", "poll that sees the end")


class Counting:
    """A store, and how often it was asked before and after the answer's last byte."""

    def __init__(self, store: PredictionStore) -> None:
        self._store = store
        self.answered = False
        self.before = self.after = 0

    def _count(self) -> None:
        if self.answered:
            self.after += 1
        else:
            self.before += 1

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        self._count()
        await self._store.put(id, prediction)

    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        self._count()
        return await self._store.get(ids)

    async def read(self, id: str, status: str, /) -> StoredPrediction | None:
        self._count()
        return await self._store.read(id, status)

    async def claim(self, id: str, /) -> StoredPrediction | None:
        self._count()
        return await self._store.claim(id)


class Answers(httpx.AsyncBaseTransport):
    """At once: a new prediction to a create, and to a read the one that it asks for, in `status`."""

    def __init__(self, ids: itertools.count[int]) -> None:
        self.status = "starting"
        self._ids = ids

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for _ in request.stream:
            pass
        reads = request.method == "GET"
        id = request.url.path.rpartition("/")[2] if reads else f"gm3qorzdhg{next(self._ids):016}"
        body = httpx.ByteStream(answer(id, self.status))
        return httpx.Response(200 if reads else 201, headers={"content-type": "application/json"}, stream=body)


class App:
    """A middleware around `store`, for this use."""

    def __init__(self, use: Use, store: PredictionStore, ids: itertools.count[int]) -> None:
        self.store = store
        self._transport = Answers(ids)
        self._spans = TracerProvider()
        self._spans.add_span_processor(BatchSpanProcessor(Dropping()))
        policy = Policy(own_predictions=use.owns)
        self._app = ReplicateProxyMiddleware(
            host,
            key_resolver=MappingKeyResolver({"pk-team-a": ReplicateKey(TOKEN, tenant="team-a", policy=policy)}),
            transport=self._transport,
            store=store,
            tracer_provider=self._spans if use.records else None,
        )

    async def prepared(self, kind: str) -> list[tuple[str, str]]:
        """A batch: method and path of each request. What is polled is created first."""
        if kind == CREATES:
            self._transport.status = "starting"
            return [("POST", CREATE)] * BATCH
        created = [(await self.once(*each))[0] for each in await self.prepared(CREATES)]
        self._transport.status = "processing" if kind == POLLS else "succeeded"
        return [("GET", f"/predictions/{id}") for id in created]

    async def batch(self, requests: Sequence[tuple[str, str]]) -> tuple[float, float]:
        """For each request: microseconds of CPU, and of time until the answer's last byte (median)."""
        taken = []
        start = time.process_time()
        for method, path in requests:
            taken.append((await self.once(method, path))[1])
        self._spans.force_flush()
        return (time.process_time() - start) / BATCH * 1e6, statistics.median(taken) * 1e6

    async def once(self, method: str, path: str) -> tuple[str, float]:
        """The prediction's id, and seconds until the answer's last byte."""
        messages = [{"type": "http.request", "body": BODY if method == "POST" else b"", "more_body": False}]
        content, start, taken = b"", time.perf_counter(), 0.0
        if isinstance(self.store, Counting):
            self.store.answered = False

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal content, taken
            content += message.get("body", b"")
            if message["type"] == "http.response.body" and not message["more_body"]:
                taken = time.perf_counter() - start
                if isinstance(self.store, Counting):
                    self.store.answered = True

        await self._app(scope_of(method, path), receive, send)
        return json.loads(content)["id"], taken


@dataclass(frozen=True)
class Row:
    """Of one kind of request and one use: calls of the store, and microseconds more than with the memory."""

    request: str
    use: str
    before: float
    after: float
    waits: float
    cpu: float
    server: float


async def measure(redis: Redis, rounds: int) -> tuple[list[Row], float]:
    """The rows, in turns since a machine has moods, and the bytes that a prediction takes in Redis."""
    ids, calls, turns, size = itertools.count(), {}, defaultdict(list), 0.0
    for use in USES:
        counted = Counting(RedisPredictionStore(redis))
        counting = App(use, counted, ids)
        for kind in REQUESTS:
            requests = await counting.prepared(kind)
            counted.before = counted.after = 0
            await counting.batch(requests)
            calls[kind, use] = counted.before / BATCH, counted.after / BATCH
        size = max(size, await stored(redis))
        await redis.flushdb()
    apps = {use: (App(use, MemoryPredictionStore(), ids), App(use, RedisPredictionStore(redis), ids)) for use in USES}
    for number in range(WARM_UP + rounds):
        for kind, use in calls:
            figures = await turn(*apps[use], kind, redis)
            if number >= WARM_UP:
                turns[kind, use].append(figures)
    medians = {row: [statistics.median(column) for column in zip(*turns[row], strict=True)] for row in calls}
    return [Row(kind, use.name, *calls[kind, use], *medians[kind, use]) for kind, use in calls], size


async def turn(in_memory: App, in_redis: App, kind: str, redis: Redis) -> tuple[float, float, float]:
    memory = await in_memory.batch(await in_memory.prepared(kind))
    requests = await in_redis.prepared(kind)
    before = await spent(redis)
    shared = await in_redis.batch(requests)
    return shared[1] - memory[1], shared[0] - memory[0], (await spent(redis) - before) / BATCH


async def spent(redis: Redis) -> float:
    """Microseconds that Redis has spent on the store's commands."""
    commands = await redis.info("commandstats")
    return float(commands.get("cmdstat_eval", {"usec": 0})["usec"])


async def stored(redis: Redis) -> float:
    """Bytes of a prediction in Redis, with its key."""
    sizes = [await redis.memory_usage(key) async for key in redis.scan_iter("replicate_proxy:gm3*", count=1000)]
    return statistics.median(size for size in sizes if size is not None)


def table(rows: Sequence[Row], size: float, rounds: int) -> str:
    lines = [
        "| request | what asks the store | round trips before the answer | … after it | the answer comes later by "
        "| CPU of the app more | CPU of Redis |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = (row.before, row.after, row.waits, row.cpu, row.server)
        lines.append(f"| {row.request} | {row.use} | " + " | ".join(f"{each:.0f}" for each in figures) + " |")
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `python -m benchmarks.store --rounds {rounds}`, {page.machine()}"
    load = f"load average of the machine at the end {os.getloadavg()[0]:.1f}"
    return "\n".join(
        [
            f"{when}; {load}. Microseconds per request, medians; an entry takes {size:.0f} bytes of Redis.",
            "",
            *lines,
            "",
        ]
    )


async def told(rounds: int) -> str:
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        port = free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", ""]
        with started(command, core=LOAD_CORE, port=port, log=Path(folder) / "log"):
            redis = Redis(port=port)
            try:
                return table(*await measure(redis, rounds), rounds)
            finally:
                await redis.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of a hundred of each kind of request (20)")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=ROOT / "docs/scaling.md",
        metavar="PAGE",
        help="put the table into this page (docs/scaling.md)",
    )
    options = parser.parse_args()
    if lacking := [program for program in ("redis-server", "taskset") if not shutil.which(program)]:
        sys.exit(f"Not there: {', '.join(lacking)}")
    written = asyncio.run(told(options.rounds))
    print(written)
    if options.write:
        page.put(options.write, "store", written)


if __name__ == "__main__":
    main()
