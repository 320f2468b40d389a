"""What is measured, on whoever is running; each in turns, so that a noisy minute meets all alike."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from .processes import LOAD_CORE, PROXY_CORE, Process
from .traffic import BODY, ID, REQUEST_HEADERS, TOKEN
from .upstream import DOWNLOAD, EVENTS, PIECE, UPLOAD

LUA = Path(__file__).with_name("predictions.lua")
DIRECT = "direct"
CONCURRENCY = {"c1": 1, "c32": 32, "c256": 256}
ARRIVAL_SECONDS, PATIENCE = 0.8, 3

Running = Mapping[str, Process]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """One measurement: requests per second, microseconds of CPU per request, and of latency."""

    rate: float
    cpu: float
    p50: float


@dataclass(frozen=True)
class Held:
    finished: int
    seconds: float
    memory: float
    """KiB per request, while all are held."""


@dataclass(frozen=True)
class Bulk:
    rate: float
    """MB/s."""
    cpu: float
    """Seconds per GiB."""
    growth: float
    """MiB."""


@dataclass
class Results:
    """By contestant; of loads and events all measurements, in the order in which they were made."""

    loads: dict[str, dict[str, list[Load]]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    events: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds to the first event."""
    bulk: dict[str, dict[str, list[Bulk]]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    """Microseconds that a request costs more which is the host's."""
    importing: float | None = None
    """Milliseconds."""
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why, by scenario and contestant, which is not measured there."""


def headers(upstream: bool = False, **changed: str) -> dict[str, str]:
    """A caller's, or straight to the upstream."""
    token = {"authorization": f"Bearer {TOKEN}"} if upstream else {}
    return REQUEST_HEADERS | token | changed


class Wrong(Exception):
    """An answer that is not Replicate's."""


# Small answers.


def right(name: str, process: Process) -> None:
    """Whoever does not swap the key, or changes the answer, is not compared."""
    answer = asked(process, "POST", "/v1/predictions", headers(name == DIRECT), BODY.encode())
    content = answer.rest()
    if answer.status != 201 or json.loads(content)["id"] != ID:
        raise Wrong(f"answers {answer.status}")


def load(name: str, process: Process, connections: int, seconds: int) -> Load:
    fields = [part for pair in headers(name == DIRECT).items() for part in pair]
    command = ["taskset", "--cpu-list", str(LOAD_CORE), "wrk", "--threads", "1", "--connections", str(connections)]
    command += ["--duration", f"{seconds}s", "--timeout", "20s", "--script", str(LUA)]
    command += [f"http://127.0.0.1:{process.port}/v1/predictions", "--", BODY, *fields]
    before = process.cpu()
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    spent = process.cpu() - before
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+) (\S+) (\S+)$", told, re.MULTILINE)
    assert found is not None, told
    requests, microseconds, refused, lost = (int(number) for number in found.groups()[:4])
    if refused or lost or not requests:
        raise Wrong(f"{requests} answers to {connections} at a time in {seconds} s, {refused} refused, {lost} lost")
    return Load(rate=requests / microseconds * 1e6, cpu=spent / requests * 1e6, p50=float(found[5]))


def loads(results: Results, running: Running, scenario: str, seconds: int, repeat: int) -> None:
    attempted(results, scenario, running, right)
    if not results.loads:
        attempted(results, scenario, running, load, 8, 1)  # to warm up
    for _ in range(repeat):
        for name, each in attempted(results, scenario, running, load, CONCURRENCY[scenario], seconds).items():
            results.loads.setdefault(scenario, {}).setdefault(name, []).append(each)


def attempted(
    results: Results,
    scenario: str,
    running: Running,
    measure: Callable[Concatenate[str, Process, P], T],
    *arguments: P.args,
    **more: P.kwargs,
) -> dict[str, T]:
    """What `measure` says of each that has not failed in this scenario."""
    measured = {}
    for name, process in running.items():
        if (scenario, name) not in results.failed:
            try:
                measured[name] = measure(name, process, *arguments, **more)
            except (Wrong, OSError, subprocess.SubprocessError) as error:
                results.failed[scenario, name] = str(error) if isinstance(error, Wrong) else repr(error)
    return measured


# Answers that come bit by bit, or are large.


@dataclass
class Answer:
    """A status, and a body that is as long as its connection: these requests say `connection: close`."""

    status: int
    head: bytes
    begun: bytes
    connection: socket.socket

    def rest(self) -> bytes:
        content = bytearray(self.begun)
        with self.connection:
            while piece := self.connection.recv(PIECE):
                content += piece
        return bytes(content)


def asked(process: Process, method: str, target: str, fields: Mapping[str, str], content: bytes = b"") -> Answer:
    connection = opened(process, method, target, fields, len(content))
    connection.sendall(content)
    return answered(connection)


def opened(process: Process, method: str, target: str, fields: Mapping[str, str], length: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=30)
    connection.sendall(head(method, target, fields, length))
    return connection


def head(method: str, target: str, fields: Mapping[str, str], length: int) -> bytes:
    every = {"host": "app.example", **fields, "connection": "close"}
    if method == "POST":
        every |= {"content-length": str(length)}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def answered(connection: socket.socket) -> Answer:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(4096)
        if not piece:
            connection.close()
            raise Wrong("no answer")
        received += piece
    head, _, begun = received.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ")[1]), head, begun, connection)


