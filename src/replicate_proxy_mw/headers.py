"""Which headers go up, which come back. Both ways only what is listed; the token goes in last."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .errors import BadRequest, UpstreamFailed
from .keys import ReplicateKey

HeaderList = tuple[tuple[bytes, bytes], ...]

UP = frozenset(
    b"accept accept-encoding accept-language cancel-after content-encoding content-type if-match if-modified-since"
    b" if-none-match last-event-id prefer range user-agent".split()
)
DOWN = frozenset(
    b"accept-ranges age allow cache-control cf-ray content-disposition content-encoding content-language"
    b" content-length content-range content-type deprecation etag expires last-modified link location"
    b" preference-applied retry-after sunset vary x-request-id".split()
)
DOWN_PREFIXES = (b"ratelimit-", b"x-ratelimit-", b"replicate-")

# Fields of one hop (RFC 9110, section 7.6.1), and credentials: never passed on, whatever a host lists.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    b" upgrade http2-settings".split()
)
CREDENTIALS = frozenset(b"authorization cookie set-cookie api-key x-api-key x-auth-token".split())
NEVER = HOP_BY_HOP | CREDENTIALS | frozenset(b"host content-length via".split())

# Fields that have one value (RFC 9110, section 5.3): a second line could be read by one side only.
SINGLE = frozenset(
    b"cancel-after content-length content-type host if-modified-since last-event-id range user-agent".split()
)
# Spellings of names in answers that are remembered.
MAX_NAMES = 256

# With "_" for "-" these reach some servers as the same field.
_SPOOFABLE = UP | SINGLE | frozenset(b"authorization x-portkey-api-key transfer-encoding".split())

# RFC 9110, section 5.5: control characters but the tab.
_CONTROL = bytes({*range(32), 127} - set(b"\t"))

# To look for a number in bytes takes a tenth of the time.
_UNDERSCORE = ord("_")


def up(headers: Iterable[tuple[bytes, bytes]], extra: Collection[bytes] = ()) -> HeaderList:
    """The caller's headers that Replicate gets, in order, two of one name still two.

    Raises:
        BadRequest: a single-valued header that comes twice, a name that poses with `_` as one that is read,
            or a value with a control character or with white space around it.
    """
    kept: list[tuple[bytes, bytes]] = []
    seen: set[bytes] = set()
    named: list[bytes] = []
    for name, value in headers:
        if name in SINGLE:
            if name in seen:
                raise BadRequest(f"There is more than one {name.decode()} header.")
            seen.add(name)
        if name in UP:
            kept.append((name, value))
        elif _UNDERSCORE in name and name.replace(b"_", b"-") in _SPOOFABLE:
            raise BadRequest("A header name has '_' where '-' is meant.")
        elif name in extra:
            kept.append((name, value))
        elif name == b"connection":
            named += _tokens(value)
    if _has_illegal(kept):
        raise BadRequest("A header value has a control character, or white space around it.")
    return tuple([pair for pair in kept if pair[0] not in named] if named else kept)


def _tokens(connection: bytes) -> list[bytes]:
    return [token.strip().lower() for token in connection.split(b",")]


def _has_illegal(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a value has a control character, or white space around it."""
    values = [value for _, value in headers]
    for value in values:
        if value.strip() != value:
            return True
    # One look at all of them takes less time than one at each.
    together = b"".join(values)
    return len(together.translate(None, _CONTROL)) != len(together)


def without_content(headers: HeaderList) -> HeaderList:
    """The headers of a request whose body is dropped."""
    return tuple(pair for pair in headers if pair[0] not in (b"content-type", b"content-encoding"))


def with_token(headers: HeaderList, key: ReplicateKey) -> list[tuple[bytes, bytes]]:
    """The headers as sent: the only place where a token leaves its `ReplicateKey`."""
    return [*headers, (b"authorization", key.authorization())]


def down(headers: Iterable[tuple[bytes, bytes]], status: int, extra: Collection[bytes] = ()) -> HeaderList:
    """Replicate's headers that the caller gets, lower-case, in order, two of one name still two.

    A length is dropped where there is no body to have it (204, 304: uvicorn with httptools drops the connection), and
    where the body came in chunks, whatever it says (RFC 9112, section 6.3).

    Raises:
        UpstreamFailed: a value with a control character or with white space around it.
    """
    kept: list[tuple[bytes, bytes]] = []
    named: list[bytes] = []
    for raw_name, value in headers:
        name, passes = _NAMES[raw_name]
        if passes or name in extra:
            kept.append((name, value))
        elif name == b"connection":
            named += _tokens(value)
        elif name == b"transfer-encoding":
            named.append(b"content-length")
    if _has_illegal(kept):
        raise UpstreamFailed()
    if status in (204, 304):
        named.append(b"content-length")
    return tuple([pair for pair in kept if pair[0] not in named] if named else kept)


class _Names(dict[bytes, tuple[bytes, bool]]):
    """Names as they come from Replicate, which sends the same few each time: in lower case, and whether one is of
    those that callers get."""

    def __missing__(self, raw_name: bytes) -> tuple[bytes, bool]:
        name = raw_name.lower()
        found = name, name in DOWN or name.startswith(DOWN_PREFIXES)
        if len(self) < MAX_NAMES:
            self[raw_name] = found
        return found


_NAMES = _Names()


def length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The caller's `content-length` in bytes, None where there is none.

    Raises:
        BadRequest: not a number, or one that no body has.
    """
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise BadRequest("The content-length header is not a number.")
            return int(value)
    return None
