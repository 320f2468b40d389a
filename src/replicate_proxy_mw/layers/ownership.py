"""The rule `own_predictions` of a policy: a tenant reaches only what it has created, as far as the store remembers.

What is not its own is answered like what does not exist, without asking Replicate: same text, same way, same time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import anyio

from ..errors import NotOwned, ProxyError, StoreFailed, UpstreamFailed
from ..exchange import Chunks, Forward, Layer, ProxyRequest, ProxyResponse
from ..host_calls import HostFailed, ask
from ..json_bodies import (
    asking_for_plain,
    elements,
    for_one_caller,
    held,
    is_readable,
    members,
    plain_of,
    with_body,
    without_length,
)
from ..store import PredictionStore, StoredPrediction
from ..telemetry.names import STORE_FAILED

T = TypeVar("T")

logger = logging.getLogger("replicate_proxy_mw")

LISTS = frozenset(("predictions.list", "trainings.list", "files.list"))

# Pages of 100 predictions; longer ones cannot be shown at all.
MAX_PAGE = 16 << 20

# No id of Replicate's: written before a create goes up, since a store may read and not write (a replica, a full disk).
PROBE = "-"

# Seconds between attempts to write what a store did not take, while the exchange ends; then with the next requests.
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def own_predictions(*, store: PredictionStore, timeout: float) -> Layer:
    """Keep tenants apart who share an account, where their policy says so.

    Args:
        store: who created what.
        timeout: seconds for each call of the store; then it counts as out of order.
    """
    records = _Records(store, timeout)

    def layer(forward: Forward) -> Forward:
        async def owned(request: ProxyRequest) -> ProxyResponse:
            operation, tenant = request.route.details, request.key.tenant
            if not request.key.policy.own_predictions:
                return await forward(request)
            if operation is None or tenant is None:
                raise NotOwned()
            if operation.creates:
                await records.writable(tenant)
                return await _recorded(request, tenant, forward, records)
            if operation.id in LISTS:
                return await _filtered(request, tenant, forward, records)
            if (id := _id(request)) is None:
                return await forward(request)
            if not await records.own(tenant, [id]):
                raise NotOwned()
            return for_one_caller(await forward(request))

        return owned

    return layer


def _id(request: ProxyRequest) -> str | None:
    params = request.route.params
    return next((params[name] for name in ("prediction_id", "training_id", "file_id") if name in params), None)


async def _recorded(request: ProxyRequest, tenant: str, forward: Forward, records: _Records) -> ProxyResponse:
    """The answer to a create, which leaves once it is known whose the prediction is; and anyway, since it is paid."""
    response = await forward(asking_for_plain(request))
    if not 200 <= response.status < 300:
        return response
    body, rest = await held(response.body)
    id = _created(plain_of(response, body) if rest is None else body)
    if id is None:
        logger.error("own_predictions: an answer to %s has no id; nobody will reach what it made", request.operation)
        request.notes[STORE_FAILED] = True
    elif not await records.write(id, StoredPrediction(tenant=tenant, traceparent=request.traceparent)):
        request.notes[STORE_FAILED] = True
        request.afterwards.append(partial(records.write_later, id))
    return for_one_caller(replace(response, body=Chunks([body], rest)))


def _created(body: bytes | None) -> str | None:
    """The id stands at the top of the object, so that a piece of it may do."""
    try:
        for name, value, _, _ in members((body or b"").decode("utf-8", "replace")):
            if name == "id":
                return value if isinstance(value, str) else None
    except (ValueError, RecursionError):
        pass
    return None


async def _filtered(request: ProxyRequest, tenant: str, forward: Forward, records: _Records) -> ProxyResponse:
    """A page of a list without what is not the tenant's; its links stay."""
    kept = tuple(pair for pair in request.headers if pair[0] not in (b"range", b"if-match"))
    response = await forward(asking_for_plain(replace(request, headers=kept)))
    if not 200 <= response.status < 300:
        return response
    if request.method == "HEAD":
        return for_one_caller(without_length(response))
    page = await _page(response)
    if page is None:
        raise UpstreamFailed("own_predictions: Replicate's list cannot be read, and is not shown unfiltered.")
    own = await records.own(tenant, [one.id for one in page.items if one.id is not None])
    results = ",".join(page.text[one.start : one.end] for one in page.items if one.id in own)
    shown = f"{page.text[: page.start]}[{results}]{page.text[page.end :]}"
    return for_one_caller(with_body(response, shown.encode()))


