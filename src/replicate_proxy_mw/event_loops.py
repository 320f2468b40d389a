"""Which kind of event loop runs us, and what each has of its own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from uuid import uuid4

from anyio.lowlevel import RunVar

T = TypeVar("T")


def asyncio_task() -> asyncio.Task[Any] | None:
    """The task that is running, None off asyncio (and where trio is asyncio's guest)."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class OfLoop(Generic[T]):
    """One value for each event loop, made when it is first asked for: events wake only those of their own loop.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # anyio before 4.10 tells variables apart by name alone.
        self._value: RunVar[T | None] = RunVar(f"replicate_proxy_mw.{uuid4()}", None)
        # Of the last loop that asked, as a rule the only one: anyio takes as long to look as a whole step of ours.
        self._last: tuple[weakref.ref[asyncio.AbstractEventLoop], T] | None = None

    def get(self) -> T:
        task, last = asyncio_task(), self._last
        if task is not None and last is not None and last[0]() is task.get_loop():
            return last[1]
        value = self._value.get()
        if value is None:
            value = self._make()
            self._value.set(value)
        if task is not None:
            self._last = weakref.ref(task.get_loop()), value
        return value

    def take(self) -> T | None:
        """This loop's value, which it has then no more; None if it was never asked for."""
        value = self._value.get()
        self._value.set(None)
        self._last = None
        return value
