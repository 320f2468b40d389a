"""Creates: their keys, what two of them have in common, whether one was sent, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any, NoReturn

from .errors import (
    BadRequest,
    ClientDisconnected,
    GuardrailFailed,
    Overloaded,
    ProxyError,
    RequestTimeout,
    StoreFailed,
    UpstreamUnreachable,
)
from .exchange import Chunks, Opened, ProxyRequest, ProxyResponse
from .headers import HeaderList
from .json_bodies import id_of, plain_of

# Parsing a longer body holds up all other requests: the worst of this size a tenth of a second.
MAX_SIZE = 1 << 20

_JSON = re.compile(rb'application/json\s*(?:;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Visible characters: as they are, or as a string of Structured Fields (RFC 9651, section 3.3.3).
_BARE = re.compile(r"[!#-~]{1,255}")
_QUOTED = re.compile(r'"((?:[!#-\[\]-~]|\\["\\]){1,255})"')


def idempotency_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The value of the header `Idempotency-Key`, None where there is none.

    Raises:
        BadRequest: it comes twice, or is not 1 to 255 visible ASCII characters, in quotes or not.
    """
    values = [value.decode("latin-1").strip(" \t") for name, value in headers if name == b"idempotency-key"]
    if not values:
        return None
    quoted = _QUOTED.fullmatch(values[0])
    if len(values) > 1 or not (quoted or _BARE.fullmatch(values[0])):
        raise BadRequest("Idempotency-Key: must be one header of 1 to 255 visible ASCII characters.")
    return re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else values[0]


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


class Watch:
    """What is known of a request on its way.

    Attributes:
        is_begun: its body was asked for by whoever sends it; layers that look at it take it as it is at hand.
        opened: the answers that were had from Replicate.
    """

    is_begun = False
    opened: Sequence[Opened] = ()


class _Watched(Chunks):
    def __init__(self, body: AsyncIterable[bytes], watch: Watch) -> None:
        at_hand = body.at_hand if isinstance(body, Chunks) else None
        if at_hand is None:
            super().__init__((), body.__aiter__())
        else:
            super().__init__((at_hand,))
        self._watch = watch

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._watch.is_begun = True
        return super().__aiter__()


@dataclass(kw_only=True, slots=True)
class WatchedRequest(ProxyRequest):
    """A request whose body is watched, whichever one layers put in by `replace`; what they make anew is not."""

    watch: Watch = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.body, _Watched):
            self.body = _Watched(self.body, self.watch)


def watched(request: ProxyRequest) -> WatchedRequest:
    if isinstance(request, WatchedRequest):
        return request
    return WatchedRequest(**{one.name: getattr(request, one.name) for one in fields(request)}, watch=Watch())


def is_unsent(request: WatchedRequest, error: Exception | None) -> bool:
    """Whether nothing of a create was sent, which has come to `error` or, if that is None, to an answer.

    What was never asked for is not sent. Nobody asks for an empty body, so that only the kind of error tells, where
    there was no answer.
    """
    if request.watch.is_begun:
        return False
    if request.content_length != 0:
        return True
    if request.watch.opened:
        return False
    refused = isinstance(error, ProxyError) and error.status < 500
    before = isinstance(error, (UpstreamUnreachable, Overloaded, StoreFailed, GuardrailFailed))
    return before or (refused and not isinstance(error, (RequestTimeout, ClientDisconnected)))


def is_refused(response: ProxyResponse) -> bool:
    """Whether Replicate says that it has made nothing. A time limit or a conflict is no such word."""
    return 400 <= response.status < 500 and response.status not in (408, 409)


def created_id(response: ProxyResponse, body: bytes, *, whole: bool) -> str | None:
    """The id of what a create has made, from its answer, of which `body` may be the begin only."""
    if not 200 <= response.status < 300:
        return None
    id = id_of(plain_of(response, body) if whole else body)
    return id if id is not None and _ID.fullmatch(id) else None
