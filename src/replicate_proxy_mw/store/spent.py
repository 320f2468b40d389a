"""What was spent on a day, in counters: what is reserved for a run is replaced by its cost, once, in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from limits.aio.storage import Storage

from .counters import Counters

DAY = 86400
MILLION = 1_000_000

# Of a currency: sums of such stay within the 64 bits that Redis counts with.
MAX_AMOUNT = 1_000_000_000

# A run's counter has one for each create that was answered with it, and so many for each time its end was claimed.
_ENDED = 1 << 32


@dataclass(slots=True)
class Hold:
    """What a create counts as.

    Attributes:
        who: in whose counters.
        day: since the epoch, on which it counts; None if it does not.
        kept: whether there may be a run.
    """

    who: str
    day: int | None = None
    kept: bool = False


class Spent:
    """Counts amounts in millionths. Every method is one call of the storage, with its time limit.

    A counter of a day ends two days after its beginning, those of a run a day after its creation: its own day is over.

    Args:
        counters: where.
        reserve: what a run counts as until its end is counted, and after it where its cost is not known.
    """

    def __init__(self, counters: Counters, *, reserve: int) -> None:
        self._counters, self._reserve = counters, reserve

    async def on(self, who: str, day: int) -> int:
        return max(0, await self._counters.call(lambda storage: storage.get(_day(who, day))))

    async def take(self, hold: Hold, day: int) -> tuple[int, int]:
        """Reserve for a create, and return what there was before and after: it is counted first and compared then, so
        that of many at once no more pass than there is room for."""

        async def take(storage: Storage) -> int:
            if not self._reserve:
                return await storage.get(_day(hold.who, day))
            return await storage.incr(_day(hold.who, day), 2 * DAY, self._reserve)

        # Even if the caller leaves: what was counted has to be known.
        after = await self._counters.call(take, shield=True)
        hold.day = day
        return after - self._reserve, after

    async def move(self, hold: Hold, day: int | None) -> None:
        """Have `hold` count on that day, and on no other."""
        await self._counters.call(lambda storage: self._move(storage, hold, day))

    async def created(self, hold: Hold, id: str, day: int) -> None:
        """Have `hold` count for the run `id`, created on `day`."""

        async def created(storage: Storage) -> None:
            # Whose it is first: who finds that it was created here asks for that.
            await storage.incr(_run(id, hold.who), DAY)
            marks = await storage.incr(_run(id), DAY)
            # Else it is an earlier run that is answered anew, or its end is counted already.
            await self._move(storage, hold, day if marks == 1 else None)

        await self._counters.call(created)

    async def is_to_count(self, who: str, id: str) -> bool:
        """Whether the end of the run `id`, which `who` has seen, is to be counted: not yet, and no other created it."""

        async def is_to_count(storage: Storage) -> bool:
            marks = await storage.get(_run(id))
            return marks < _ENDED and (not marks or await storage.get(_run(id, who)) > 0)

        return await self._counters.call(is_to_count)

    async def ended(self, who: str, id: str, day: int, amount: int | None, *, dated: bool) -> None:
        """Count `amount`, None if unknown, for the run `id`, for the first who asks. `dated`: `day` is what `created`
        was told."""

        async def ended(storage: Storage) -> None:
            marks = await storage.incr(_run(id), DAY, _ENDED)
            if marks < 2 * _ENDED:
                reserved = self._reserve if marks > _ENDED and dated else 0
                await self._add(storage, who, day, (self._reserve if amount is None else amount) - reserved)

        await self._counters.call(ended, shield=True)

    async def _move(self, storage: Storage, hold: Hold, day: int | None) -> None:
        before = hold.day
        if day == before:
            return
        if day is not None:
            await self._add(storage, hold.who, day, self._reserve)
        hold.day = day
        if before is not None:
            await self._add(storage, hold.who, before, -self._reserve)

    async def _add(self, storage: Storage, who: str, day: int, amount: int) -> None:
        if amount:
            await storage.incr(_day(who, day), 2 * DAY, amount)


def _day(who: str, day: int) -> str:
    return f"replicate_proxy/spent/{who}/{day}"


def _run(id: str, who: str = "") -> str:
    return f"replicate_proxy/run/{id}/{who}"


def millionths(name: str, amount: float) -> int:
    """What `amount` is counted as: rounded up, but for the dust of floats.

    Raises:
        ValueError: it is no amount; the text begins with `name`.
    """
    if type(amount) not in (int, float) or not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(f"{name}: must be a number of at least 0 and at most {MAX_AMOUNT}")
    return math.ceil(round(amount * MILLION, 3))


def limit_of(name: str, amount: float | None, *, reserve: float) -> int | None:
    """What `amount` is counted as for a limit, None for no limit.

    Raises:
        ValueError: it is no amount, or nothing could ever be reserved; the text begins with `name`.
    """
    limit = None if amount is None else millionths(name, amount)
    if limit and limit < millionths("reserve", reserve):
        raise ValueError(f"{name}: is less than reserve, so that nothing could ever be created; 0 says so")
    return limit


def shown(amount: int) -> str:
    return f"{max(0, amount) / MILLION:.6f}".rstrip("0").rstrip(".")
