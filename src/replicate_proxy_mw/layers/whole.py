"""The answer to a create is had whole before its status goes out: cut short, it can still become a 502.

After a status there is nothing left to say but to cut the connection, and SDKs take a cut connection for a reason to
send the create again, which is paid again.
"""

from __future__ import annotations

from dataclasses import replace

from ..exchange import Chunks, Forward, ProxyRequest, ProxyResponse

# Answers with images as data URIs were seen at 400 kB; larger ones are streamed.
MAX_SIZE = 8 << 20


def whole_creates(forward: Forward) -> Forward:
    """Hold the JSON answer of an operation that creates something until it is complete."""

    async def held(request: ProxyRequest) -> ProxyResponse:
        response = await forward(request)
        operation = request.route.details
        if operation is None or operation.creates is None or not _is_json(response):
            return response
        chunks = response.body.__aiter__()
        body: list[bytes] = []
        size = 0
        async for chunk in chunks:
            body.append(chunk)
            size += len(chunk)
            if size > MAX_SIZE:
                return replace(response, body=Chunks(body, chunks))
        return replace(response, body=Chunks(body))

    return held


def _is_json(response: ProxyResponse) -> bool:
    content_type = dict(response.headers).get(b"content-type", b"").partition(b";")[0].strip().lower()
    return content_type.endswith((b"/json", b"+json"))
