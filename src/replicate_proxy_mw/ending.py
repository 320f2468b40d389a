"""What is done when an exchange ends: what it opened is closed, and layers do what they have left for then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio

from .event_loops import asyncio_task
from .exchange import AtOnce, Opened

logger = logging.getLogger("replicate_proxy_mw")

# Seconds for what layers have to do when the answer is out: servers that stop give about as long.
AFTERWARDS_TIMEOUT = 10.0

# Seconds for closing an upstream connection when everything else has ended: it must not hold up the host.
CLOSE_TIMEOUT = 1.0


# An event loop keeps no task alive that nobody refers to.
_closing: set[asyncio.Task[None]] = set()


async def close(opened: Sequence[Opened]) -> None:
    """Close the last first, even if the request is cancelled, and that again."""
    waiting = []
    for one in reversed(opened):
        if isinstance(one, AtOnce):
            _close_at_once(one)
        else:
            waiting.append(one)
    if not waiting:
        return
    closing = _close(waiting[::-1])
    if asyncio_task() is None:
        await closing
        return
    # A task may be cancelled by asyncio as often as anybody likes: anyio's shields hold off anyio alone.
    task = asyncio.get_running_loop().create_task(closing)
    _closing.add(task)
    task.add_done_callback(_closing.discard)
    with anyio.CancelScope(shield=True):
        await asyncio.shield(task)


def _close_at_once(one: AtOnce) -> None:
    try:
        one.close()
    except Exception as error:  # as in `_close`
        logger.warning("closing an answer failed: %s", type(error).__name__)


async def _close(remaining: list[Opened]) -> None:
    while remaining:
        # Anew after one that hangs, since the others have connections, too.
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
            while remaining:
                try:
                    await remaining.pop().aclose()
                except Exception as error:  # the answer is complete, or something else is on its way out
                    logger.warning("closing an answer failed: %s", type(error).__name__)


async def run(afterwards: Sequence[Callable[[], Awaitable[None]]]) -> None:
    if afterwards:
        with anyio.move_on_after(AFTERWARDS_TIMEOUT, shield=True):
            for afterward in afterwards:
                try:
                    await afterward()
                except Exception as error:  # the answer is out, or something else is on its way
                    logger.warning("what a layer does afterwards failed: %s", type(error).__name__)
