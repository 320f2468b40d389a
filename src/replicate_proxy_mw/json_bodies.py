"""JSON bodies that a step has to look at: had whole, bounded, without encoding, and where their parts stand."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from . import routing
from .exchange import Chunks, ProxyRequest, ProxyResponse
from .headers import HeaderList

Message = TypeVar("Message", ProxyRequest, ProxyResponse)

# Bytes, as transferred and as decoded: four times the largest answer recorded, 25 models with their schemas.
MAX_SIZE = 8 << 20

# What is looked at may go out changed, and then without validators, so a 304 could only confirm a copy that the caller
# has from elsewhere.
_NOT_UP = frozenset((b"accept-encoding", b"if-modified-since", b"if-none-match"))

# Said of the very bytes that Replicate sent (RFC 9110, sections 8.4, 8.6, 8.8 and 14.3; RFC 9530).
_OF_THE_BYTES = frozenset(
    b"accept-ranges content-digest content-encoding content-length content-md5 digest etag last-modified"
    b" repr-digest".split()
)


_IDENTITY = (b"accept-encoding", b"identity")
_OF_THE_BODY = frozenset((b"content-type", b"content-length", b"content-encoding"))

_FIRST_ID = re.compile(rb'\s*\{\s*"id"\s*:\s*"([A-Za-z0-9_-]+)"\s*[,}]')


def plainly(headers: HeaderList) -> HeaderList:
    """The headers of a request for an answer that is whole and not encoded."""
    return (*[pair for pair in headers if pair[0] not in _NOT_UP], _IDENTITY)


def asking_for_plain(request: ProxyRequest) -> ProxyRequest:
    """`request` for an answer that is whole and not encoded."""
    headers = request.headers
    if headers and headers[-1] is _IDENTITY:
        return request  # `plainly` made them
    asking = plainly(headers)
    return request if asking == headers else request.with_headers(asking)


def asking_for(request: ProxyRequest, target: str) -> ProxyRequest:
    """A GET of another target, with the key of `request`, for an answer that is whole and not encoded."""
    return replace(
        request,
        method="GET",
        target=target,
        route=routing.match("GET", target.partition("?")[0]),
        headers=(_IDENTITY,),
        body=Chunks([]),
        content_length=0,
    )


def is_readable(response: ProxyResponse, *, max_size: int = MAX_SIZE) -> bool:
    """Whether the body may be one whole JSON document, in an encoding that can be undone, and not too long."""
    if not 200 <= response.status < 300 or response.status == 206:
        return False
    said = [pair for pair in response.headers if pair[0] in _OF_THE_BODY]
    media_type = _value(said, b"content-type").partition(b";")[0].rstrip()
    length = _value(said, b"content-length")
    return (
        (media_type == b"application/json" or media_type.endswith(b"+json"))
        and _value(said, b"content-encoding") in (b"", b"identity", b"gzip", b"x-gzip", b"deflate")
        and not (length.isdigit() and (len(length) > 18 or int(length) > max_size))
    )


def at_hand(message: ProxyRequest | ProxyResponse) -> bytes | None:
    """The body, if nothing has to be waited for."""
    return message.body.at_hand if isinstance(message.body, Chunks) else None


async def held(
    message: Message, *, max_size: int = MAX_SIZE, stop: Callable[[bytearray], bool] = lambda head: False
) -> tuple[Message, bytes, bool]:
    """`message` with its body at hand, that body, and whether it is all: what is longer, or is told by `stop` from what
    has come, goes on as it comes."""
    if (body := at_hand(message)) is not None:
        return message, body, len(body) <= max_size
    chunks = message.body.__aiter__()
    read = bytearray()
    async for chunk in chunks:
        read += chunk
        if len(read) > max_size or stop(read):
            return replace(message, body=Chunks([bytes(read)], chunks)), bytes(read), False
    body = bytes(read)
    return replace(message, body=Chunks([body])), body, True


def plain_of(response: ProxyResponse, body: bytes, *, max_size: int = MAX_SIZE) -> bytes | None:
    """`body`, which is that of `response`, without its encoding; None if it is damaged or too long."""
    if _value(response.headers, b"content-encoding") in (b"", b"identity"):
        return body
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, whichever it begins like
    try:
        plain = decoder.decompress(body, max_size + 1)
    except zlib.error:
        return None
    return plain if decoder.eof and not decoder.unused_data and len(plain) <= max_size else None


def with_body(response: ProxyResponse, body: bytes) -> ProxyResponse:
    """`response` with another body, and without what was said of the old one."""
    kept = [pair for pair in response.headers if pair[0] not in _OF_THE_BYTES]
    headers = (*kept, (b"content-length", b"%d" % len(body)))
    return ProxyResponse(status=response.status, headers=headers, body=Chunks([body]), aclose=response.aclose)


def without_length(response: ProxyResponse) -> ProxyResponse:
    """The answer to a HEAD whose GET would have another body."""
    return replace(response, headers=tuple(pair for pair in response.headers if pair[0] not in _OF_THE_BYTES))


def id_of(body: bytes | None) -> str | None:
    """The member `id` of an object. It stands at the top, so that a piece of the body may do."""
    if first := _FIRST_ID.match(body or b""):
        return first[1].decode()
    try:
        for name, value, _, _ in members((body or b"").decode("utf-8", "replace")):
            if name == "id":
                return value if isinstance(value, str) else None
    except (ValueError, RecursionError):
        pass
    return None


def _value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    found = None
    for key, value in headers:
        if key == name:
            found = value if found is None else found + b", " + value
    return found.strip().lower() if found else b""


_OBJECT = re.compile(r"[ \t\n\r]*\{")
_ARRAY = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
_EMPTY_OBJECT = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*\}[ \t\n\r]*")
_EMPTY_ARRAY = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*\][ \t\n\r]*")
_NAME = re.compile(r'[ \t\n\r]*("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")[ \t\n\r]*:[ \t\n\r]*')
_NEXT = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|([\]}])[ \t\n\r]*\Z)")

# Scans in C. Numbers stay text: `int` refuses more than 4300 digits.
_scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode


def members(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """Name, value and the value's span for each member of an object, those of the same name too.

    Raises:
        ValueError: the text is not, or no longer, that of an object.
        RecursionError: too deep.
    """
    if _EMPTY_OBJECT.fullmatch(text):
        return
    found = _OBJECT.match(text)
    while found and (name := _NAME.match(text, found.end())):
        value, end = _scan(text, name.end())
        yield json.loads(name[1]) if "\\" in name[1] else name[1][1:-1], value, name.end(), end
        found = _NEXT.match(text, end)
        if found and found[1] == "}":
            return
        if found and found[1]:
            break
    raise ValueError("not a JSON object")


def is_rest(text: str) -> bool:
    """Whether `text`, which follows a member of an object, goes on to the end of that object and no further."""
    whole = '{"":null' + text
    try:
        _, end = _scan(whole, 0)
    except (ValueError, RecursionError):
        return False
    return not whole[end:].strip(" \t\n\r")


def elements(text: str) -> Iterator[tuple[Any, int, int]]:
    """Each element of an array, and its span.

    Raises:
        ValueError, RecursionError: as `members`.
    """
    if _EMPTY_ARRAY.fullmatch(text):
        return
    found = _ARRAY.match(text)
    while found:
        value, end = _scan(text, found.end())
        yield value, found.end(), end
        found = _NEXT.match(text, end)
        if found and found[1] == "]":
            return
        if found and found[1]:
            break
    raise ValueError("not a JSON array")
