"""What a tenant spends in a day, by the estimated cost of its predictions and trainings, and a limit on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from anyio.lowlevel import checkpoint_if_cancelled
from limits.aio.storage import Storage

from ..errors import Overloaded, ProxyError, SpendLimitReached, StoreFailed, UpstreamUnreachable
from ..exchange import Forward, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for_plain, held, is_readable, plain_of
from ..keys import ReplicateKey
from ..store.counters import Counters, of_tenant, owner
from ..store.spent import DAY, MAX_AMOUNT, MILLION, Hold, Spent, millionths, shown
from ..telemetry.prediction import Kind, Prediction, of, read
from ..telemetry.prices import PriceList, Prices, Rates

# Seconds for a host's own prices: the answer has left, and nobody waits.
PRICES_TIMEOUT = 2.0

# Too late, asked twice, denied for its output, or left: there may be a run all the same.
_MAY_RUN = frozenset((408, 409, 446, 499))


def limit_spending(
    *,
    per_day: float | None,
    prices: Prices,
    tenants: Mapping[str, float | None] | None = None,
    reserve: float = 0.0,
    currency: str = "USD",
    storage: Storage | None = None,
    fail_open: bool = False,
    timeout: float = 0.5,
    now: Callable[[], float] = time.time,
) -> SpendingLimit:
    """Refuse new predictions and trainings of a tenant that has spent what it may in a day (UTC).

    They are answered 402 (`spend_limit_reached`) with the reason and `retry-after`, and nothing goes up. Nothing else
    is refused, ever. A key without a tenant has a limit of its own.

    A run counts once, at the price it has when its end is first read through the proxy, singly: in the answer to a
    create, a poll or a cancel. It counts for the tenant that created it, or, of one that was not created here, for the
    one that reads it; on the day of its creation. An end that is never read so (of a run that is told of by webhook
    alone, streamed alone, or listed alone) counts as `reserve`, unless the host hands it to `SpendingLimit.count`. So
    does what has no price; rates by run or output have none for a run that failed. List guardrails, and what answers
    without Replicate, before this layer.

    Args:
        per_day: what a tenant may spend in a day, in `currency`. None is no limit; it is counted all the same.
        prices: as the middleware's; rates in another currency are none.
        tenants: other limits for some tenants, by name.
        reserve: what a create counts as from before it goes up until its end is read, in `currency`; what surely
            created nothing counts as nothing. A create passes only if what has been spent, and this for itself and
            for each run whose end has not been read, are no more than `per_day`. So give what a run costs at most:
            with the default of 0, any number may be under way when the limit is reached.
        currency: of all amounts here, ISO 4217.
        storage: where amounts are counted. By default in the memory of this process, on any event loop: about 850 bytes
            for each run of a day, of the last 100,000 runs. Several processes share a Redis,
            `limits.aio.storage.RedisStorage("async+redis://…", implementation="redispy")`, under asyncio; it stays the
            host's to close, and has to allow 50 connections. That is one round trip before a create and two after it,
            four after an end is read, one after it is read again, and about 380 bytes for each run of a day.
        fail_open: what becomes of creates while the storage fails or hangs: by default they are answered 503
            (`store_failed`), and nothing goes up. If True, they pass. All else passes in any case. What ends meanwhile
            counts when it is read again afterwards, else as `reserve`; nothing ever counts twice.
        timeout: seconds for each call of the storage. 0.5: many times what a Redis nearby needs. Counting begins when
            an answer has left, so that no answer waits for it.
        now: seconds since the epoch.

    Raises:
        ValueError: names the option and what is wrong with it. A storage that would hold up the event loop is refused.
    """
    Rates(per_run=0, currency=currency)  # raises for what is no currency
    counters = Counters("limit_spending", storage, timeout=timeout, now=now)
    limits = {name: _limit(f"tenants: {name!r}", amount, reserve) for name, amount in (tenants or {}).items()}
    return SpendingLimit(
        limit=_limit("per_day", per_day, reserve),
        limits=limits,
        prices=PriceList(prices, timeout=PRICES_TIMEOUT),
        currency=currency,
        spent=Spent(counters, reserve=millionths("reserve", reserve)),
        fail_open=fail_open,
        now=now,
    )


def _limit(name: str, amount: float | None, reserve: float) -> int | None:
    limit = None if amount is None else millionths(name, amount)
    if limit and limit < millionths("reserve", reserve):
        raise ValueError(f"{name}: is less than reserve, so that nothing could ever be created; 0 says so")
    return limit


class SpendingLimit:
    """The layer; made by `limit_spending`."""

    def __init__(
        self,
        *,
        limit: int | None,
        limits: Mapping[str, int | None],
        prices: PriceList,
        currency: str,
        spent: Spent,
        fail_open: bool,
        now: Callable[[], float],
    ) -> None:
        self._limit, self._limits, self._prices, self._currency = limit, limits, prices, currency
        self._spent, self._fail_open, self._now = spent, fail_open, now

    def __call__(self, forward: Forward) -> Forward:
        async def limited(request: ProxyRequest) -> ProxyResponse:
            about = request.route.details
            kind = None if about is None else about.creates or about.reads
            if about is None or kind is None or kind == "file":
                return await forward(request)
            if about.creates:
                return await self._create(kind, request, forward)
            return await self._seen(kind, request, await forward(asking_for_plain(request)), None)

        return limited

    async def spent(self, tenant: str) -> float:
        """What `tenant` has spent today (UTC), what is reserved included, in the currency.

        Raises:
            StoreFailed: the storage failed or took too long.
        """
        return await self._spent.on(of_tenant(tenant), self._today()) / MILLION

    async def count(self, payload: Mapping[str, Any], *, tenant: str) -> None:
        """Count a run of `tenant` whose end the host was told of, as by `WebhookEvent.prediction`. What has not ended
        and what is counted already changes nothing, so that it may be called twice.

        Raises:
            StoreFailed: the storage failed or took too long. Let it out of `on_webhook`: Replicate tries again.
        """
        urls = payload.get("urls")
        is_training = isinstance(urls, dict) and "/trainings/" in str(urls.get("get"))
        run = of(payload, "training" if is_training else "prediction")
        if run is not None:
            await self._end(of_tenant(tenant), tenant, run)

    async def _create(self, kind: Kind, request: ProxyRequest, forward: Forward) -> ProxyResponse:
        tenant, hold = request.key.tenant, Hold(owner(request.key))
        request.afterwards.append(partial(self._give_back, hold))
        await self._take(hold, self._limit if tenant is None else self._limits.get(tenant, self._limit))
        await checkpoint_if_cancelled()
        hold.kept = True
        try:
            response = await forward(asking_for_plain(request))
        except ProxyError as error:
            unsent = isinstance(error, (UpstreamUnreachable, Overloaded))
            hold.kept = not unsent and (error.status >= 500 or error.status in _MAY_RUN)
            raise
        hold.kept = not 400 <= response.status < 500 or response.status in _MAY_RUN
        return await self._seen(kind, request, response, hold)

    async def _take(self, hold: Hold, limit: int | None) -> None:
        day = self._today()
        try:
            before, after = await self._spent.take(hold, day)
        except StoreFailed:
            if not self._fail_open:
                raise
            return
        if limit is not None and (before >= limit or after > limit):
            end = (day + 1) * DAY
            raise SpendLimitReached(
                f"limit_spending: {shown(before)} of {shown(limit)} {self._currency} a day are spent or reserved; "
                f"nothing was created. There is room again by {datetime.fromtimestamp(end, UTC):%Y-%m-%dT%H:%M:%SZ}.",
                headers=((b"retry-after", str(max(1, math.ceil(end - self._now()))).encode()),),
            )

    async def _give_back(self, hold: Hold) -> None:
        if not hold.kept:
            with suppress(StoreFailed):  # it is logged, and counts until the day ends
                await self._spent.move(hold, None)

    async def _seen(
        self, kind: Kind, request: ProxyRequest, response: ProxyResponse, hold: Hold | None
    ) -> ProxyResponse:
        """Have what `response` tells counted when it has left."""
        if is_readable(response):
            response, body, whole = await held(response)
            if whole:
                request.afterwards.append(partial(self._settle, kind, request.key, response, body, hold))
        return response

    async def _settle(
        self, kind: Kind, key: ReplicateKey, response: ProxyResponse, body: bytes, hold: Hold | None
    ) -> None:
        plain = plain_of(response, body)
        run = None if plain is None else read(plain, kind)
        if run is None:
            return
        with suppress(StoreFailed):
            if hold is not None:
                await self._spent.created(hold, run.id, self._day(run))
            await self._end(owner(key), key.tenant, run)

    async def _end(self, who: str, tenant: str | None, run: Prediction) -> None:
        if not run.is_final or not await self._spent.is_to_count(who, run.id):
            return
        cost = await self._prices.estimate(run, tenant=tenant)
        amount = None
        if cost is not None and cost.currency == self._currency:
            amount = millionths("cost", min(cost.amount, MAX_AMOUNT))
        await self._spent.ended(who, run.id, self._day(run), amount, dated=run.created_at is not None)

    def _day(self, run: Prediction) -> int:
        return self._today() if run.created_at is None else int(run.created_at // DAY)

    def _today(self) -> int:
        return int(self._now() // DAY)
