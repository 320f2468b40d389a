"""What becomes of requests when a server is told to stop, and that nothing of the proxy outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

import replicate_proxy_mw
from benchmarks.aborts import SERVERS, STRICT, spoken
from benchmarks.compare.processes import free_port
from benchmarks.compare.scenarios import Wrong
from benchmarks.compare.traffic import BODY
from benchmarks.soak.caller import Caller, Cut
from benchmarks.soak.upstream import EVENT, Upstream
from replicate_proxy_mw.testing import serve
from tests.raw_asgi import Caller as RawCaller
from tests.raw_asgi import http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.servers.running import wait_for

GRACE = 3
OPTIONS = {
    "uvicorn": ["--timeout-graceful-shutdown", str(GRACE)],
    "hypercorn": ["--graceful-timeout", str(GRACE)],
    "granian": ["--workers-kill-timeout", str(GRACE)],
}
WITHIN, BEYOND = "short", "long"
REQUESTS = {
    ("stream", WITHIN): ("GET", "/v1/events?n=0&events=3&every=0.4", b""),
    ("stream", BEYOND): ("GET", "/v1/events?n=1&events=100&every=0.4", b""),
    ("create", WITHIN): ("POST", "/v1/predictions?n=2&held=1.2", BODY.encode()),
    ("create", BEYOND): ("POST", "/v1/predictions?n=3&held=40", BODY.encode()),
}

Got = tuple[int, bytes] | type[Exception]


@dataclass
class Stopped:
    answers: dict[tuple[str, str], Got]
    seconds: float
    said: str
    open: int
    """Upstream's connections, when the server has ended."""


async def _stopped(server: str, transport: str) -> Stopped:
    """Run a server, ask `REQUESTS` of it, and tell it to stop while they are under way."""
    async with Upstream() as upstream:
        port = free_port()
        command = [sys.executable, *STRICT, "-m", *(part.format(port=port) for part in SERVERS[server])]
        process = subprocess.Popen(  # noqa: ASYNC220 - once, and `wait_for` takes no other
            [*command, *OPTIONS[server.partition("-")[0]]],
            env=os.environ | {"UPSTREAM": f"http://127.0.0.1:{upstream.port}", "TRANSPORT": transport},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            await asyncio.to_thread(wait_for, process, port)
            asking = {name: asyncio.create_task(_asked(port, *request)) for name, request in REQUESTS.items()}
            async with asyncio.timeout(10):
                for number in range(len(REQUESTS)):
                    await upstream.seen[str(number)].begun.wait()
            await asyncio.sleep(0.2)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said, _ = await asyncio.to_thread(process.communicate, timeout=30)
            seconds = time.monotonic() - started
            answers = {name: await task for name, task in asking.items()}
            async with asyncio.timeout(5):
                for number in range(len(REQUESTS)):
                    await upstream.seen[str(number)].ended.wait()
            await asyncio.sleep(0.1)
            return Stopped(answers, seconds, said.decode(errors="replace"), upstream.open)
        finally:
            process.kill()
            process.wait()


async def _asked(port: int, method: str, target: str, content: bytes) -> Got:
    async with Caller(port) as caller:
        caller.ask(method, target, content)
        try:
            return await caller.answer()
        except (Cut, Wrong) as error:
            return type(error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("server", "transport"), list(zip(sorted(SERVERS), ("fast", "default", "fast", "default", "fast"), strict=True))
)
def test_what_ends_within_the_grace_time_is_delivered_and_what_does_not_is_cut(server: str, transport: str) -> None:
    stopped = asyncio.run(_stopped(server, transport))
    answers = stopped.answers
    assert answers["stream", WITHIN] == (200, EVENT * 3)
    created = answers["create", WITHIN]
    assert isinstance(created, tuple)
    assert created[0] == 201
    assert answers["stream", BEYOND] is Cut
    # No answer, or one of the server's own for an app that it has cancelled: uvicorn's if it gets that far.
    assert answers["create", BEYOND] in (Wrong, (500, b""), (500, b"Internal Server Error"))
    assert GRACE / 2 < stopped.seconds < GRACE + 10
    assert stopped.open == 0
    said = spoken(stopped.said)
    for trouble in ("was destroyed", "never awaited", "unclosed", "ResourceWarning", "replicate_proxy_mw"):
        assert trouble not in said, said


# In this process.

_OURS = Path(replicate_proxy_mw.__file__).parent


def _tasks_of_ours() -> list[str]:
    """Names of running functions: of tasks that began in this package, but not in its `testing`."""
    found = []
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        if code is None:
            continue
        path = Path(code.co_filename)
        if path.is_relative_to(_OURS) and not path.is_relative_to(_OURS / "testing"):
            found.append(code.co_qualname)
    return found


class Watched:
    """The tasks of ours while a request is under way, and when the host's lifespan has ended."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._app = app
        self.during: list[str] = []
        self.afterwards: list[str] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Any) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                await asyncio.sleep(0.1)  # uvicorn does not wait for what it has cancelled
                self.afterwards = _tasks_of_ours()
            elif message.get("body"):
                self.during += _tasks_of_ours()
            await send(message)

        await self._app(scope, receive, noted)


def _stream(connection: Connection) -> None:
    while connection.request():
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.send(b"9\r\ndata: 1\n\n\r\n")
        connection.wait_closed()


@pytest.mark.usefixtures("either_transport")
def test_no_task_outlives_the_hosts_lifespan() -> None:
    with RawUpstream(_stream) as upstream:
        app = Watched(proxy(upstream.url))
        with serve(app, grace=0.1) as served:
            caller = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=5)
            caller.sendall(b"GET /v1/x HTTP/1.1\r\nhost: proxy.test\r\nx-portkey-api-key: pk-team-a\r\n\r\n")
            received = b""
            while b"data: 1" not in received:
                received += caller.recv(65536)
            time.sleep(0.1)  # by then its caller's departure is looked out for
        with caller, suppress(ConnectionResetError):
            received += b"".join(iter(lambda: caller.recv(65536), b""))
        assert not received.endswith(b"0\r\n\r\n")
        assert upstream.closed.wait(1.5)
    assert app.during
    assert app.afterwards == []


@pytest.mark.usefixtures("either_transport")
def test_the_end_of_the_lifespan_closes_what_is_idle() -> None:
    with RawUpstream(_answer_and_wait) as upstream:
        with serve(proxy(upstream.url)) as served:
            with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=5) as caller:
                caller.sendall(b"GET /v1/x HTTP/1.1\r\nhost: proxy.test\r\nx-portkey-api-key: pk-team-a\r\n\r\n")
                assert b" 200 " in caller.recv(65536)
            assert not upstream.closed.wait(0.3)
        assert upstream.closed.wait(1.5)


@pytest.mark.anyio
@pytest.mark.usefixtures("either_transport")
async def test_a_host_without_a_lifespan_closes_it_by_itself() -> None:
    with RawUpstream(_answer_and_wait) as upstream:
        app = proxy(upstream.url)
        caller = await RawCaller().call(app, http_scope())
        assert caller.status == 200
        assert not upstream.closed.is_set()
        await app.aclose()
        assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)


def _answer_and_wait(connection: Connection) -> None:
    connection.request()
    connection.answer()
    connection.wait_closed()
