"""The rule `own_predictions` of a policy: a tenant reaches only what it has created, as far as the store remembers.

What is not its own is answered like what does not exist, without asking Replicate: same text, same way, same time.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import NotOwned, UpstreamFailed
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse, where
from ..json_bodies import (
    asking_for_plain,
    elements,
    held,
    is_readable,
    members,
    plain_of,
    with_body,
    without_length,
)
from ..store import Ledger

LISTS = frozenset(("predictions.list", "trainings.list", "files.list"))

# Pages of 100 predictions; longer ones cannot be shown at all.
MAX_PAGE = 16 << 20


def own_predictions(ledger: Ledger) -> Layer:
    """Keep tenants apart who share an account, where their policy says so."""

    def layer(forward: Forward) -> Forward:
        async def owned(request: ProxyRequest) -> ProxyResponse:
            operation, tenant = request.route.details, request.key.tenant
            if operation is None or tenant is None:
                raise NotOwned()
            if operation.creates:
                await ledger.writable()
                return await forward(request)
            if operation.id in LISTS:
                return await _filtered(request, tenant, forward, ledger)
            if (id := _id(request)) is None:
                return await forward(request)
            if not await ledger.own(tenant, [id]):
                raise NotOwned()
            return await forward(request)

        return where(lambda request: request.key.policy.own_predictions, then=owned, otherwise=forward)

    return layer


def _id(request: ProxyRequest) -> str | None:
    params = request.route.params
    return next((params[name] for name in ("prediction_id", "training_id", "file_id") if name in params), None)


async def _filtered(request: ProxyRequest, tenant: str, forward: Forward, ledger: Ledger) -> ProxyResponse:
    """A page of a list without what is not the tenant's; its links stay."""
    kept = tuple(pair for pair in request.headers if pair[0] not in (b"range", b"if-match"))
    response = await forward(asking_for_plain(request.with_headers(kept)))
    if not 200 <= response.status < 300:
        return response
    if request.method == "HEAD":
        return without_length(response)
    page = await _page(response)
    if page is None:
        raise UpstreamFailed("own_predictions: Replicate's list cannot be read, and is not shown unfiltered.")
    own = await ledger.own(tenant, [one.id for one in page.items if one.id is not None])
    results = ",".join(page.text[one.start : one.end] for one in page.items if one.id in own)
    shown = f"{page.text[: page.start]}[{results}]{page.text[page.end :]}"
    return with_body(response, shown.encode())


class _Item(NamedTuple):
    start: int
    end: int
    id: str | None


class _Page(NamedTuple):
    """A list's text, and where its results stand in it."""

    text: str
    start: int
    end: int
    items: list[_Item]


async def _page(response: ProxyResponse) -> _Page | None:
    if not is_readable(response, max_size=MAX_PAGE):
        return None
    response, body, whole = await held(response, max_size=MAX_PAGE)
    plain = plain_of(response, body, max_size=MAX_PAGE) if whole else None
    if plain is None:
        return None
    try:
        text = plain.decode()
        [(start, end)] = [(start, end) for name, _, start, end in members(text) if name == "results"]
        items = [_Item(start + first, start + last, _id_of(item)) for item, first, last in elements(text[start:end])]
    except (ValueError, RecursionError):
        return None
    return _Page(text, start, end, items)


def _id_of(item: object) -> str | None:
    id = item.get("id") if isinstance(item, dict) else None
    return id if isinstance(id, str) else None
