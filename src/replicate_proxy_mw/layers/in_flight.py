"""The rule `max_in_flight` of a policy: so many requests of a tenant at a time, in this process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..errors import LimitExceeded
from ..exchange import Forward, ProxyRequest, ProxyResponse

# Seconds. Creates end within some, unless they wait for their prediction.
_RETRY_AFTER = 1


def limit_in_flight(forward: Forward) -> Forward:
    """Count a request from here until the last byte of its answer is out, or its caller has left."""
    in_flight: Counter[str | None] = Counter()

    async def counted(request: ProxyRequest) -> ProxyResponse:
        limit, tenant = request.key.policy.max_in_flight, request.key.tenant
        if limit is None:
            return await forward(request)
        if in_flight[tenant] >= limit:
            raise LimitExceeded(f"max_in_flight: {limit} requests are under way already.", retry_after=_RETRY_AFTER)
        in_flight[tenant] += 1
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                in_flight[tenant] -= 1
                if not in_flight[tenant]:
                    del in_flight[tenant]

        try:
            response = await forward(request)
        except BaseException:
            end()
            raise

        async def aclose() -> None:
            end()
            await response.aclose()

        answer = replace(response, aclose=aclose)
        # Closed with the exchange, whatever becomes of it on its way to the caller.
        request.opened.append(answer)
        return answer

    return counted
