"""The rule `max_in_flight` of a policy: so many requests of a tenant at a time, in this process."""

from __future__ import annotations

from ..errors import LimitExceeded
from ..exchange import AtOnce, Forward, ProxyRequest, ProxyResponse, where

# Seconds. Creates end within some, unless they wait for their prediction.
_RETRY_AFTER = 1


def limit_in_flight(forward: Forward) -> Forward:
    """Count a request from here until its exchange ends: the last byte of its answer is out, or its caller has left."""
    in_flight: dict[str | None, int] = {}

    async def counted(request: ProxyRequest) -> ProxyResponse:
        limit, tenant = request.key.policy.max_in_flight, request.key.tenant
        assert limit is not None
        under_way = in_flight.get(tenant, 0)
        if under_way >= limit:
            raise LimitExceeded(f"max_in_flight: {limit} requests are under way already.", retry_after=_RETRY_AFTER)
        in_flight[tenant] = under_way + 1
        request.opened.append(AtOnce(_Place(in_flight, tenant).give_back))
        return await forward(request)

    return where(lambda request: request.key.policy.max_in_flight is not None, then=counted, otherwise=forward)


class _Place:
    """One of those places, until it is given back."""

    def __init__(self, in_flight: dict[str | None, int], tenant: str | None) -> None:
        self._in_flight, self._tenant = in_flight, tenant

    def give_back(self) -> None:
        others = self._in_flight.pop(self._tenant) - 1
        if others:
            self._in_flight[self._tenant] = others
