"""Creates: what two of them have in common, what came of one, and how what it has made is read again."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NoReturn

from . import routing
from .errors import (
    ClientDisconnected,
    GuardrailFailed,
    Overloaded,
    ProxyError,
    RequestTimeout,
    StoreFailed,
    UpstreamUnreachable,
)
from .exchange import Chunks, Forward, ProxyRequest, ProxyResponse
from .headers import HeaderList
from .json_bodies import held, id_of, plain_of
from .operations import Kind
from .telemetry.request import current

# Parsing a longer body holds up all other requests: the worst of this size a tenth of a second.
MAX_SIZE = 1 << 20

_JSON = re.compile(rb'application/json\s*(?:;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# What is said of a body, and not of the exchange that it came with.
_OF_THE_BODY = (b"content-type", b"content-encoding", b"content-language")


def content_of(headers: HeaderList, body: bytes) -> Any:
    """The JSON in a create's body.

    Raises:
        ValueError: there is none; or it is not all readers who would have the same of it, since a name comes twice or
            a number is none (RFC 8259, section 4 and 6); or it is too long or too deep.
    """
    types = [value for name, value in headers if name == b"content-type"]
    encoded = any(name == b"content-encoding" for name, _ in headers)
    if encoded or len(types) != 1 or not _JSON.fullmatch(types[0]) or len(body) > MAX_SIZE:
        raise ValueError("not plain JSON")
    try:
        return json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("too deep") from None


def canonical(content: Any) -> str:
    """One text for all JSON that means the same: `1` and `1.0` are told apart.

    Raises:
        ValueError: a number is too large to be one; or it is too deep.
    """
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError("too deep") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name comes twice")
    return members


def _no_number(text: str) -> NoReturn:
    raise ValueError("not a number")


def digest(*parts: str | bytes) -> str:
    """One digest in hex for these parts, in this order and divided in this way."""
    hashed = sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "big") + content)
    return hashed.hexdigest()


def fingerprint(request: ProxyRequest, body: bytes) -> str:
    """What is the same where the same is created: JSON that means the same, all else byte for byte."""
    try:
        same: tuple[str, str | bytes] = "json", canonical(content_of(request.headers, body))
    except ValueError:
        same = "raw", body
    return digest(request.operation or "", request.target, *same)


class Body(Chunks):
    """A body that knows whether sending it has begun: layers that look at it take it as it is at hand."""

    def __init__(self, content: bytes) -> None:
        super().__init__([content])
        self.is_begun = not content  # nobody asks for an empty one

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.is_begun = True
        return super().__aiter__()


def is_unsent(error: Exception, body: Body) -> bool:
    """Whether `error` says that nothing was sent. What a layer refuses may have been made, too."""
    refused = isinstance(error, ProxyError) and error.status < 500
    before = isinstance(error, (UpstreamUnreachable, Overloaded, StoreFailed, GuardrailFailed))
    return (before or (refused and not isinstance(error, (RequestTimeout, ClientDisconnected)))) and not body.is_begun


def is_refused(response: ProxyResponse) -> bool:
    """Whether Replicate says that it has made nothing. A time limit or a conflict is no such word."""
    return 400 <= response.status < 500 and response.status not in (408, 409)


def created_id(response: ProxyResponse, body: bytes, *, whole: bool) -> str | None:
    """The id of what a create has made, from its answer, of which `body` may be the begin only."""
    if not 200 <= response.status < 300:
        return None
    id = id_of(plain_of(response, body) if whole else body)
    return id if id is not None and _ID.fullmatch(id) else None


async def read_again(forward: Forward, request: ProxyRequest, kind: Kind, id: str) -> tuple[ProxyResponse, bytes, bool]:
    """What Replicate shows of a prediction or training now, with the key of `request`, as `held` has it, and with those
    headers alone that describe it.

    Raises:
        ProxyError, UpstreamAborted: what `forward` and its answer raised.
    """
    target = f"/{kind}s/{id}"
    asked = replace(
        request,
        method="GET",
        target=target,
        route=routing.match("GET", target),
        headers=((b"accept-encoding", b"identity"),),
        body=Chunks([]),
        content_length=0,
    )
    try:
        response = await forward(asked)
    finally:
        if (span := current()) is not None:
            # Replicate was asked, and yet what is answered is what another request has made.
            span.outcome = "answered"
    response, body, whole = await held(response)
    described = [pair for pair in response.headers if pair[0] in _OF_THE_BODY]
    if whole:
        described += [(b"content-length", str(len(body)).encode())]
    return replace(response, headers=tuple(described)), body, whole
