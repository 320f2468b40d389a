"""What may leave the proxy: said again from the requirements, with nothing of `src`, to judge recorded bytes by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

Pair = tuple[bytes, bytes]

# What callers' headers may go up, and what the proxy says by itself.
CALLERS = frozenset(
    b"accept accept-encoding accept-language cancel-after content-encoding content-type if-match if-modified-since"
    b" if-none-match last-event-id prefer range user-agent".split()
)
OURS = frozenset(b"host via authorization content-length transfer-encoding".split())
ONCE = frozenset(b"host via authorization content-length transfer-encoding content-type range user-agent".split())

# A value under any other name carries this in what is generated, so that it is seen wherever it turns up.
MARK = b"f0rb1dden"

# Replicate decodes a path once.
DECODINGS = 1

_CONTROL = re.compile(rb"[\x00-\x1f\x7f\\]")
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/1\.1" % _TOKEN)
_FIELD = re.compile(
    rb"([!#$%&'*+.^_`|~0-9a-z-]+): ((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*" rb"[\x21-\x7e\x80-\xff])?)?)"
)
_VIA = re.compile(rb"\d(?:\.\d)? replicate-proxy-mw-[0-9a-f]{8}(?:, ?\d(?:\.\d)? replicate-proxy-mw-[0-9a-f]{8})*")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Where everything has to go: `host` as in the header, `base` as the path begins, and the token to go along."""

    host: bytes
    base: bytes
    token: str


def leaving(recorded: bytes, sent: Sequence[Pair], content: bytes, upstream: Upstream) -> list[str]:
    """What is wrong with the bytes of one request that went up, of a caller who sent these headers and this body."""
    head, end, rest = recorded.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    start = _LINE.fullmatch(line)
    if not end or start is None:
        return [f"no head: {recorded[:200]!r}"]
    headers: list[Pair] = []
    for field in fields:
        found = _FIELD.fullmatch(field)
        if found is None:
            return [f"no header: {field!r}"]
        headers.append((found[1], found[2]))
    method, target = start[1], start[2]
    wrong = of_target(target, upstream.base) + _of_headers(headers, sent, upstream)
    if MARK in head:
        wrong.append("a value of a header that may not go up")
    body = _body(headers, rest)
    if body is None:
        wrong.append(f"framing: {head!r} {rest[:100]!r}")
    elif body != (b"" if method in (b"GET", b"HEAD") else content):
        wrong.append(f"another body: {body[:100]!r}")
    return wrong


def of_target(target: bytes, base: bytes) -> list[str]:
    """What is wrong with a target: it has to stay below `base`, however often it is decoded on its way."""
    path = target.partition(b"?")[0]
    wrong = []
    if path != base and not path.startswith(base + b"/"):
        wrong.append(f"not below {base!r}: {target!r}")
    if b"#" in target or not target.startswith(b"/"):
        wrong.append(f"no path: {target!r}")
    for _ in range(DECODINGS + 1):
        if _CONTROL.search(path):
            wrong.append(f"a backslash or a control character: {target!r}")
        if {b".", b".."} & set(path.split(b"/")):
            wrong.append(f"a dot segment: {target!r}")
        path = unquote_to_bytes(path)
    return wrong


def _of_headers(headers: Sequence[Pair], sent: Sequence[Pair], upstream: Upstream) -> list[str]:
    names = [name for name, _ in headers]
    given = {(name.lower(), value) for name, value in sent}
    of_one_hop = {
        name.strip().lower() for key, value in sent if key.lower() == b"connection" for name in value.split(b",")
    }
    wrong = [f"twice: {name!r}" for name in ONCE if names.count(name) > 1]
    for name, value in headers:
        if name in CALLERS:
            # What has links to rewrite is asked for as it is.
            if (name, value) not in given and (name, value) != (b"accept-encoding", b"identity"):
                wrong.append(f"not sent: {name!r}: {value!r}")
            elif name in of_one_hop and (name, value) in given and value != b"identity":
                wrong.append(f"of one hop: {name!r}")
        elif name not in OURS:
            wrong.append(f"not allowed: {name!r}")
    if [value for name, value in headers if name == b"host"] != [upstream.host]:
        wrong.append("another host")
    if [value for name, value in headers if name == b"authorization"] != [b"Bearer " + upstream.token.encode()]:
        wrong.append("another token")
    wrong += [f"via: {value!r}" for name, value in headers if name == b"via" and not _VIA.fullmatch(value)]
    return wrong


def _body(headers: Sequence[Pair], rest: bytes) -> bytes | None:
    """The one body that all servers read, None if there could be two."""
    framing = [pair for pair in headers if pair[0] in (b"content-length", b"transfer-encoding")]
    if not framing:
        return rest if not rest else None
    if len(framing) > 1:
        return None
    name, value = framing[0]
    if name == b"content-length":
        return rest if re.fullmatch(rb"\d+", value) and int(value) == len(rest) else None
    return _dechunked(rest) if value == b"chunked" else None


def _dechunked(rest: bytes) -> bytes | None:
    body = b""
    while (found := re.match(rb"([0-9a-fA-F]+)\r\n", rest)) is not None:
        size, rest = int(found[1], 16), rest[found.end() :]
        body, rest, ended = body + rest[:size], rest[size + 2 :], rest[size : size + 2] == b"\r\n"
        if not ended:
            return None
        if not size:
            return body if not rest else None
    return None


def answered(status: int | None, headers: Sequence[Pair], sent: Sequence[Pair], token: str) -> list[str]:
    """What is wrong with the head of an answer, of an upstream that does nothing wrong."""
    if status is None:
        return ["no answer"]
    wrong = []
    looped = status == 508 and any(name == b"via" and b"replicate-proxy-mw-" in value for name, value in sent)
    if status >= 500 and not looped:
        wrong.append(f"status {status}")
    if any(token.encode() in value for _, value in headers):
        wrong.append("the token in an answer")
    return wrong
