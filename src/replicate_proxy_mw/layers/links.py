"""Links in Replicate's answers lead back to the proxy: SDKs dial `next` as it stands, with the caller's key.

Only those strings change, not a byte around them. Files keep their `urls.get`: SDKs put it into inputs, and Replicate's
workers fetch it from there.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from .. import routing
from ..exchange import Chunks, Forward, Layer, ProxyRequest, ProxyResponse
from ..headers import HeaderList

PUBLIC_BASE = "https://api.replicate.com/v1"

# Bytes, as transferred and as decoded: four times the largest answer recorded, 25 models with their schemas.
MAX_SIZE = 8 << 20

LISTS = frozenset(
    (
        *("collections.list", "deployments.list", "files.list", "models.list", "models.search"),
        *("models.examples.list", "models.versions.list", "predictions.list", "trainings.list"),
    )
)

# Answers with links go out without validators, so a 304 could only confirm a copy that the caller has from elsewhere,
# with links that leave the proxy.
_NOT_UP = frozenset((b"accept-encoding", b"if-modified-since", b"if-none-match"))

# Said of the very bytes that Replicate sent (RFC 9110, sections 8.4, 8.6, 8.8 and 14.3; RFC 9530).
_OF_THE_BYTES = frozenset(
    b"accept-ranges content-digest content-encoding content-length content-md5 digest etag last-modified"
    b" repr-digest".split()
)

# What comes in the place of a link, None to leave it.
Edit = Callable[[str], str | None]


def rewrite_links(
    *, upstream: str, prefix: str, public_url: str | None = None, stream_path: Edit | None = None
) -> Layer:
    """Rewrite `next` and `previous` of lists, `urls.get` and `urls.cancel` of a prediction or training, and `Location`.

    Args:
        upstream: links that begin with it lead to the proxy, as do those that begin with Replicate's public URL.
        prefix: what the proxy takes in the host, percent-encoded; may be empty.
        public_url: the URL of the prefix for callers, without `/` at its end. By default as each caller has reached it,
            by scheme, Host and path; the answer is then for that caller only (`cache-control: private, no-store`).
        stream_path: from `urls.stream` of a prediction to a path below the prefix, None to leave the link.
    """
    bases = sorted((PUBLIC_BASE, upstream), key=len, reverse=True)

    def layer(forward: Forward) -> Forward:
        async def rewriting(request: ProxyRequest) -> ProxyResponse:
            url = public_url or reached(request.scope, prefix)
            if url is None:
                return await forward(request)

            def link(old: str) -> str | None:
                return next((url + old[len(base) :] for base in bases if _begins(old, base)), None)

            def stream(old: str) -> str | None:
                path = stream_path(old) if stream_path else None
                return None if path is None else url + path

            rewrite = _rewrite(request, link, stream)
            response = await forward(request if rewrite is None else _plain(request))
            located, changed = _located(response, link)
            if rewrite is not None and _is_readable(located):
                located, in_body = await _with_links(located, rewrite)
                changed = changed or in_body
            # By its Host header, or with a stream that whoever has the URL may read.
            return _for_one_caller(located) if changed and (public_url is None or stream_path) else located

        return rewriting

    return layer


_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?:({_LABEL}(?:\.{_LABEL})*)\.?|\[([0-9a-f:.]+)\])(?::([0-9]{{1,5}}))?", re.IGNORECASE)
_PATH = re.compile(r"(?:/[!-~]*)?")


def reached(scope: Mapping[str, Any], prefix: str) -> str | None:
    """The URL of `prefix` as the caller has reached it; None if Host is missing, doubled or not that of a URL.

    `X-Forwarded-*` is the server's to judge: where it trusts them, it sets the scheme by them.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    scheme, path = scope.get("scheme", "http"), root(scope) + prefix
    if len(hosts) != 1 or not _is_host(hosts[0]) or scheme not in ("http", "https") or not _PATH.fullmatch(path):
        return None
    return f"{scheme}://{hosts[0]}{path}"


def root(scope: Mapping[str, Any]) -> str:
    """What lies above the prefix, percent-encoded: what `path_of` takes off, or `root_path` where the server has."""
    given: str = (scope.get("root_path") or "").rstrip("/")
    if not given:
        return ""
    if not scope["path"].startswith(given + "/"):
        return routing.path_of({"path": given})
    return routing.path_of({**scope, "root_path": ""}).removesuffix(routing.path_of(scope))


def _is_host(value: str) -> bool:
    found = _HOST.fullmatch(value)
    if found is None or len(value) > 260:
        return False
    name, v6, port = found.groups()
    try:
        if v6:
            IPv6Address(v6)
        elif name.rpartition(".")[2].isdigit():
            IPv4Address(name)
    except ValueError:
        return False
    return int(port or 0) < 1 << 16


def _begins(link: str, base: str) -> bool:
    return link.startswith(base) and link[len(base) : len(base) + 1] in ("", "/", "?")


def _rewrite(request: ProxyRequest, link: Edit, stream: Edit) -> Callable[[str], str] | None:
    """What is done to the answer's text, None if that is not looked at."""
    operation = request.route.details
    if operation is None or request.method == "HEAD":
        return None
    if operation.id in LISTS:
        return partial(rewritten, edits={"next": link, "previous": link})
    edits = {"get": link, "cancel": link}
    match operation.creates or operation.reads:
        case "prediction":
            return partial(rewritten, edits={**edits, "stream": stream}, within="urls")
        case "training":
            return partial(rewritten, edits=edits, within="urls")
    return None


