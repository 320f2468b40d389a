"""The answer to a POST is had whole before its status goes out: cut short, it can still become a 502.

After a status there is nothing left to say but to cut the connection, and SDKs take a cut connection for a reason to
send the create again, which is paid again.
"""

from __future__ import annotations

from ..exchange import Forward, ProxyRequest, ProxyResponse, where
from ..json_bodies import at_hand, held

# Answers with images as data URIs were seen at 400 kB; larger ones are streamed.
MAX_SIZE = 8 << 20


def whole_answers(forward: Forward) -> Forward:
    """Hold the answer to a POST that Replicate's API has until it is complete, unless it is a stream of events."""

    async def whole(request: ProxyRequest) -> ProxyResponse:
        response = await forward(request)
        if at_hand(response) is not None or response.is_event_stream:
            return response
        return (await held(response, max_size=MAX_SIZE))[0]

    return where(lambda request: request.method == "POST" and request.operation, then=whole, otherwise=forward)
