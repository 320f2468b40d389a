"""`{"data": {...}}` becomes `{...}`: what Portkey's SDK for Python makes of the documented call.

`portkey.post(url="predictions", data={...})` arrives wrapped, and Replicate wants `version` and `input` at the top. No
JSON body of its API has a field `data`, so nothing else can be meant.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from ..exchange import Chunks, Forward, ProxyRequest, ProxyResponse, where
from ..json_bodies import at_hand, held

# Longer bodies pass as they came. Parsing one holds up all other requests: the worst of this size a tenth of a second.
# Replicate advises against data URIs of more than 256 kB.
MAX_SIZE = 1 << 20

_WRAPPED = re.compile(rb'\s*\{\s*"data"\s*:\s*(?=\{)')
_LONGEST_HEAD = 64


def unwrap_data(forward: Forward) -> Forward:
    """Unwrap JSON bodies of POSTs. A body that does not begin like a wrapped one passes without being held."""

    async def unwrapped(request: ProxyRequest) -> ProxyResponse:
        request, body, whole = await held(request, max_size=MAX_SIZE, stop=_is_not_wrapped)
        content = inner(body) if whole else None
        if content is None:
            return await forward(request)
        unwrapped = replace(request, body=Chunks([content]), content_length=len(content), unwrapped_data=True)
        return await forward(unwrapped)

    return where(_may_be_wrapped, then=unwrapped, otherwise=forward)


def _may_be_wrapped(request: ProxyRequest) -> bool:
    if request.method != "POST" or request.content_length == 0:
        return False
    body = at_hand(request)
    return (body is None or _WRAPPED.match(body) is not None) and _is_plain_json(request)


def _is_not_wrapped(head: bytearray) -> bool:
    return len(head) >= _LONGEST_HEAD and not _WRAPPED.match(head)


def inner(body: bytes) -> bytes | None:
    """The bytes of the object in `{"data": {...}}`, as they stand there; None if the body is anything else."""
    wrapped = _WRAPPED.match(body)
    if wrapped is None:
        return None
    try:
        pairs = json.loads(body, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if len(pairs) != 1:
        return None
    return body[wrapped.end() : body.rindex(b"}")].rstrip()


def _is_plain_json(request: ProxyRequest) -> bool:
    headers = dict(request.headers)
    content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return content_type == b"application/json" and b"content-encoding" not in headers
