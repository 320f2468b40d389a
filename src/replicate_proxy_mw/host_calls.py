"""Calls of what a host provides, resolvers and stores: bounded in time, and told by class name when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from .errors import ProxyError

T = TypeVar("T")


class HostFailed(Exception):
    """`name` is the class of what was raised. No more: exception texts may hold secrets."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def failure_of(error: Exception) -> str:
    """What a log may say of what `ask` raised."""
    return error.name if isinstance(error, HostFailed) else type(error).__name__


async def ask(call: Callable[[], Awaitable[T]], *, seconds: float, shield: bool = False) -> T:
    """What `call` returns.

    Args:
        call: it is cancelled after so many `seconds`.
        shield: whether it goes on until then even if the request is cancelled.

    Raises:
        ProxyError: what `call` raised of that tree, such as `PermissionDenied`.
        HostFailed: it raised something else, took too long, or was cancelled by something that it waited for.
    """
    try:
        with anyio.fail_after(seconds, shield=shield):
            return await call()
    except ProxyError:
        raise
    except anyio.get_cancelled_exc_class() as error:
        if _cancelled():
            raise
        name = type(error).__name__
    except Exception as error:
        name = type(error).__name__
    raise HostFailed(name)


def _cancelled() -> bool:
    """Whether it is us who are cancelled, and not just a task that `call` waited for (asyncio knows both)."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0
