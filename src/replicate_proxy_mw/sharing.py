"""One call for several who wait for it, in a task of its own: a caller who leaves ends nobody else's waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import anyio

from . import ending
from .errors import ProxyError, UpstreamAborted, UpstreamFailed
from .exchange import Forward, ProxyRequest, ProxyResponse
from .json_bodies import held

T = TypeVar("T")

# An event loop keeps no task alive that nobody refers to.
_tasks: set[asyncio.Task[None]] = set()


class SharedCall(Generic[T]):
    """A call that begins at once, in the context of whoever makes it.

    Args:
        call: what is called.
        to_the_end: whether it goes on when nobody waits for it any more.
    """

    def __init__(self, call: Callable[[], Awaitable[T]], *, to_the_end: bool = False) -> None:
        self._to_the_end = to_the_end
        self._waiting = 0
        self._scope, self._over = anyio.CancelScope(), anyio.Event()
        self._results: list[T] = []
        # Where the event loop ends before the call, or something that it waited for cancels it.
        self._error: Exception = ProxyError()
        _spawn(self._run, call)

    @property
    def is_open(self) -> bool:
        """Whether it is under way, and waiting for it makes sense."""
        return not self._over.is_set() and not self._scope.cancel_called

    async def result(self) -> T:
        """What it returns, for whoever waits. In the event loop where it was begun.

        Raises:
            Exception: what it raised; each gets a `ProxyError` of its own.
        """
        self._waiting += 1
        try:
            await self._over.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and not self._to_the_end:
                self._scope.cancel()
        if self._results:
            return self._results[0]
        raise self._error.anew() if isinstance(self._error, ProxyError) else self._error

    async def _run(self, call: Callable[[], Awaitable[T]]) -> None:
        try:
            with self._scope:
                self._results.append(await call())
        except Exception as error:
            self._error = error.anew() if isinstance(error, ProxyError) else error
        finally:
            self._over.set()


def _spawn(run: Callable[..., Any], *arguments: object) -> None:
    try:
        is_asyncio = asyncio.current_task() is not None
    except RuntimeError:
        is_asyncio = False
    if is_asyncio:
        task = asyncio.get_running_loop().create_task(run(*arguments))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        return
    import trio

    trio.lowlevel.spawn_system_task(run, *arguments, context=copy_context())


async def forwarded_apart(forward: Forward, request: ProxyRequest, *, max_size: int) -> tuple[ProxyResponse, bool]:
    """What `forward` answers with its body at hand, and whether that is all, for a request whose exchange may end
    before: all that is opened on the way is closed here, and nothing of the answer is left to close.

    A body of more than `max_size` bytes is cut off; a stream of events is not read at all.

    Raises:
        ProxyError: what `forward` raised; `UpstreamFailed` where the body was cut.
    """
    apart = replace(request, opened=[], afterwards=[])
    whole = cancelled = False
    try:
        response = await forward(apart)
        apart.opened.append(response)
        if not response.is_event_stream:
            response, _, whole = await held(response, max_size=max_size)
    except UpstreamAborted:
        raise UpstreamFailed() from None
    except anyio.get_cancelled_exc_class():
        cancelled = True
        raise
    finally:
        await ending.close(apart.opened)
        if cancelled:
            # In this task, since an event loop that ends waits for no new one.
            await ending.run(apart.afterwards)
        elif apart.afterwards:
            SharedCall(partial(ending.run, apart.afterwards))
    return ProxyResponse(status=response.status, headers=tuple(response.headers), body=response.body), whole
