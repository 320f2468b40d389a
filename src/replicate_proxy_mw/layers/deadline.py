"""The caller's own time limit: `x-portkey-request-timeout`, or `request_timeout` of an inline config."""

from __future__ import annotations

import anyio

from ..errors import RequestTimeout
from ..exchange import Forward, ProxyRequest, ProxyResponse, where


def request_timeout(forward: Forward) -> Forward:
    """Give up when the head of the answer is not there in time, all attempts together.

    Raises:
        RequestTimeout: 408, as Portkey's gateway answers. What was asked for may still have begun.
    """

    async def limited(request: ProxyRequest) -> ProxyResponse:
        seconds = request.portkey.request_timeout
        assert seconds is not None
        with anyio.move_on_after(seconds):
            return await forward(request)
        raise RequestTimeout(seconds)

    return where(lambda request: request.portkey.request_timeout is not None, then=limited, otherwise=forward)
