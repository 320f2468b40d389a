"""What is done when an exchange ends: what it opened is closed, and layers do what they have left for then."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio

from .exchange import AtOnce, Opened

logger = logging.getLogger("replicate_proxy_mw")

# Seconds for what layers have to do when the answer is out: servers that stop give about as long.
AFTERWARDS_TIMEOUT = 10.0

# Seconds for closing an upstream connection when everything else has ended: it must not hold up the host.
CLOSE_TIMEOUT = 1.0


async def close(opened: Sequence[Opened]) -> None:
    """Close the last first, even if the request is cancelled."""
    remaining: list[Opened] = []
    for one in reversed(opened):
        if isinstance(one, AtOnce):
            _close_at_once(one)
        else:
            remaining.insert(0, one)
    while remaining:
        # Anew after one that hangs, since the others have connections, too.
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
            while remaining:
                try:
                    await remaining.pop().aclose()
                except Exception as error:  # the answer is complete, or something else is on its way out
                    _tell(error)


def _close_at_once(one: AtOnce) -> None:
    try:
        one.close()
    except Exception as error:
        _tell(error)


def _tell(error: Exception) -> None:
    logger.warning("closing an answer failed: %s", type(error).__name__)


async def run(afterwards: Sequence[Callable[[], Awaitable[None]]]) -> None:
    if afterwards:
        with anyio.move_on_after(AFTERWARDS_TIMEOUT, shield=True):
            for afterward in afterwards:
                try:
                    await afterward()
                except Exception as error:  # the answer is out, or something else is on its way
                    logger.warning("what a layer does afterwards failed: %s", type(error).__name__)
