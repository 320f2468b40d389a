"""The rule for sending again, in one place: nothing widens it, since a create that is sent twice is paid twice.

A request is sent again only if not one byte of it was written to upstream; or if its method is GET, HEAD or OPTIONS,
the caller has received nothing, and the connection failed or the status was 429, 502, 503 or 504.
"""

from __future__ import annotations

import random
from dataclasses import replace

import anyio

from ..errors import Overloaded, ProxyError, UpstreamFailed, UpstreamUnreachable
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse, where

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
        def allowed(request: ProxyRequest) -> int:
            retry = request.portkey.retry
            return attempts if retry is None else retry.attempts

        async def resending(request: ProxyRequest) -> ProxyResponse:
            retry, more = request.portkey.retry, allowed(request)
            codes = STATUS_CODES if retry is None or retry.status_codes is None else STATUS_CODES & retry.status_codes
            count, waited = 0, 0.0
            while True:
                attempt = request if count == request.resend_count else replace(request, resend_count=count)
                came = await _tried(forward, attempt)
                again = _may_follow(came, request, codes)
                wait = _wait(came, first_wait * 2**count)
                waited += wait
                if not again or count == more or waited > TOTAL_WAIT:
                    break
                if isinstance(came, ProxyResponse):
                    await came.aclose()
                await anyio.sleep(wait)
                count += 1
            if isinstance(came, ProxyError):
                raise came
            told = b"-1" if again and count == more else str(count).encode()
            return replace(came, headers=(*came.headers, (b"x-portkey-retry-attempt-count", told)))

        return where(allowed, then=resending, otherwise=forward)

    return layer


async def _tried(forward: Forward, request: ProxyRequest) -> ProxyResponse | ProxyError:
    try:
        return await forward(request)
    except ProxyError as error:
        return error


def _may_follow(came: ProxyResponse | ProxyError, request: ProxyRequest, codes: frozenset[int]) -> bool:
    """Whether another attempt may follow what came of one. A body that was sent is gone."""
    repeatable = request.method in SAFE and request.content_length == 0
    if isinstance(came, ProxyResponse):
        return repeatable and came.status in codes
    return isinstance(came, (UpstreamUnreachable, Overloaded)) or (isinstance(came, UpstreamFailed) and repeatable)


def _wait(came: ProxyResponse | ProxyError, otherwise: float) -> float:
    """Seconds until the next attempt; the form of `Retry-After` with a date is one that Replicate does not send."""
    value = dict(came.headers).get(b"retry-after", b"") if isinstance(came, ProxyResponse) else b""
    return float(value) if value.isdigit() else otherwise * random.uniform(0.5, 1)  # nosec B311 # no secret
