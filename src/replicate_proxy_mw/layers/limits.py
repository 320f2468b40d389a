"""Requests of a tenant in a time: what is too many is answered 429 here, and Replicate hears nothing of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypedDict

from limits import RateLimitItem, parse_many
from limits.aio.storage import Storage
from limits.aio.strategies import MovingWindowRateLimiter

from ..errors import LimitExceeded, StoreFailed
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..store.counters import Counters, owner

# Each request is remembered for the time of its limit.
MAX_AMOUNT = 1_000_000

# Seconds without counting after the storage has failed: not every request is to wait for it.
_REST = 1.0

_KINDS = {"creates": "creates", "others": "other requests"}


class TenantLimits(TypedDict, total=False):
    """Limits of one tenant; what is absent is as for all others, and None is no limit."""

    creates: str | None
    others: str | None


def limit_requests(
    *,
    creates: str | None = "600/minute",
    others: str | None = "3000/minute",
    tenants: Mapping[str, TenantLimits] | None = None,
    storage: Storage | None = None,
    fail_open: bool = True,
    timeout: float = 0.5,
    now: Callable[[], float] = time.time,
) -> Layer:
    """Let no more requests of a tenant pass than allowed, in any stretch of time as long as the limit's.

    One more is answered 429 (`limit_exceeded`) with `retry-after`, `ratelimit-limit`, `ratelimit-remaining` and
    `ratelimit-reset` (both times in seconds), and nothing goes up. Answers of Replicate's keep its own `ratelimit-*`.
    A key without a tenant has limits of its own. What a layer before this one answers is not counted, and what is
    refused is not, either, but against limits of the same kind with a shorter time.

    Args:
        creates: limit of requests that create a prediction or training, as the package `limits` writes them:
            `60/minute`, or several as `10/second;1000/day`. None is no limit. A POST that Replicate's API is not known
            to have counts as one, since it may be another spelling. By default what Replicate allows an account.
        others: limit of all other requests, uploads of files too. By default what Replicate allows an account.
        tenants: other limits for some tenants, by name: `{"team-a": {"creates": "60/minute"}}`.
        storage: where requests are counted. By default in the memory of this process, on any event loop, about 35 bytes
            for each request within the time of a limit. Several processes share a Redis,
            `limits.aio.storage.RedisStorage("async+redis://…", implementation="redispy")`, under asyncio; it stays the
            host's to close, and has to allow 50 connections. That is one round trip for each limit and request, by the
            clocks of the processes, and 22 bytes for each request within the time of a limit.
        fail_open: what becomes of requests while the storage fails or hangs: they pass uncounted, since Replicate has
            a limit, too, and for a second after a failure none waits for it. If False, they are answered 503
            (`store_failed`), and nothing goes up.
        timeout: seconds for the storage, from the moment that it is asked: of many requests at once, 50 ask it at a
            time. 0.5: many times what a Redis nearby needs.
        now: seconds since the epoch, for what is counted in memory.

    Raises:
        ValueError: names the option and what is wrong with it. A storage that would hold up the event loop is refused.
    """
    for_all = {"creates": _parsed("creates", creates), "others": _parsed("others", others)}
    of_tenants: dict[str | None, dict[str, list[RateLimitItem]]] = {
        tenant: for_all | _parsed_all(tenant, given) for tenant, given in (tenants or {}).items()
    }
    counters = Counters("limit_requests", storage, timeout=timeout, rest=_REST if fail_open else 0.0, now=now)
    limiter = MovingWindowRateLimiter(counters.storage)

    def layer(forward: Forward) -> Forward:
        async def limited(request: ProxyRequest) -> ProxyResponse:
            about, tenant = request.route.details, request.key.tenant
            # Another spelling may be read as a create behind us.
            is_create = request.method == "POST" if about is None else about.creates in ("prediction", "training")
            kind = "creates" if is_create else "others"
            items = of_tenants.get(tenant, for_all)[kind]
            if not items:
                return await forward(request)
            identifiers = "replicate_proxy", kind, owner(request.key)
            try:
                reached = await counters.call(lambda _: _count(limiter, items, identifiers))
            except StoreFailed:
                if not fail_open:
                    raise
                reached = None
            if reached is not None:
                raise _refusal(*reached, kind=kind, whose="key" if tenant is None else "tenant", now=now())
            return await forward(request)

        return limited

    return layer


def _parsed_all(tenant: str, given: TenantLimits) -> dict[str, list[RateLimitItem]]:
    if not isinstance(given, Mapping) or not given.keys() <= _KINDS.keys():
        raise ValueError(f"tenants: {tenant!r} needs a mapping with 'creates', 'others' or both")
    return {kind: _parsed(f"tenants: {tenant!r}: {kind}", given.get(kind)) for kind in given}


def _parsed(name: str, text: object) -> list[RateLimitItem]:
    """The shortest first, so that what it refuses does not count for the day."""
    if text is None:
        return []
    try:
        items = list(dict.fromkeys(parse_many(text))) if isinstance(text, str) else []
    except ValueError:
        items = []
    if not items or not all(1 <= item.amount <= MAX_AMOUNT for item in items):
        raise ValueError(f"{name}: must be like '600/minute' or '10/second;1000/day', of 1 to {MAX_AMOUNT} requests")
    return sorted(items, key=lambda item: item.get_expiry())


async def _count(
    limiter: MovingWindowRateLimiter, items: list[RateLimitItem], identifiers: tuple[str, ...]
) -> tuple[RateLimitItem, float] | None:
    """Count one more; else the limit that is reached, and when there is room again."""
    for item in items:
        if not await limiter.hit(item, *identifiers):
            return item, (await limiter.get_window_stats(item, *identifiers)).reset_time
    return None


def _refusal(item: RateLimitItem, reset: float, *, kind: str, whose: str, now: float) -> LimitExceeded:
    # It is a moment past that time that there is room, and clocks may differ.
    seconds = min(max(1, math.floor(reset - now) + 1), item.get_expiry())
    span = f"{item.multiples} {item.GRANULARITY.name}s" if item.multiples > 1 else item.GRANULARITY.name
    return LimitExceeded(
        f"limit_requests: {item.amount} {_KINDS[kind]} per {span} is what this {whose} may make; "
        f"try again in {seconds} s.",
        retry_after=seconds,
        headers=(
            (b"ratelimit-limit", str(item.amount).encode()),
            (b"ratelimit-remaining", b"0"),
            (b"ratelimit-reset", str(seconds).encode()),
        ),
    )
