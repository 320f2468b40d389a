"""The rule for sending again, in one place: nothing widens it, since a create that is sent twice is paid twice.

A request is sent again only if not one byte of it was written to upstream; or if its method is GET, HEAD or OPTIONS,
the caller has received nothing, and the connection failed or the status was 429, 502, 503 or 504.
"""

from __future__ import annotations

import random
from dataclasses import replace

import anyio

from ..errors import Overloaded, ProxyError, UpstreamFailed, UpstreamUnreachable
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse

SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
STATUS_CODES = frozenset((429, 502, 503, 504))

# Seconds that all waiting of one request may take together: Portkey's own limit.
TOTAL_WAIT = 60.0


def resend(*, attempts: int, first_wait: float = 1.0) -> Layer:
    """Send again, as far as the rule allows it.

    Args:
        attempts: so many more where the caller's config does not say. SDKs send again by themselves.
        first_wait: seconds before the second attempt, doubled for each further one and spread over its upper half, so
            that callers do not come back all at once. `Retry-After` is obeyed in its place.
    """

    def layer(forward: Forward) -> Forward:
        async def resending(request: ProxyRequest) -> ProxyResponse:
            retry = request.portkey.retry
            more = attempts if retry is None else retry.attempts
            if not more:
                return await forward(request)
            codes = STATUS_CODES if retry is None or retry.status_codes is None else STATUS_CODES & retry.status_codes
            waited = 0.0
            for count in range(more + 1):
                response: ProxyResponse | None = None
                failure: ProxyError | None = None
                try:
                    response = await forward(replace(request, resend_count=count))
                except ProxyError as error:
                    failure = error
                wait = first_wait * 2**count * random.uniform(0.5, 1)
                if response is not None:
                    again = request.method in SAFE and response.status in codes
                    wait = _retry_after(response, wait)
                else:
                    again = _may_follow(failure, request.method)
                waited += wait
                if count == more or not again or waited > TOTAL_WAIT:
                    break
                if response is not None:
                    await response.aclose()
                await anyio.sleep(wait)
            if failure is not None:
                raise failure
            assert response is not None
            told = (b"x-portkey-retry-attempt-count", b"-1" if again else str(count).encode())
            return replace(response, headers=(*response.headers, told))

        return resending

    return layer


def _may_follow(failure: ProxyError | None, method: str) -> bool:
    nothing_sent = isinstance(failure, (UpstreamUnreachable, Overloaded))
    return nothing_sent or (isinstance(failure, UpstreamFailed) and method in SAFE)


def _retry_after(response: ProxyResponse, otherwise: float) -> float:
    """Seconds; the form with a date is one that Replicate does not send."""
    value = dict(response.headers).get(b"retry-after", b"")
    return float(value) if value.isdigit() else otherwise
