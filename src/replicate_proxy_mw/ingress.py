"""The caller's side of a request: its body, and whether anyone is still there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from .errors import BadRequest, ClientDisconnected

if TYPE_CHECKING:
    from asgiref.typing import ASGIReceiveCallable


class RequestBody:
    """The one reader of `receive()`: the body while it lasts, afterwards the disconnect watcher.

    Two readers would steal each other's messages, and `send()` tells no server's app that the caller has left
    (uvicorn, hypercorn and granian alike): only a pending `receive()` does.

    Attributes:
        size: bytes read so far.
        disconnected: the caller has left.
        failure: what `receive()` raised. It is the host's (Starlette's body limit) and has to leave as it came.
    """

    def __init__(self, receive: ASGIReceiveCallable) -> None:
        self._receive = receive
        self._declared: int | None = None
        self._first = b""
        self._more = True
        self._handed_over = anyio.Event()
        self.size = 0
        self.disconnected = False
        self.failure: Exception | None = None

    async def begin(self, declared: int | None = None) -> None:
        """Read the first message, which alone tells whether there is a body: over HTTP/2 no header has to.

        Args:
            declared: the length in bytes that a header announced.

        Raises:
            BadRequest: the body has another length, here or further on: upstream never gets it whole.
            ClientDisconnected: there is nobody to read from.
        """
        self._declared = declared
        self._first = await self._next()

    @property
    def whole(self) -> int | None:
        """The length in bytes of a body that came with the first message, else None."""
        return None if self._more else len(self._first)

    def __aiter__(self) -> RequestBody:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._first = self._first, b""
        while not chunk:
            if not self._more:
                raise StopAsyncIteration
            chunk = await self._next()
        return chunk

    async def _next(self) -> bytes:
        try:
            message = await self._receive()
        except Exception as error:
            self.failure = error
            raise
        if message["type"] != "http.request":
            self._more, self.disconnected = False, True
            raise ClientDisconnected()
        self._more = message.get("more_body", False)
        if not self._more:
            self.hand_over()
        chunk = message.get("body", b"")
        self.size += len(chunk)
        if self._declared is not None and not self._fits(self._declared):
            raise BadRequest("The body is longer or shorter than its content-length.")
        return chunk

    def _fits(self, declared: int) -> bool:
        return self.size <= declared if self._more else self.size == declared

    def hand_over(self) -> None:
        """Let `departure` read on: the body is at its end, or upstream has answered and nobody wants the rest."""
        self._handed_over.set()

    async def departure(self) -> None:
        """Return when the caller has left; never before the body is handed over."""
        await self._handed_over.wait()
        while not self.disconnected:
            message = await self._receive()
            self.disconnected = message["type"] == "http.disconnect"


async def while_connected(
    body: RequestBody, relay: Callable[[], Awaitable[None]], *, ending: Callable[[], bool]
) -> None:
    """Run `relay` until it is done or the caller leaves; once it is `ending`, until it is done.

    Servers report a departure as soon as an answer is complete, hypercorn while it still sends the last message: to
    cancel it then would leave its connection open.

    Both run as children of one task group: a relay in the host's own task leaks its connection when that task is
    cancelled twice. What it raises leaves bare, since a host's handlers do not look into exception groups.

    Raises:
        ClientDisconnected: the caller left before `relay` was done.
    """
    failures: list[Exception] = []
    done = False

    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            nonlocal done
            try:
                await relay()
                done = True
            except Exception as error:
                failures.append(error)
            tasks.cancel_scope.cancel()

        async def watch() -> None:
            try:
                await body.departure()
            except Exception:  # a host's limit on the rest of an upload: nobody reads that rest
                return
            if not ending():
                tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        tasks.start_soon(watch)

    if body.disconnected and not done:
        raise ClientDisconnected()
    if failures:
        raise failures.pop()
