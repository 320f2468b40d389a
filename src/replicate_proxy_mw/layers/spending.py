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
from ..store.spent import DAY, MAX_AMOUNT, MILLION, Hold, Spent, limit_of, millionths, shown
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

    They are answered 402 (`spend_limit_reached`) with the reason and `retry-after`, and nothing goes up. So is a POST
    that Replicate's API is not known to have: it may be another spelling of a create. Nothing else is refused, ever. A
    key without a tenant has a limit of its own.

    A run counts once, on the day of its creation, at the price it has when its end is first read in the answer to a
    create, a poll or a cancel; for the tenant that created it, or the one that reads it if it was not created here.
    What has no price counts as `reserve`, and so does an end that is never read so: of a run that is streamed or listed
    alone, or told of by webhook alone, unless the host hands it to `SpendingLimit.count`. List guardrails, and what
    answers without Replicate, before this layer.

    What is reserved for a create whose answer was not read, since the caller had left or it was cut, counts until the
    day is over: nobody knows whose run it is for. If the end of such a run is read later, its cost counts as well.

    Args:
        per_day: what a tenant may spend in a day, in `currency`. None is no limit; it is counted all the same.
        prices: as the middleware's; rates in another currency are none.
        tenants: other limits for some tenants, by name.
        reserve: what a create counts as from before it goes up until its end is read, in `currency`; what surely
            created nothing counts as nothing. A create passes if that and what is spent or reserved are no more than
            `per_day`. So give what a run costs at most: with 0, any number may be under way when the limit is reached.
        currency: of all amounts here, ISO 4217.
        storage: as for `limit_requests`. By default memory: about 850 bytes for each run of a day, of the last 100,000.
            Redis has about 380 bytes for each run of a day, and is asked once before a create and twice after it, four
            times after an end is read, once after it is read again.
        fail_open: whether creates pass while the storage fails or hangs; by default they are answered 503
            (`store_failed`), and nothing goes up. All else passes in any case. What ends meanwhile counts when it is
            read again afterwards, else as `reserve`.
        timeout: seconds for each call of the storage, once it is asked: 50 calls go at a time. 0.5: many times what a
            Redis nearby needs. No answer waits for what is counted after it.
        now: seconds since the epoch.

    Raises:
        ValueError: names the option and what is wrong with it. A storage that would hold up the event loop is refused.
    """
    Rates(per_run=0, currency=currency)  # raises for what is no currency
    counters = Counters("limit_spending", storage, timeout=timeout, now=now)
    limits: dict[str | None, int | None] = {None: limit_of("per_day", per_day, reserve=reserve)}
    limits |= {
        name: limit_of(f"tenants: {name!r}", amount, reserve=reserve) for name, amount in (tenants or {}).items()
    }
    return SpendingLimit(
        limits=limits,
        prices=PriceList(prices, timeout=PRICES_TIMEOUT),
        currency=currency,
        spent=Spent(counters, reserve=millionths("reserve", reserve)),
        fail_open=fail_open,
        now=now,
    )


class SpendingLimit:
    """The layer; made by `limit_spending`."""

    def __init__(
        self,
        *,
        limits: Mapping[str | None, int | None],
        prices: PriceList,
        currency: str,
        spent: Spent,
        fail_open: bool,
        now: Callable[[], float],
    ) -> None:
        self._limits, self._prices, self._currency = limits, prices, currency
        self._spent, self._fail_open, self._now = spent, fail_open, now

    def __call__(self, forward: Forward) -> Forward:
        async def limited(request: ProxyRequest) -> ProxyResponse:
            about = request.route.details
            if about is None and request.method == "POST":
                # Another spelling may be read as a create behind us.
                return await self._create("prediction", request, forward)
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
        hold = Hold(owner(request.key))
        request.afterwards.append(partial(self._give_back, hold))
        await self._take(hold, self._limits.get(request.key.tenant, self._limits[None]))
        await checkpoint_if_cancelled()  # which `_take` is not
        hold.kept = True
        try:
            response = await forward(asking_for_plain(request))
        except ProxyError as error:
            hold.kept = _may_run(error.status) and not isinstance(error, (UpstreamUnreachable, Overloaded))
            raise
        hold.kept = _may_run(response.status)
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


def _may_run(status: int) -> bool:
    """Whether there may be a run after such an answer to a create."""
    return not 400 <= status < 500 or status in _MAY_RUN
