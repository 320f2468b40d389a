"""Callers who leave, at each phase of a request, in bursts and among faults: `python -m benchmarks.aborts [--write]`.

How long upstream's connection then stays, and that nothing else does. Needs Linux and two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from itertools import cycle
from pathlib import Path
from time import monotonic

from .compare.__main__ import ROOT, SOCKETS, names
from .compare.page import machine, put
from .compare.processes import LOAD_CORE, PROXY_CORE, Process, free_port, started
from .compare.scenarios import Wrong
from .compare.traffic import BODY
from .soak.app import MAX_CONNECTIONS, REFUSED, RESOLVING, SILENT, SLOW_KEY
from .soak.caller import Caller, Cut, head
from .soak.upstream import FAULTS, Seen, Upstream

APP = "benchmarks.soak.app:app"

SERVERS = {
    "uvicorn-h11": ["uvicorn", "--factory", APP, "--http", "h11", "--port", "{port}", "--log-level", "critical"],
    "uvicorn-httptools": [
        *("uvicorn", "--factory", APP, "--http", "httptools", "--port", "{port}", "--log-level", "critical")
    ],
    "hypercorn-asyncio": ["hypercorn", f"{APP}()", "--bind", "127.0.0.1:{port}"],
    "hypercorn-trio": ["hypercorn", f"{APP}()", "--worker-class", "trio", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", "--factory", APP, "--interface", "asgi", "--port", "{port}", "--no-log"],
}
TRANSPORTS = ("default", "fast")
# What servers say of themselves is not silenced everywhere, and a fault's output is to be empty.
STRICT = ("-X", "dev", "-W", "error")
STRICT_SERVERS = ("uvicorn-h11", "uvicorn-httptools")

GOAL = 1.5
# MiB that a server may grow once it is warm: an allocator is not exact.
LEVEL = 8.0
PATIENCE = 10.0
BURST = 120
SIZE = 1 << 20
# 1 GiB: what upstream has for a caller who left must not be read to its end.
PIECES = 4096

CREATE = "/v1/predictions"


@dataclass
class Stage:
    """A proxy in its process, upstream here, and who listens but never begins TLS."""

    process: Process
    upstream: Upstream
    silent: list[Seen]
    log: Path

    @property
    def port(self) -> int:
        return self.process.port

    async def asked(self, target: str = "/v1/predictions/x", method: str = "GET", content: bytes = b"") -> int | str:
        """The status of an answer, or `cut`."""
        async with Caller(self.port) as caller, asyncio.timeout(PATIENCE * 3):
            caller.ask(method, target, content)
            try:
                return (await caller.answer())[0]
            except Cut:
                return "cut"

    async def quiet(self) -> int:
        """Requests that upstream still has after `PATIENCE`."""
        await until(lambda: not self.upstream.busy)
        return self.upstream.busy

    def files(self) -> int:
        """That the server has open, but for what it keeps for the next request."""
        opened = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.process._tree())
        return opened - self.upstream.open


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for it, for `PATIENCE` at most."""
    deadline = monotonic() + PATIENCE
    while not is_so() and monotonic() < deadline:  # noqa: ASYNC110 - upstream counts, and has no event for each number
        await asyncio.sleep(0.005)


@asynccontextmanager
async def stage(
    server: str, transport: str, folder: Path, *, python: Sequence[str] = (), connections: int = MAX_CONNECTIONS
) -> AsyncIterator[Stage]:
    silent: list[Seen] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = Seen()
        silent.append(seen)
        with suppress(ConnectionError):
            await reader.read()
        seen.ended_at = monotonic()
        seen.ended.set()
        writer.close()

    port = free_port()
    async with Upstream() as upstream, await asyncio.start_server(say_nothing, "127.0.0.1", 0) as listener:
        log = folder / f"{server}-{transport}.log"
        program = started(
            [sys.executable, *python, "-m", *(part.format(port=port) for part in SERVERS[server])],
            core=PROXY_CORE,
            port=port,
            log=log,
            environment={
                "UPSTREAM": f"http://127.0.0.1:{upstream.port}",
                "SILENT": str(listener.sockets[0].getsockname()[1]),
                "TRANSPORT": transport,
                "MAX_CONNECTIONS": str(connections),
            },
        )
        process = await asyncio.to_thread(program.__enter__)
        try:
            yield Stage(process, upstream, silent, log)
        finally:
            await asyncio.to_thread(program.__exit__, None, None, None)


