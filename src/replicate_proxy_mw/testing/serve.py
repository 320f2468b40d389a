"""Serving an ASGI app on a real loopback port, in a thread, for as long as a `with` block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

# Frameworks disagree about the types of scope and messages.
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where the apps can be reached: one origin per app, like ``http://127.0.0.1:49152``, no trailing slash."""

    urls: tuple[str, ...]

    @property
    def url(self) -> str:
        """The origin of the first (often the only) app."""
        return self.urls[0]


class _Server(uvicorn.Server):
    """Stops at once: uvicorn's own loops look ten times a second, which a fixture would pay for in every test."""

    def __init__(self, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self.grace = grace
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0 makes it renew the Date header
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), timeout=1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.server_state
        for server in self.servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()
        end = time.monotonic() + self.grace
        while (state.connections or state.tasks) and time.monotonic() < end:  # noqa: ASYNC110 - sets without events
            await asyncio.sleep(0.002)
        for task in state.tasks:
            task.cancel()
        await self.lifespan.shutdown()

    def stop(self) -> None:
        self.should_exit = True
        self.loop.call_soon_threadsafe(self.stopping.set)


def _listening() -> socket.socket:
    # asyncio turns Nagle's algorithm off only for sockets that name their protocol; left on, it costs 40 ms a call
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


@contextlib.contextmanager
def serve(
    app: ASGIApp,
    *others: ASGIApp,
    http: Literal["h11", "httptools"] = "h11",
    lifespan: Literal["on", "off", "auto"] = "on",
    grace: float = 1.0,
) -> Iterator[Served]:
    """Serve `app`, and each of `others` on a port of its own, from one uvicorn thread.

    - `http`: the HTTP parser. h11 by default, since httptools before 0.7 refuses the method QUERY of `models.search`.
    - `lifespan`: on by default, so that a failing start-up is an error here and not a surprise later; it is
      the lifespan of `app` alone.
    - `grace`: seconds that unfinished requests get at the end before they are cancelled. Short, because a test
      that leaves a stream open should not pay for it.

    Raises what the app's start-up raised, or `RuntimeError` with the message of ``lifespan.startup.failed``.
    """
    sockets = [_listening() for _ in (app, *others)]
    ports = [sock.getsockname()[1] for sock in sockets]
    apps = dict(zip(ports, (app, *others), strict=True))
    failures: list[BaseException] = []

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await apps[scope["server"][1]](scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"].endswith(".failed"):
                failures.append(RuntimeError(message.get("message", "")))
            await send(message)

        try:
            await app(scope, receive, watched)
        except BaseException as exc:
            failures.insert(0, exc)  # says more than the text a framework sent before it
            raise

    server = _Server(
        uvicorn.Config(
            dispatch,
            http=http,
            lifespan=lifespan,
            interface="asgi3",
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        ),
        grace,
    )

    def run() -> None:
        try:
            server.run(sockets=sockets)
        except BaseException as exc:  # SystemExit after a failed lifespan, ImportError for a missing parser
            failures.append(exc)
        finally:
            server.ready.set()

    thread = threading.Thread(target=run, name="replicate_proxy_mw.testing.serve", daemon=True)
    thread.start()
    server.ready.wait()
    try:
        if not server.started:
            raise failures[0]
        yield Served(urls=tuple(f"http://127.0.0.1:{port}" for port in ports))
    finally:
        if server.started:
            server.stop()
        thread.join()
        for sock in sockets:
            sock.close()