@dataclass(frozen=True, slots=True)
class _Item:
    start: int
    end: int
    id: str | None


@dataclass(frozen=True, slots=True)
class _Page:
    """A list's text, and where its results stand in it."""

    text: str
    start: int
    end: int
    items: list[_Item]


async def _page(response: ProxyResponse) -> _Page | None:
    if not is_readable(response, max_size=MAX_PAGE):
        return None
    body, rest = await held(response.body, max_size=MAX_PAGE)
    plain = plain_of(response, body, max_size=MAX_PAGE) if rest is None else None
    if plain is None:
        return None
    try:
        text = plain.decode()
        lists = [(start, end) for name, _, start, end in members(text) if name == "results"]
        if len(lists) != 1:
            return None
        [(start, end)] = lists
        items = [_Item(start + first, start + last, _id_of(item)) for item, first, last in elements(text[start:end])]
    except (ValueError, RecursionError):
        return None
    return _Page(text, start, end, items)


def _id_of(item: object) -> str | None:
    id = item.get("id") if isinstance(item, dict) else None
    return id if isinstance(id, str) else None


class _Records:
    """The store, and what it has not taken yet."""

    def __init__(self, store: PredictionStore, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        # No more than there are creates under way when a store fails, since then none go up.
        self._unwritten: dict[str, StoredPrediction] = {}
        self._next_attempt = 0.0

    async def own(self, tenant: str, ids: Collection[str]) -> Collection[str]:
        """Those of `ids` that are the tenant's.

        Raises:
            StoreFailed: it cannot be told.
        """
        await self._catch_up()
        unwritten = {id for id in ids if id in self._unwritten and self._unwritten[id].tenant == tenant}
        if len(unwritten) == len(ids):
            return unwritten
        known = await self._ask(lambda: self._store.get(ids))
        return {id for id in ids if id in unwritten or (id in known and known[id].tenant == tenant)}

    async def writable(self, tenant: str) -> None:
        """Return if what is created now can be recorded.

        Raises:
            StoreFailed: it could not.
        """
        await self._catch_up()
        await self._ask(lambda: self._store.put(PROBE, StoredPrediction(tenant=tenant)))

    async def write(self, id: str, prediction: StoredPrediction) -> bool:
        """Whether it is written; if not, it will be. Even if the caller leaves: the prediction is paid."""
        self._unwritten[id] = prediction
        return await self._put(id, prediction)

    async def write_later(self, id: str) -> None:
        for pause in PAUSES:
            await anyio.sleep(pause)
            prediction = self._unwritten.get(id)
            if prediction is None or await self._put(id, prediction):
                return

    async def _catch_up(self) -> None:
        if not self._unwritten or time.monotonic() < self._next_attempt:
            return
        self._next_attempt = time.monotonic() + PAUSES[-1]
        for id, prediction in list(self._unwritten.items()):
            if not await self._put(id, prediction):
                return

    async def _put(self, id: str, prediction: StoredPrediction) -> bool:
        try:
            await self._ask(lambda: self._store.put(id, prediction), shield=True)
        except StoreFailed:
            return False
        self._unwritten.pop(id, None)
        return True

    async def _ask(self, call: Callable[[], Awaitable[T]], *, shield: bool = False) -> T:
        try:
            return await ask(call, seconds=self._seconds, shield=shield)
        except HostFailed as error:
            failure = error.name
        except ProxyError as error:
            failure = type(error).__name__
        logger.error("prediction store failed: %s", failure)
        raise StoreFailed()
