"""Creates with an `Idempotency-Key`: the store, bounded in time, and what it has not taken yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat

import anyio

from ..errors import ProxyError, StoreFailed
from ..host_calls import HostFailed, ask, failure_of
from ..sharing import SharedCall
from .ledger import PAID_TIMEOUT, PAUSES
from .once import KeyedCreate, OnceStore

logger = logging.getLogger("replicate_proxy_mw")

# Seconds between attempts after `PAUSES`, for what was not sent: until it is taken back, its key is burnt. The last one
# again and again.
LONG_PAUSES = (6.4, 12.8, 25.6)

# Keys that are waited for so long, at a time: a store that is out of order for hours has more.
MAX_TAKEN_BACK = 1000


class KeyedCreates:
    """Remembers creates, each from before it is sent.

    Args:
        store: what was begun.
        lifetime: seconds for which it is remembered.
        timeout: seconds for each call of the store; then it counts as out of order.
    """

    def __init__(self, store: OnceStore, *, lifetime: float, timeout: float) -> None:
        self._store, self._lifetime, self._timeout = store, lifetime, timeout
        self._taken_back = 0

    async def begin(self, key: str, create: KeyedCreate) -> KeyedCreate | None:
        """What was begun with `key` before; None if that is `create` now, and then the caller is the one to send it:
        there is no pause in which it could be cancelled after that is known.

        Raises:
            StoreFailed: it cannot be told.
        """
        try:
            return await ask(lambda: self._store.begin(key, create, self._lifetime), seconds=self._timeout, shield=True)
        except BaseException as error:
            # The store may have taken note of it, or will when it is in order again, and it is not sent.
            SharedCall(partial(self._take_back, key, create), to_the_end=True)
            if not isinstance(error, (HostFailed, ProxyError)):
                raise
            failure = failure_of(error)
        logger.error("the store of Idempotency-Keys failed: %s", failure)
        raise StoreFailed("Idempotency-Key: what was sent with it could not be looked up; nothing was sent, try again.")

    async def _take_back(self, key: str, create: KeyedCreate) -> None:
        is_one_of_few, is_forgotten = self._taken_back < MAX_TAKEN_BACK, False
        self._taken_back += 1
        try:
            with anyio.move_on_after(self._lifetime):
                for pause in chain(PAUSES, LONG_PAUSES, repeat(LONG_PAUSES[-1])) if is_one_of_few else PAUSES:
                    await anyio.sleep(pause)
                    was_forgotten, is_forgotten = is_forgotten, await self.write(key, create, None)
                    # Twice, since a store that was frozen may get to it before it gets to what it is to forget.
                    if was_forgotten and is_forgotten:
                        return
        finally:
            self._taken_back -= 1
        logger.error("the store of Idempotency-Keys did not take back a create that was not sent; its key is burnt")

    async def settle(
        self, key: str, create: KeyedCreate, ended: KeyedCreate | None, then: Callable[[], object]
    ) -> None:
        """As `write`, or later if that fails; call `then` when the store knows, or will not."""
        if await self.write(key, create, ended):
            then()
        else:
            SharedCall(partial(self.write_later, key, create, ended, then), to_the_end=True)

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

    async def write_later(
        self, key: str, create: KeyedCreate, ended: KeyedCreate | None, then: Callable[[], object]
    ) -> None:
        for pause in PAUSES:
            await anyio.sleep(pause)
            if await self.write(key, create, ended):
                break
        else:
            logger.error("the store of Idempotency-Keys did not take what came of a create")
        then()