Begin = Callable[[Stage, Caller, str], Awaitable[Seen | None]]

# The phases. Each comes as far as its name says, and returns what upstream sees of it, if it has to see anything.


async def nothing_sent(stage: Stage, caller: Caller, n: str) -> None:
    await asyncio.sleep(0.02)


async def in_the_head(stage: Stage, caller: Caller, n: str) -> None:
    caller.send(head("POST", f"{CREATE}?n={n}", len(BODY))[:-50])
    await asyncio.sleep(0.02)


async def in_the_upload(stage: Stage, caller: Caller, n: str) -> Seen:
    if int(n) % 2:
        caller.send(head("POST", f"/v1/files?n={n}", SIZE) + bytes(SIZE // 2))
    else:
        fields = {"transfer_encoding": "chunked"}
        caller.send(head("POST", f"/v1/files?n={n}", 0, **fields) + b"%x\r\n%b\r\n" % (SIZE // 2, bytes(SIZE // 2)))
    return await begun(stage.upstream.seen[n])


async def resolving(stage: Stage, caller: Caller, n: str) -> None:
    caller.ask("POST", f"{CREATE}?n={n}&held=30", BODY.encode(), x_portkey_api_key=SLOW_KEY, authorization="")
    await asyncio.sleep(RESOLVING / 3)


async def connecting(stage: Stage, caller: Caller, n: str) -> Seen:
    before = len(stage.silent)
    caller.ask("POST", f"{SILENT}/predictions?n={n}", BODY.encode())
    await until(lambda: len(stage.silent) > before)
    return stage.silent[before]


async def waiting_for_the_head(stage: Stage, caller: Caller, n: str) -> Seen:
    caller.ask("POST", f"{CREATE}?n={n}&held=30", BODY.encode())
    return await begun(stage.upstream.seen[n])


async def between_events(stage: Stage, caller: Caller, n: str) -> Seen:
    caller.ask("GET", f"/v1/events?n={n}&events=2&every=30")
    await caller.reader.readuntil(b"data: word")
    return stage.upstream.seen[n]


async def in_a_download(stage: Stage, caller: Caller, n: str) -> Seen:
    """Read slowly, so that upstream waits for the caller."""
    caller.ask("GET", f"/v1/files/x/download?n={n}&pieces={PIECES}")
    for _ in range(3):
        await caller.reader.readexactly(4096)
        await asyncio.sleep(0.03)
    return stage.upstream.seen[n]


async def kept_alive(stage: Stage, caller: Caller, n: str) -> None:
    caller.ask("POST", f"{CREATE}?n={n}", BODY.encode())
    status, _ = await caller.answer()
    if status != 201:
        raise Wrong(f"{status} to a create")


async def begun(seen: Seen) -> Seen:
    async with asyncio.timeout(PATIENCE):
        await seen.begun.wait()
    return seen


@dataclass(frozen=True)
class Phase:
    name: str
    begin: Begin
    sends_all: bool = True
    at_once: int = 10


PHASES = (
    Phase("nothing sent", nothing_sent, sends_all=False),
    Phase("in the head", in_the_head, sends_all=False),
    Phase("in the upload", in_the_upload, sends_all=False),
    Phase("key being resolved", resolving),
    Phase("upstream's TLS handshake", connecting, at_once=1),
    Phase("waiting for the head", waiting_for_the_head),
    Phase("between events", between_events),
    Phase("in a slow download", in_a_download),
    Phase("kept alive", kept_alive),
)


@dataclass
class Left:
    """What became of the requests of one phase, whose callers left."""

    took: list[float] = field(default_factory=list)
    """Seconds until upstream's connection was closed, where one was open."""
    stayed: int = 0
    """Still open after `PATIENCE`."""
    made_whole: int = 0
    """Came to upstream as if they were complete, and were not."""

    @property
    def text(self) -> str:
        if not self.took:
            return "none was open" if not self.stayed else f"**{self.stayed} stayed**"
        told = " / ".join(
            f"{share * 1e3:.0f}" for share in (quantile(self.took, 0.5), quantile(self.took, 0.99), max(self.took))
        )
        return told + (f", **{self.stayed} stayed**" if self.stayed else "")


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


_numbers = iter(range(1, 1 << 62))


async def left(stage: Stage, phase: Phase, repeat: int) -> Left:
    result, places = Left(), asyncio.Semaphore(phase.at_once)

    async def one(number: int) -> None:
        async with places:
            n = str(next(_numbers))
            async with Caller(stage.port) as caller:
                seen = await phase.begin(stage, caller, n)
                at = monotonic()
                # In turns with a farewell and without.
                caller.leave(rudely=number % 2 == 1)
            if seen is None:
                await asyncio.sleep(2 * RESOLVING)
                seen = stage.upstream.seen.get(n)
            if seen is not None and phase.begin is not kept_alive:
                try:
                    async with asyncio.timeout(PATIENCE):
                        await seen.ended.wait()
                    result.took.append(max(0.0, seen.ended_at - at))
                except TimeoutError:
                    result.stayed += 1
            came = stage.upstream.seen.pop(n, None)
            result.made_whole += bool(came and came.whole and not phase.sends_all)

    async with asyncio.TaskGroup() as tasks:
        for number in range(repeat):
            tasks.create_task(one(number))
    result.stayed += await stage.quiet()
    return result


@dataclass
class Level:
    """What a server holds, before and after."""

    memory: float
    files: int

    @staticmethod
    async def of(stage: Stage, since: Level | None = None) -> Level:
        """Hypercorn on trio keeps the socket of a caller who has left for as long as one that it waits for."""
        await stage.quiet()
        await asyncio.sleep(0.3)
        if since is not None:
            await until(lambda: stage.files() <= since.files)
        return Level(stage.process.memory() / 1024, stage.files())


@dataclass
class Crowd:
    """After bursts, or faults."""

    stayed: int
    lost: int
    """Places of the pool that nobody can have any more."""
    wrong: dict[str, int]
    """Answers that are not what they should be."""
    memory: float
    """MiB grown."""
    files: int
    """More open than before."""
    output: str = ""

    @property
    def good(self) -> bool:
        return not (self.stayed or self.lost or self.wrong or self.output)


async def places_lost(stage: Stage, connections: int) -> int:
    """Of the pool: as many requests as it has connections are to be upstream at once."""
    callers = [Caller(stage.port) for _ in range(connections)]
    try:
        for caller in callers:
            await caller.__aenter__()
            caller.ask("POST", f"{CREATE}?held=30", BODY.encode())
        await until(lambda: stage.upstream.busy >= connections)
        return connections - stage.upstream.busy
    finally:
        for caller in callers:
            caller.leave()
        await stage.quiet()


async def bursts(stage: Stage, rounds: int, *, connections: int = MAX_CONNECTIONS, warm: int = 10) -> Crowd:
    """`BURST` requests, more than the pool has connections, of which all callers leave at once.

    A server may hold 256 KiB for each download, and its allocator gives that back when it likes: memory is the least of
    the later half of the rounds beside the least of the earlier one.
    """
    stayed, wrong, memory = 0, dict[str, int](), list[float]()
    kinds: tuple[Begin, ...] = (waiting_for_the_head, between_events, in_a_download, in_the_upload)
    before = await Level.of(stage)
    for number in range(warm + rounds):
        if number == warm:
            before = await Level.of(stage)
        callers = [Caller(stage.port) for _ in range(BURST)]
        waits = []
        for caller, kind in zip(callers, cycle(kinds)):
            await caller.__aenter__()
            waits.append(asyncio.create_task(_come_far(kind, stage, caller)))
        await until(lambda: stage.upstream.busy >= connections)
        if stage.upstream.busy < connections:
            count(wrong, f"{stage.upstream.busy} of {connections} came")
        for each, caller in enumerate(callers):
            caller.leave(rudely=each % 2 == 1)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        stayed += await stage.quiet()
        stage.upstream.seen.clear()
        if (status := await stage.asked(CREATE, "POST", BODY.encode())) != 201:
            count(wrong, f"{status} afterwards")
        memory.append(stage.process.memory() / 1024)
    after = await Level.of(stage, before)
    lost = await places_lost(stage, connections)
    earlier, later = memory[warm : warm + rounds // 2] or memory, memory[warm + rounds // 2 :]
    return Crowd(stayed, lost, wrong, min(later) - min(earlier), after.files - before.files)


async def _come_far(kind: Begin, stage: Stage, caller: Caller) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError, TimeoutError):
        await kind(stage, caller, str(next(_numbers)))


def count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


async def faults(stage: Stage, number: int, *, warm: int = 2000, connections: int = MAX_CONNECTIONS) -> Crowd:
    """Of all kinds, and callers who leave in between, 32 at a time."""
    wrong: dict[str, int] = {}
    every: list[str | Phase] = [*FAULTS, "refused", *PHASES]
    kinds = cycle(every)

    async def some(todo: Iterator[int]) -> None:
        for each in todo:
            kind = next(kinds)
            name = kind if isinstance(kind, str) else kind.name
            try:
                if isinstance(kind, str):
                    expected, got = await failed(stage, kind, "POST" if each % 2 else "GET")
                    if got not in expected:
                        count(wrong, f"{name}: {got}")
                else:
                    async with Caller(stage.port) as caller:
                        await kind.begin(stage, caller, str(next(_numbers)))
                        caller.leave(rudely=each % 2 == 1)
            except (OSError, Wrong, asyncio.IncompleteReadError) as error:
                count(wrong, f"{name}: {error or type(error).__name__}")

    async def many(todo: Iterator[int], since: Level | None = None) -> Level:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(32):
                tasks.create_task(some(todo))
        level = await Level.of(stage, since)
        stage.upstream.seen.clear()
        stage.silent.clear()
        return level

    before = await many(iter(range(warm)))
    after = await many(iter(range(number)), before)
    stayed = await stage.quiet()
    lost = await places_lost(stage, connections)
    said = spoken(stage.log.read_text(errors="replace"))
    return Crowd(stayed, lost, wrong, after.memory - before.memory, after.files - before.files, said)


def spoken(said: str) -> str:
    """Without what asyncio's debug mode says of a busy machine."""
    slow = re.compile(r"Executing <.* took [\d.]+ seconds")
    return "\n".join(line for line in said.splitlines() if not slow.search(line)).strip()


async def failed(stage: Stage, kind: str, method: str) -> tuple[Sequence[int | str], int | str]:
    """What a caller may get, and what he does."""
    path, content = (CREATE, BODY.encode()) if method == "POST" else (f"{CREATE}/x", b"")
    if kind == "refused":
        return (502,), await stage.asked(path.replace("/v1", REFUSED), method, content)
    return FAULTS[kind].expected, await stage.asked(f"{path}?fault={kind}", method, content)


# What is told.


@dataclass
class Results:
    phases: dict[tuple[str, str], dict[str, Left]] = field(default_factory=dict)
    """By transport and server, then by phase."""
    files: dict[tuple[str, str], int] = field(default_factory=dict)
    bursts: dict[tuple[str, str], Crowd] = field(default_factory=dict)
    faults: dict[tuple[str, str], Crowd] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        missed = []
        for (transport, server), phases in self.phases.items():
            for name, result in phases.items():
                if result.stayed or result.made_whole or (result.took and quantile(result.took, 0.99) > GOAL):
                    missed.append(f"{server}, {transport}, {name}: {result}")
        for what in ("bursts", "faults"):
            for (transport, server), crowd in getattr(self, what).items():
                if not crowd.good or crowd.memory > LEVEL:
                    missed.append(f"{server}, {transport}, {what}: {crowd}")
        return missed


def text(results: Results, options: argparse.Namespace) -> str:
    command = (
        f"`python -m benchmarks.aborts --repeat {options.repeat} --rounds {options.rounds} --faults {options.faults}`"
    )
    parts = [f"{date.today()}, {command}; {machine()}. Load average at the end: {os.getloadavg()[0]:.1f}."]
    for transport in options.transports:
        found = {server: phases for (of, server), phases in results.phases.items() if of == transport}
        if found:
            parts.append(
                f"Milliseconds until upstream's connection is closed, transport `{transport}`: p50 / p99 / most."
            )
            rows = [
                [phase.name, *(phases.get(phase.name, Left()).text for phases in found.values())] for phase in PHASES
            ]
            parts.append(table(["the caller leaves", *found], rows))
    whole = sum(each.made_whole for phases in results.phases.values() for each in phases.values())
    stayed = sum(each.stayed for phases in results.phases.values() for each in phases.values())
    files = max(results.files.values(), default=0)
    parts.append(
        f"Requests that came up whole without being so: {whole}. Connections that stayed: {stayed}. Most files that a "
        f"server had open more than before: {files}."
    )
    for what, title in (
        ("bursts", f"Bursts of {BURST} whose callers all leave at once, {options.rounds} rounds."),
        (
            "faults",
            f"{options.faults:,} faults and departures, 32 at a time, after 2,000 to warm up; `-X dev -W error`.",
        ),
    ):
        crowds: dict[tuple[str, str], Crowd] = getattr(results, what)
        if crowds:
            rows = [
                [
                    *(server, transport, str(crowd.stayed), str(crowd.lost)),
                    "; ".join(f"{number} of {name}" for name, number in crowd.wrong.items()) or "0",
                    f"{crowd.memory:.1f}",
                    str(crowd.files),
                    str(len(crowd.output.splitlines())),
                ]
                for (transport, server), crowd in crowds.items()
            ]
            columns = [
                "server",
                "transport",
                "stayed",
                "places lost",
                "wrong answers",
                "MiB grown",
                "files",
                "lines said",
            ]
            parts += [title, table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def measured(options: argparse.Namespace, folder: Path, results: Results) -> None:
    combinations = [(transport, server) for transport in options.transports for server in options.servers]
    for transport, server in combinations:
        async with stage(server, transport, folder) as running:
            for phase in PHASES:
                await left(running, phase, 2)
            before = await Level.of(running)
            for phase in PHASES:
                results.phases.setdefault((transport, server), {})[phase.name] = await left(
                    running, phase, options.repeat
                )
            results.files[transport, server] = (await Level.of(running, before)).files - before.files
            if options.rounds:
                results.bursts[transport, server] = await bursts(running, options.rounds)
        tell(f"{server}, {transport}: phases and bursts")
    if options.faults:
        for transport in options.transports:
            for server in [each for each in options.servers if each in STRICT_SERVERS]:
                async with stage(server, transport, folder, python=STRICT) as running:
                    results.faults[transport, server] = await faults(running, options.faults, warm=options.warm)
                tell(f"{server}, {transport}: faults")


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aborts", description=__doc__)
    parser.add_argument("--servers", type=names(tuple(SERVERS)), default=tuple(SERVERS))
    parser.add_argument("--transports", type=names(TRANSPORTS), default=TRANSPORTS)
    parser.add_argument("--repeat", type=int, default=50, help="departures in each phase (50)")
    parser.add_argument("--rounds", type=int, default=20, help=f"bursts of {BURST} (20); 0 for none")
    parser.add_argument("--faults", type=int, default=10_000, help="mixed faults (10000); 0 for none")
    parser.add_argument("--warm", type=int, default=2000, help="faults before the memory is looked at (2000)")
    page = ROOT / "docs/reliability.md"
    parser.add_argument(
        "--write", nargs="?", type=Path, const=page, metavar="PAGE", help="put the tables into this page"
    )
    return parser.parse_args()


@contextmanager
def prepared() -> Iterator[Path]:
    """A folder for logs and sockets enough; any signal to end is a `KeyboardInterrupt`, and what is there is told."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOCKETS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.sched_setaffinity(0, {LOAD_CORE})
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="aborts-") as folder:
        yield Path(folder)


def main() -> None:
    options, results = arguments(), Results()
    try:
        with prepared() as folder:
            asyncio.run(measured(options, folder, results))
    except KeyboardInterrupt:  # what is there is told
        tell("interrupted")
    told = text(results, options)
    print(told)
    if options.write is not None:
        put(options.write, "aborts", told)
    if results.missed:
        sys.exit("\n".join(["Missed:", *results.missed]))


if __name__ == "__main__":
    main()
