"""`python -m benchmarks.soak [--requests 200000] [--concurrency 64] [--minutes 20] [--write]`: does anything grow?

`--large` moves 1 GiB down and up instead, `--streams 2000` keeps so many idle. Needs Linux and two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from time import monotonic, perf_counter

from ..aborts import SERVERS, TRANSPORTS, prepared, quantile, table, tell
from ..compare import scenarios
from ..compare.__main__ import ROOT
from ..compare.page import machine, put
from ..compare.processes import LOAD_CORE, PROXY_CORE, Process, free_port, started
from ..compare.traffic import BODY
from ..compare.upstream import held_streamed_large
from .caller import Caller
from .traffic import LEAVING, MIX, Traffic

# Of the requests: caches, pools and the store fill, and the allocator finds its level.
WARM = 0.25
CONNECTIONS = 4096

SLOPE, GROWTH, PER_STREAM, P99 = 1.0, 24.0, 60.0, 0.05
"""MiB in ten minutes, MiB, KiB, seconds."""


@contextmanager
def proxied(options: argparse.Namespace, upstream: int, folder: Path) -> Iterator[Process]:
    port = free_port()
    with started(
        [sys.executable, "-m", *(part.format(port=port) for part in SERVERS[options.server])],
        core=PROXY_CORE,
        port=port,
        log=folder / "proxy.log",
        environment={
            "UPSTREAM": f"http://127.0.0.1:{upstream}",
            "TRANSPORT": options.transport,
            "MAX_CONNECTIONS": str(CONNECTIONS),
        },
    ) as process:
        yield process


@contextmanager
def faulty(folder: Path) -> Iterator[int]:
    """An upstream in a process of its own; its port."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.soak.upstream", str(port)]
    with started(command, core=LOAD_CORE, port=port, log=folder / "upstream.log"):
        yield port


# Mixed traffic.


@dataclass
class Soaked:
    traffic: Traffic
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds and MiB, once a second."""
    warm_at: float = 0.0
    interrupted: bool = False

    @property
    def level(self) -> list[tuple[float, float]]:
        return [sample for sample in self.samples if sample[0] >= self.warm_at > 0]

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] if self.samples else 0.0


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least squares, in MiB per ten minutes."""
    if len(samples) < 2:
        return 0.0
    count = len(samples)
    middle, mean = sum(x for x, _ in samples) / count, sum(y for _, y in samples) / count
    spread = sum((x - middle) ** 2 for x, _ in samples)
    return 600 * sum((x - middle) * (y - mean) for x, y in samples) / spread


async def soak(options: argparse.Namespace, result: Soaked, process: Process) -> None:
    started_at = monotonic()

    async def sample() -> None:
        while True:
            result.samples.append((monotonic() - started_at, process.memory() / 1024))
            await asyncio.sleep(1)

    sampling = asyncio.create_task(sample())
    try:
        for share in (WARM, 1 - WARM):
            result.warm_at = monotonic() - started_at if share > WARM else 0.0
            number = int(options.requests * share)
            await result.traffic.run(number, concurrency=options.concurrency, seconds=options.minutes * 60 * share)
    finally:
        sampling.cancel()
        result.samples.append((monotonic() - started_at, process.memory() / 1024))


def soaked(options: argparse.Namespace, folder: Path) -> Soaked:
    with faulty(folder) as upstream, proxied(options, upstream, folder) as process:
        result = Soaked(Traffic(process.port, options.faults))
        try:
            asyncio.run(soak(options, result, process))
        except KeyboardInterrupt:
            tell("interrupted")
            result.interrupted = True
    return result


def soak_text(result: Soaked, options: argparse.Namespace) -> str:
    traffic, level = result.traffic, result.level
    done = sum(traffic.done.values())
    faults = sum(number for kind, number in traffic.done.items() if kind not in MIX)
    wrong = "; ".join(f"{number} of {what}" for what, number in traffic.wrong.items()) or "0"
    grown = level[-1][1] - level[0][1] if level else 0.0
    rows = [
        ["requests" + (" (interrupted)" if result.interrupted else ""), "", f"{done:,} in {result.seconds:.0f} s"],
        ["… with a fault, or a caller who leaves", "", f"{faults:,}, of them {traffic.done[LEAVING]:,} leave"],
        ["unexpected answers", "0", wrong],
        ["RSS after warming up, MiB", "", f"{level[0][1]:.1f}" if level else "-"],
        ["… at the end", "", f"{level[-1][1]:.1f}, {grown:+.1f}" if level else "-"],
        [slope_of(level), f"< {SLOPE:.0f}", f"{slope(level):+.2f}"],
    ]
    command = f"--requests {options.requests} --concurrency {options.concurrency} --minutes {options.minutes:g}"
    return told(options, f"{command} --faults {options.faults:g}", table(["", "goal", "measured"], rows))


def slope_of(level: Sequence[tuple[float, float]]) -> str:
    lasting = level[-1][0] - level[0][0] if level else 0.0
    return f"slope over the last {lasting:.0f} s, MiB per 10 min"


def told(options: argparse.Namespace, command: str, body: str) -> str:
    what = f"`python -m benchmarks.soak {command} --server {options.server} --transport {options.transport}`"
    return f"{date.today()}, {what}; {machine()}. Load average at the end: {os.getloadavg()[0]:.1f}.\n\n{body}\n"


# Large bodies.