def rewritten(text: str, *, edits: Mapping[str, Edit], within: str | None = None) -> str:
    """A JSON object with some strings at its top level edited, or in the object there that is named `within`.

    At the top level all is done when each name has been seen: `next` and `previous` come before `results`.
    """
    spans: list[tuple[int, int, str]] = []

    def note(edit: Edit, value: Any, start: int, end: int) -> None:
        if isinstance(value, str) and (new := edit(value)) is not None:
            spans.append((start, end, json.dumps(new)))

    missing = set(edits)
    try:
        for name, value, start, end in _members(text):
            if within is None and name in edits:
                note(edits[name], value, start, end)
                missing.discard(name)
                if not missing:
                    break
            elif name == within and value and isinstance(value, dict):
                for inner, url, first, last in _members(text[start:end]):
                    if inner in edits:
                        note(edits[inner], url, start + first, start + last)
    except (ValueError, RecursionError):
        return text
    parts, done = [], 0
    for start, end, new in spans:
        parts += [text[done:start], new]
        done = end
    return "".join((*parts, text[done:]))


_OPEN = re.compile(r"[ \t\n\r]*\{")
_NAME = re.compile(r'[ \t\n\r]*("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")[ \t\n\r]*:[ \t\n\r]*')
_NEXT = re.compile(r"[ \t\n\r]*(?:,|(\})[ \t\n\r]*\Z)")

# Scans in C. Numbers stay text: `int` refuses more than 4300 digits.
_scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode


def _members(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """Name, value and the value's span for each member of an object, those of the same name too.

    Raises:
        ValueError: the text is not, or no longer, that of an object with members.
        RecursionError: too deep.
    """
    found = _OPEN.match(text)
    while found and (name := _NAME.match(text, found.end())):
        value, end = _scan(text, name.end())
        yield json.loads(name[1]) if "\\" in name[1] else name[1][1:-1], value, name.end(), end
        found = _NEXT.match(text, end)
        if found and found[1]:
            return
    raise ValueError("not a JSON object")


def _plain(request: ProxyRequest) -> ProxyRequest:
    kept = tuple(pair for pair in request.headers if pair[0] not in _NOT_UP)
    return replace(request, headers=(*kept, (b"accept-encoding", b"identity")))


def _located(response: ProxyResponse, link: Edit) -> tuple[ProxyResponse, bool]:
    headers = []
    for name, value in response.headers:
        new = link(value.decode("latin-1")) if name == b"location" else None
        headers.append((name, value if new is None else new.encode("latin-1")))
    return replace(response, headers=tuple(headers)), tuple(headers) != response.headers


def _is_readable(response: ProxyResponse) -> bool:
    """Whether the body may be one whole JSON document, in an encoding that can be undone, and not too long."""
    media_type = _value(response.headers, b"content-type").partition(b";")[0].rstrip()
    length = _value(response.headers, b"content-length")
    return (
        200 <= response.status < 300
        and response.status != 206
        and (media_type == b"application/json" or media_type.endswith(b"+json"))
        and _value(response.headers, b"content-encoding") in (b"", b"identity", b"gzip", b"x-gzip", b"deflate")
        and not (length.isdigit() and (len(length) > 18 or int(length) > MAX_SIZE))
    )


def _value(headers: HeaderList, name: bytes) -> bytes:
    return b", ".join(value for key, value in headers if key == name).strip().lower()


async def _with_links(response: ProxyResponse, rewrite: Callable[[str], str]) -> tuple[ProxyResponse, bool]:
    """The answer with its links rewritten, and whether it had any. A body that is too long passes as it comes."""
    chunks = response.body.__aiter__()
    read = bytearray()
    async for chunk in chunks:
        read += chunk
        if len(read) > MAX_SIZE:
            return replace(response, body=Chunks([bytes(read)], chunks)), False
    came = bytes(read)
    body = plain = _decoded(came, _value(response.headers, b"content-encoding"))
    if plain is not None:
        with suppress(UnicodeDecodeError):
            body = rewrite(plain.decode()).encode()
    if body is None or body == came:
        return replace(response, body=Chunks([came])), False
    kept = tuple(pair for pair in response.headers if pair[0] not in _OF_THE_BYTES)
    headers = (*kept, (b"content-length", str(len(body)).encode()))
    return replace(response, headers=headers, body=Chunks([body])), body != plain


def _decoded(body: bytes, encoding: bytes) -> bytes | None:
    """`body` without its encoding; None if it is damaged, or too long for us."""
    if encoding in (b"", b"identity"):
        return body
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, whichever it begins like
    try:
        plain = decoder.decompress(body, MAX_SIZE + 1)
    except zlib.error:
        return None
    return plain if decoder.eof and not decoder.unused_data and len(plain) <= MAX_SIZE else None


def _for_one_caller(response: ProxyResponse) -> ProxyResponse:
    kept = tuple(pair for pair in response.headers if pair[0] != b"cache-control")
    return replace(response, headers=(*kept, (b"cache-control", b"private, no-store")))
