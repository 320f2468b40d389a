"""The caller's own time limit: `x-portkey-request-timeout`, or `request_timeout` of an inline config."""

from __future__ import annotations

import anyio

from ..errors import RequestTimeout
from ..exchange import Forward, ProxyRequest, ProxyResponse


def request_timeout(forward: Forward) -> Forward:
    """Give up when the head of the answer is not there in time, all attempts together.

    Raises:
        RequestTimeout: 408, as Portkey's gateway answers. What was asked for may still have begun.
    """

    async def limited(request: ProxyRequest) -> ProxyResponse:
        seconds = request.portkey.request_timeout
        if seconds is None:
            return await forward(request)
        with anyio.move_on_after(seconds):
            return await forward(request)
        raise RequestTimeout(seconds)

    return limited
