"""Creates with an `Idempotency-Key`: the store, bounded in time, and what it has not taken yet."""

from __future__ import annotations

import logging
from functools import partial

import anyio

from ..errors import ProxyError, StoreFailed
from ..host_calls import HostFailed, ask
from ..sharing import SharedCall
from .once import KeyedCreate, OnceStore

logger = logging.getLogger("replicate_proxy_mw")

# Seconds that an answer which is paid waits to be recorded, as for the prediction store.
PAID_TIMEOUT = 0.4

# Seconds between attempts to write what the store did not take.
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class KeyedCreates:
    """Remembers creates, each from before it is sent.

    Args:
        store: what was begun.
        lifetime: seconds for which it is remembered.
        timeout: seconds for each call of the store; then it counts as out of order.
    """

    def __init__(self, store: OnceStore, *, lifetime: float, timeout: float) -> None:
        self._store, self._lifetime, self._timeout = store, lifetime, timeout

    async def begin(self, key: str, create: KeyedCreate) -> KeyedCreate | None:
        """What was begun with `key` before; None if that is `create` now, and then the caller is the one to send it:
        there is no pause in which it could be cancelled after that is known.

        Raises:
            StoreFailed: it cannot be told.
        """
        try:
            return await ask(lambda: self._store.begin(key, create, self._lifetime), seconds=self._timeout, shield=True)
        except BaseException as error:
            # The store may have taken note of it, and it is not sent.
            SharedCall(partial(self.write_later, key, create, None), to_the_end=True)
            if not isinstance(error, (HostFailed, ProxyError)):
                raise
            failure = error.name if isinstance(error, HostFailed) else type(error).__name__
        logger.error("the store of Idempotency-Keys failed: %s", failure)
        raise StoreFailed("Idempotency-Key: what was sent with it could not be looked up; nothing was sent, try again.")

    async def write(self, key: str, create: KeyedCreate, ended: KeyedCreate | None) -> bool:
        """Whether the store knows now what came of `create`: `ended`, or nothing at all."""
        seconds = min(self._timeout, PAID_TIMEOUT)
        try:
            if ended is None:
                await ask(lambda: self._store.forget(key, create.mark), seconds=seconds)
            else:
                await ask(lambda: self._store.end(key, ended, self._lifetime), seconds=seconds)
        except (HostFailed, ProxyError):
            return False
        return True

    async def write_later(self, key: str, create: KeyedCreate, ended: KeyedCreate | None) -> None:
        for pause in PAUSES:
            await anyio.sleep(pause)
            if await self.write(key, create, ended):
                return
        logger.error("the store of Idempotency-Keys did not take what came of a create")
