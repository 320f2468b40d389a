"""The caller's side of a request: its body, and whether anyone is still there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import nullcontext, suppress
from time import monotonic
from types import coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from .errors import BadRequest, BodyTimeout, BodyTooLarge, ClientDisconnected, ProxyError, UpstreamTimeout
from .event_loops import asyncio_task
from .waiting import Waiting

if TYPE_CHECKING:
    from asgiref.typing import ASGIReceiveCallable, ASGIReceiveEvent

logger = logging.getLogger("replicate_proxy_mw")

T = TypeVar("T")

# Messages held while nobody takes them: so many a caller may have sent before its departure goes unnoticed.
AHEAD = 2

# Seconds that an exchange may take before anybody looks out for its caller: what is left upstream by a caller who
# leaves sooner ends as soon as it would have.
PATIENCE = 0.25


class RequestBody:
    """The one reader of `receive()`, from the first message to the caller's departure.

    Two readers would steal each other's messages, and `send()` tells no server's app that the caller has left
    (uvicorn, hypercorn and granian alike): only a pending `receive()` does. So `begin` reads the first message, `watch`
    all others, and the body is iterated from what they have read. It can be iterated once.

    Args:
        receive: the server's.
        timeout: seconds for the first message, and for more of the body when somebody waits for it: a caller whose
            upload stands still because upstream does not read has all the time.

    Attributes:
        size: bytes read so far.
        disconnected: the caller has left.
        failure: what `receive()` raised. It is the host's (Starlette's body limit) and has to leave as it came.
        waiting: what is spent waiting for the caller is counted here, if anybody counts.
    """

    def __init__(self, receive: ASGIReceiveCallable, *, timeout: float = 30.0) -> None:
        self._receive = receive
        self._timeout = timeout
        self._declared: int | None = None
        self._limit: int | None = None
        # No deque, which takes as much as the rest of a held request's body.
        self._chunks: list[bytes] = []
        self._more = True
        self._reading: object | None = None
        self._abandoned = False
        self._changed: anyio.Event | None = None
        self._refusal: ProxyError | None = None
        self.size = 0
        self.disconnected = False
        self.failure: Exception | None = None
        self.waiting: Waiting | None = None

    async def begin(self, declared: int | None = None, *, limit: int | None = None) -> None:
        """Read the first message, which alone tells whether there is a body: over HTTP/2 no header has to.

        Args:
            declared: the length in bytes that a header announced.
            limit: bytes that it may have.

        Raises:
            BadRequest, BodyTooLarge: the body has another length, or is too long: nothing is read if a header says so.
                If that shows only later, the body fails with it: upstream never gets one whole that is not as it was
                said to be, or as it has to be.
            BodyTimeout: nothing has come. Later the body fails with it, likewise.
            ClientDisconnected: there is nobody to read from.
        """
        self._declared, self._limit = declared, limit
        if declared is not None and limit is not None and declared > limit:
            raise _too_large(limit)
        try:
            if self.waiting is None:
                self._take_in(await in_time(self._receive(), self._timeout, BodyTimeout))
            else:
                with self.waiting:
                    self._take_in(await in_time(self._receive(), self._timeout, BodyTimeout))
        except BodyTimeout:
            raise
        except Exception as error:
            self._fail(error)
            raise
        if self.disconnected:
            raise ClientDisconnected()
        if self._refusal is not None:
            raise self._refusal

    @property
    def complete(self) -> bool:
        """All of it has come."""
        return not self._more

    def whole(self) -> bytes | None:
        """A body that came with the first message, which is then read; else None."""
        if self._more:
            return None
        return self._chunks.pop(0) if self._chunks else b""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Reading(self)

    async def take(self, reading: object) -> bytes:
        """The next chunk for `reading`, which has to be the one that took the first."""
        if self._reading is None:
            self._reading = reading
        elif self._reading is not reading and (self._more or self.size):
            logger.error(
                "the body was read twice: a layer that reads it passes on what it read, replace(request, body=...)"
            )
            raise ProxyError()
        deadline = None
        while not self._chunks:
            if self.failure is not None:
                raise self.failure
            if self._refusal is not None:
                raise self._refusal
            if self.disconnected or self._abandoned:
                raise ClientDisconnected()
            if not self._more:
                raise StopAsyncIteration
            # One for all of the wait: messages without content give no more time.
            deadline = deadline or monotonic() + self._timeout
            with self.waiting or nullcontext():
                await in_time(self._change(), deadline - monotonic(), BodyTimeout)
        chunk = self._chunks.pop(0)
        self._notify()
        return chunk

    def abandon(self) -> None:
        """Upstream has answered: what is left of the body concerns nobody, and must not keep us from watching."""
        self._abandoned = self._more
        self._chunks.clear()
        self._notify()

    async def watch(self) -> bool:
        """Read on until the caller has left: then True. False if the host does not let us read on."""
        while not self.disconnected:
            while self._more and len(self._chunks) >= AHEAD:
                await self._change()
            try:
                self._take_in(await self._receive())
            except Exception as error:
                self._fail(error)
                return False
        return True

    def _fail(self, error: Exception) -> None:
        # A limit on the rest of an upload that nobody reads is nobody's concern.
        self.failure = None if self._abandoned else error
        self._notify()

    def _take_in(self, message: ASGIReceiveEvent) -> None:
        if message["type"] != "http.request":
            self.disconnected = True
        else:
            chunk = message.get("body", b"")
            self._more = message.get("more_body", False)
            self.size += len(chunk)
            if self._declared is not None and not self._fits(self._declared):
                self._refusal = BadRequest("The body is longer or shorter than its content-length.")
            elif self._limit is not None and self.size > self._limit:
                self._refusal = _too_large(self._limit)
            elif chunk and not self._abandoned:
                self._chunks.append(chunk)
        self._notify()

    def _fits(self, declared: int) -> bool:
        return self.size <= declared if self._more else self.size == declared

    async def _change(self) -> None:
        self._changed = self._changed or anyio.Event()
        await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"max_body_size: a body may have {limit} bytes.")


class _Reading:
    """One reading of a body."""

    def __init__(self, body: RequestBody) -> None:
        self._body = body

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> bytes:
        return await self._body.take(self)


async def in_time(wait: Awaitable[T], seconds: float, late: Callable[[], ProxyError]) -> T:
    """What `wait` gives within so many seconds; then `late` is raised. Who cancels meanwhile is obeyed as ever."""
    if asyncio_task() is None:
        with anyio.move_on_after(seconds):
            return await wait
        raise late()
    # Its first step here: most have not to wait at all, and then a timer would be most of what they take.
    # What `types.coroutine` makes has none.
    steps: Any = getattr(wait, "__await__", lambda: wait)()
    try:
        awaited = [next(steps)]
    except StopIteration as done:
        value: T = done.value
        return value
    try:
        async with asyncio.timeout(seconds) as limit:
            return await _resumed(steps, awaited)
    except TimeoutError:
        if not limit.expired():
            raise
    raise late()


@coroutine
def _resumed(steps: Generator[Any, Any, T], awaited: list[Any]) -> Generator[Any, Any, T]:
    """`yield from` what has begun already. Nothing that is waited for is bound: it may show its result, a token."""
    while True:
        try:
            yield awaited.pop()
        except BaseException as error:
            if not hasattr(steps, "throw"):  # of a server that is not written in Python
                raise
            try:
                awaited.append(steps.throw(error))
            except StopIteration as done:
                value: T = done.value
                return value
        else:
            return (yield from steps)


# Seconds until a request that is too late, but just begins its answer, is looked at again.
A_MOMENT = 0.01


def too_late(*, sent: bool) -> UpstreamTimeout:
    what = "it may have been received" if sent else "nothing was sent"
    return UpstreamTimeout(f"total_timeout: the time for this request is over; {what}.")


def _never() -> bool:
    return False


def while_connected(
    body: RequestBody,
    relay: Callable[[], Awaitable[None]],
    *,
    ending: Callable[[], bool],
    starting: Callable[[], bool] = _never,
    deadline: float | None = None,
) -> Awaitable[None]:
    """Run `relay` until it is done or the caller leaves; once it is `ending`, until it is done. `deadline` is one of
    `anyio.current_time`; while it is `starting` to answer it is left to do so: nobody could tell whether another status
    may follow, and a server's own 500 has SDKs send a create again.

    Servers report a departure as soon as an answer is complete, hypercorn while it still sends the last message: to
    cancel it then would leave its connection open.

    On asyncio nobody looks out for the departure until that has taken `PATIENCE`, unless the body is still on its way:
    most answers are there sooner, and need no second task.

    Raises:
        ClientDisconnected: the caller left before `relay` was done.
        UpstreamTimeout: it was not done by the deadline.
        ProxyError: `relay` was cancelled by something that it waited for.
    """
    return (_in_group if asyncio_task() is None else _on_asyncio)(body, relay, ending, starting, deadline)


async def _on_asyncio(
    body: RequestBody,
    relay: Callable[[], Awaitable[None]],
    ending: Callable[[], bool],
    starting: Callable[[], bool],
    deadline: float | None,
) -> None:
    """What a task group does, in fewer steps."""
    loop = asyncio.get_running_loop()
    # In a task of its own, which only this scope cancels: who cancels the host's task, however often, interrupts
    # nothing that is shielded, such as the record of what is paid, and is shown nothing of what was on its way.
    scope = anyio.CancelScope()
    relaying = loop.create_task(_within(scope, relay))
    lookout = _Lookout(loop, scope, body, ending)
    late = None if deadline is None else _Deadline(loop, scope, deadline, ending, starting)
    try:
        cancelled = await _end_of(relaying, scope, loop)
    finally:
        if late is not None:
            late.timer.cancel()
        await lookout.end()
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del cancelled  # its traceback shows this frame, and would keep itself
    came = None if relaying.cancelled() else relaying.result()
    if came is _DONE:
        return
    if body.disconnected and (came is None or isinstance(came, Exception)):
        raise ClientDisconnected()
    if scope.cancel_called and (came is None or isinstance(came, Exception)):
        raise too_late(sent=True)
    if came is not None:
        try:
            raise came
        finally:
            del came, relaying
    logger.error("request failed: a layer was cancelled by what it waited for")
    raise ProxyError()


_DONE = Exception("a relay came to its end")


async def _within(scope: anyio.CancelScope, relay: Callable[[], Awaitable[None]]) -> BaseException | None:
    """What `relay` raised, `_DONE` if it came to its end, None if it was cancelled."""
    try:
        with scope:
            await relay()
            return _DONE
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # not raised here, since a task that exits takes the loop along
        return error
    return None


async def _end_of(
    relaying: asyncio.Task[BaseException | None], scope: anyio.CancelScope, loop: asyncio.AbstractEventLoop
) -> asyncio.CancelledError | None:
    """Wait for it, even if cancelled, which cancels `scope`; that is returned."""
    ended = loop.create_future()

    def end(_: object) -> None:
        if not ended.done():
            ended.set_result(None)

    relaying.add_done_callback(end)
    try:
        await ended
    except asyncio.CancelledError as cancelled:
        scope.cancel()
        # anyio would cancel again with each turn of the loop.
        with anyio.CancelScope(shield=True):
            while not relaying.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait((relaying,))
        return cancelled
    return None


class _Lookout:
    """Cancels `scope` when the caller has left."""

    __slots__ = ("_body", "_ending", "_loop", "_scope", "_timer", "_watching")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        scope: anyio.CancelScope,
        body: RequestBody,
        ending: Callable[[], bool],
    ) -> None:
        self._loop, self._scope, self._body, self._ending = loop, scope, body, ending
        self._watching: asyncio.Task[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if body.complete:
            self._timer = self._loop.call_later(PATIENCE, self._begin)
        else:
            self._begin()

    def _begin(self) -> None:
        self._watching = self._loop.create_task(self._body.watch())
        self._watching.add_done_callback(self._act)

    def _act(self, watching: asyncio.Task[bool]) -> None:
        if not watching.cancelled() and watching.result() and not self._ending():
            self._scope.cancel()

    async def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watching is not None and not self._watching.done():
            self._watching.cancel()
            await asyncio.wait((self._watching,))


class _Deadline:
    """Cancels `scope` when it is time."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        scope: anyio.CancelScope,
        deadline: float,
        ending: Callable[[], bool],
        starting: Callable[[], bool],
    ) -> None:
        self._loop, self._scope, self._ending, self._starting = loop, scope, ending, starting
        self.timer = loop.call_at(deadline, self._act)

    def _act(self) -> None:
        if self._starting():
            self.timer = self._loop.call_later(A_MOMENT, self._act)
        elif not self._ending():
            self._scope.cancel()


async def _in_group(
    body: RequestBody,
    relay: Callable[[], Awaitable[None]],
    ending: Callable[[], bool],
    starting: Callable[[], bool],
    deadline: float | None,
) -> None:
    """The same off asyncio."""
    failures: list[BaseException] = []
    done = late = False

    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            nonlocal done
            try:
                await relay()
                done = True
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                failures.append(error)
            finally:
                tasks.cancel_scope.cancel()

        async def watch() -> None:
            if await body.watch() and not ending():
                tasks.cancel_scope.cancel()

        async def expire(deadline: float) -> None:
            nonlocal late
            await anyio.sleep_until(deadline)
            while starting():  # noqa: ASYNC110 - as on asyncio
                await anyio.sleep(A_MOMENT)
            if not ending():
                late = True
                tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        tasks.start_soon(watch)
        if deadline is not None:
            tasks.start_soon(expire, deadline)

    if done:
        return
    if body.disconnected:
        raise ClientDisconnected()
    if late:
        raise too_late(sent=True)
    # What it raises leaves bare, since a host's handlers do not look into exception groups.
    raise failures.pop()