def first_event(name: str, process: Process) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    answer = asked(process, "GET", EVENTS, headers(name == DIRECT, accept="text/event-stream"))
    received = answer.begun
    while answer.status == 200 and b"data: word\n\n" not in received:
        received += answer.connection.recv(4096)
    taken = time.perf_counter() - start
    whole = received + answer.rest()
    if whole.count(b"data: word\n\n") < 3:
        raise Wrong(f"{answer.status}, {len(whole)} bytes of events")
    return taken * 1e3


def events(results: Results, running: Running, repeat: int) -> None:
    for _ in range(repeat):
        for name, taken in attempted(results, "sse", running, first_event).items():
            results.events.setdefault(name, []).append(taken)


def download(name: str, process: Process, mebibytes: int) -> None:
    pieces = mebibytes * 1024 * 1024 // PIECE
    answer = asked(process, "GET", f"{DOWNLOAD}?pieces={pieces}", headers(name == DIRECT))
    received, buffer = len(answer.begun), bytearray(PIECE)
    with answer.connection:
        while count := answer.connection.recv_into(buffer):
            received += count
    if answer.status != 200 or received < pieces * PIECE:
        raise Wrong(f"{answer.status}, {received} bytes of a download")


def upload(name: str, process: Process, mebibytes: int) -> None:
    length = mebibytes * 1024 * 1024
    fields = headers(name == DIRECT, **{"content-type": "application/octet-stream"})
    connection, piece = opened(process, "POST", UPLOAD, fields, length), bytes(PIECE)
    for _ in range(length // PIECE):
        connection.sendall(piece)
    answer = answered(connection)
    content = answer.rest()
    if answer.status != 201 or b'"size": %d}' % length not in content:
        raise Wrong(f"{answer.status} to an upload")


def bulk(results: Results, running: Running, scenario: str, mebibytes: int, repeat: int) -> None:
    move = {"down": download, "up": upload}[scenario]
    attempted(results, scenario, running, move, 1)
    for _ in range(repeat):
        for name, each in attempted(results, scenario, running, moved, move, mebibytes).items():
            results.bulk.setdefault(scenario, {}).setdefault(name, []).append(each)


def moved(name: str, process: Process, move: Callable[[str, Process, int], None], mebibytes: int) -> Bulk:
    process.forget_peak()
    memory, cpu, start = process.memory(), process.cpu(), time.perf_counter()
    move(name, process, mebibytes)
    taken = time.perf_counter() - start
    growth = max(process.memory("VmHWM") - memory, 0) / 1024
    spent = (process.cpu() - cpu) * 1024 / mebibytes
    return Bulk(rate=mebibytes * 1.048576 / taken, cpu=spent, growth=growth)


# Answers that take long.


def held(results: Results, running: Running, count: int, seconds: int) -> None:
    attempted(results, "held", running, hold, 20, 1)
    results.held.update(attempted(results, "held", running, hold, count, seconds))


def hold(name: str, process: Process, count: int, seconds: int) -> Held:
    """`count` creates with `Prefer: wait`, which arrive one by one; what takes three times as long is cut off."""
    return asyncio.run(holding(process, headers(name == DIRECT, prefer=f"wait={seconds}"), count, seconds))


async def holding(process: Process, fields: Mapping[str, str], count: int, seconds: int) -> Held:
    request = head("POST", "/v1/predictions", fields, len(BODY)) + BODY.encode()
    before, start = process.memory(), time.perf_counter()
    creates = []
    for number in range(count):
        creates.append(asyncio.create_task(create(process.port, request)))
        if number % 20 == 19:
            await asyncio.sleep(max(0.0, start + ARRIVAL_SECONDS * number / count - time.perf_counter()))
    # The last has been sent, and the first is not answered yet.
    await asyncio.sleep(max(0.0, start + seconds - 0.3 - time.perf_counter()))
    grown = process.memory() - before
    done, late = await asyncio.wait(creates, timeout=max(0.0, start + PATIENCE * seconds - time.perf_counter()))
    taken = time.perf_counter() - start
    for each in late:
        each.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return Held(finished=sum(each.result() for each in done), seconds=taken, memory=grown / count)


async def create(port: int, request: bytes) -> bool:
    """Whether it was answered with a prediction."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 201") and answer.endswith(b"}") and ID.encode() in answer


# In processes of their own, without a server.

HOST = """
import asyncio, statistics, sys, time
from benchmarks.compare import apps

apps.UPSTREAM = "http://127.0.0.1:9"
app = getattr(apps, sys.argv[1])()
scope = {"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b"", "headers": []}

async def batch(app):
    start = time.process_time()
    for _ in range(5000):
        await app(scope, None, send)
    return (time.process_time() - start) / 5000 * 1e6

async def send(message):
    pass

async def main():
    differences = []
    for _ in range(60):
        bare = await batch(apps.host)
        differences.append(await batch(app) - bare)
    print(statistics.median(differences))

asyncio.run(main())
"""

IMPORT = """
import time
import httpx
from opentelemetry import metrics, trace

start = time.process_time()
import replicate_proxy_mw
print((time.process_time() - start) * 1e3)
"""


def host_requests(app: str) -> float:
    """Microseconds that the middleware takes for a request that is not its own."""
    return alone(HOST, app)


def importing() -> float:
    """Milliseconds for the package where httpx and OpenTelemetry's API are there already; the first run compiles."""
    return sorted([alone(IMPORT) for _ in range(8)][1:])[3]


def alone(program: str, *arguments: str) -> float:
    command = ["taskset", "--cpu-list", str(PROXY_CORE), sys.executable, "-c", program, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