def large(options: argparse.Namespace, folder: Path) -> dict[str, scenarios.Bulk]:
    with held_streamed_large(folder) as upstream, proxied(options, upstream.port, folder) as process:
        found = {}
        for name, move in (("down", scenarios.download), ("up", scenarios.upload)):
            move("proxy", process, 16)
            found[name] = scenarios.moved("proxy", process, move, options.large)
    return found


def large_text(found: dict[str, scenarios.Bulk], options: argparse.Namespace) -> str:
    rows = [[f"{options.large} MiB {name}", f"{bulk.growth:.1f}", f"{bulk.rate:.0f}"] for name, bulk in found.items()]
    return told(
        options, f"--large {options.large}", table(["", f"MiB grown at most (goal: {GROWTH:.0f})", "MB/s"], rows)
    )


# Idle streams.


@dataclass(frozen=True)
class Idle:
    opened: int
    each: float
    """KiB."""
    alone: list[float]
    """Seconds that other requests take before, and `beside` them."""
    beside: list[float]
    left: int
    """Files that are open more than before when all have left."""


@asynccontextmanager
async def streams(port: int, number: int) -> AsyncIterator[int]:
    """Streams with one event so far; yields how many there are."""
    callers = [Caller(port) for _ in range(number)]
    opened = 0
    try:
        for caller in callers:
            await caller.__aenter__()
            caller.ask("GET", "/v1/events?events=2&every=900")
            async with asyncio.timeout(30):
                received = await caller.reader.readuntil(b"data: word")
            opened += received.startswith(b"HTTP/1.1 200")
        yield opened
    finally:
        for caller in callers:
            caller.leave()


async def idle(options: argparse.Namespace, process: Process) -> Idle:
    number = max(50, options.streams // 2)
    async with streams(process.port, 50):
        pass
    alone = await others(process.port, number)
    await asyncio.sleep(1)
    memory, files = process.memory(), opened_files(process)
    async with streams(process.port, options.streams) as opened:
        await asyncio.sleep(2)
        each = (process.memory() - memory) / options.streams
        beside = await others(process.port, number)
    deadline = monotonic() + 15
    while opened_files(process) > files and monotonic() < deadline:  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.2)
    return Idle(opened, each, alone, beside, opened_files(process) - files)


async def others(port: int, number: int, concurrency: int = 4) -> list[float]:
    """Seconds that polls and creates take."""
    taken, todo = [], iter(range(number))

    async def worker() -> None:
        async with Caller(port) as caller:
            for each in todo:
                start = perf_counter()
                if each % 2:
                    caller.ask("POST", "/v1/predictions", BODY.encode())
                else:
                    caller.ask("GET", "/v1/predictions/x")
                status, _ = await caller.answer()
                if status not in (200, 201):
                    raise scenarios.Wrong(f"{status} beside streams")
                taken.append(perf_counter() - start)

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(worker())
    return taken


def opened_files(process: Process) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in process._tree())


def idle_text(found: Idle, options: argparse.Namespace) -> str:
    def milliseconds(values: Sequence[float]) -> str:
        return f"{quantile(values, 0.5) * 1e3:.1f}, {quantile(values, 0.99) * 1e3:.1f}"

    rows = [
        ["streams that are open", "", f"{found.opened:,} of {options.streams:,}"],
        ["KiB each", f"{PER_STREAM:.0f}", f"{found.each:.1f}"],
        ["other requests before, p50 and p99 in ms", "", milliseconds(found.alone)],
        ["other requests beside them, p50 and p99 in ms", f"p99 < {P99 * 1e3:.0f}", milliseconds(found.beside)],
        ["files open more than before, once all have left", "0", str(found.left)],
    ]
    return told(options, f"--streams {options.streams}", table(["", "goal", "measured"], rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000, help="of mixed traffic (200000)")
    parser.add_argument("--concurrency", type=int, default=64, help="of them at a time (64)")
    parser.add_argument("--faults", type=float, default=0.01, help="their share (0.01)")
    parser.add_argument("--minutes", type=float, default=20, help="over which they are spread, at least (20)")
    parser.add_argument("--server", choices=tuple(SERVERS), default="uvicorn-httptools")
    parser.add_argument("--transport", choices=TRANSPORTS, default="default")
    parser.add_argument(
        "--large", type=int, nargs="?", const=1024, metavar="MIB", help="a download and an upload (1024)"
    )
    parser.add_argument("--streams", type=int, nargs="?", const=2000, help="that are idle (2000)")
    page = ROOT / "docs/reliability.md"
    parser.add_argument(
        "--write", nargs="?", type=Path, const=page, metavar="PAGE", help="put the figures into this page"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with prepared() as folder:
        if options.large:
            found = large(options, folder)
            mark, text = "large bodies", large_text(found, options)
            good = all(bulk.growth <= GROWTH for bulk in found.values())
        elif options.streams:
            with faulty(folder) as upstream, proxied(options, upstream, folder) as process:
                kept = asyncio.run(idle(options, process))
            mark, text = "idle streams", idle_text(kept, options)
            good = kept.opened == options.streams and kept.each <= PER_STREAM and not kept.left > 0
            good = good and quantile(kept.beside, 0.99) < P99
        else:
            result = soaked(options, folder)
            mark, text = "soak", soak_text(result, options)
            good = not result.traffic.wrong and slope(result.level) < SLOPE
    print(text)
    if options.write is not None:
        put(options.write, mark, text)
    if not good:
        sys.exit("A goal is missed.")


if __name__ == "__main__":
    main()
