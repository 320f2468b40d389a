"""The answer on its way to the caller: Replicate's, relayed as it arrives, or our own."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING

import anyio.lowlevel

from . import portkey
from .errors import ClientDisconnected, ProxyError
from .exchange import Chunks, ProxyResponse
from .waiting import Waiting

if TYPE_CHECKING:
    from asgiref.typing import ASGISendCallable, HTTPResponseBodyEvent, HTTPResponseStartEvent


# Bytes that servers take without waiting for the caller, so that they may be the last message.
ONE_MESSAGE = 1 << 16


class Reply:
    """What the caller has been sent so far.

    Attributes:
        status: the status that went out, None before.
        size: bytes of body that went out.
        starting: its status is on its way.
        ending: the last message is on its way, or can follow at once.
        complete: it went out.
        waiting: what is spent waiting for the server is counted here, if anybody counts.
    """

    def __init__(self, send: ASGISendCallable, *, method: str) -> None:
        self._send = send
        self._bodiless = method == "HEAD"
        self.status: int | None = None
        self.size = 0
        self.starting = self.ending = False
        self.complete = False
        self.waiting: Waiting | None = None

    def is_starting(self) -> bool:
        return self.starting

    def is_ending(self) -> bool:
        return self.ending

    async def relay(self, response: ProxyResponse) -> None:
        """Send `response` chunk by chunk; each waits until the server takes it.

        Raises:
            ClientDisconnected: the server says so (ASGI 2.4; none of the common ones does).
        """
        start: HTTPResponseStartEvent = {
            "type": "http.response.start",
            "status": response.status,
            "headers": list(response.headers),  # a list, since middleware around us may append to it
            "trailers": False,
        }
        self.status = response.status
        # What can be sent at once is, whoever leaves meanwhile.
        self.starting, self.ending = True, self._bodiless or _short(response.body) is not None
        await self._out(start)
        self.starting = False
        chunk = b""
        if not self.ending:
            sent = 0
            async for chunk in response.body:
                self.size += len(chunk)
                await self._out({"type": "http.response.body", "body": chunk, "more_body": True})
                # Whose next chunk is always there never waits, and is not cancelled else. The loop has timers, too.
                sent += 1
                await (anyio.lowlevel.checkpoint_if_cancelled if sent % 16 else anyio.lowlevel.checkpoint)()
            chunk = b""
        elif not self._bodiless:
            chunk = _short(response.body) or b""
        self.size += len(chunk)
        self.ending = True
        await self._out({"type": "http.response.body", "body": chunk, "more_body": False})
        self.complete = True

    async def _out(self, message: HTTPResponseStartEvent | HTTPResponseBodyEvent) -> None:
        try:
            if self.waiting is None:
                await self._send(message)
            else:
                with self.waiting:
                    await self._send(message)
        except OSError:
            raise ClientDisconnected() from None


def _short(body: AsyncIterable[bytes]) -> bytes | None:
    """A body that can be the last message."""
    at_hand = body.at_hand if isinstance(body, Chunks) else None
    return at_hand if at_hand is not None and len(at_hand) <= ONE_MESSAGE else None


# Methods that may be repeated without doing anything twice (RFC 9110, section 9.2.2; QUERY is safe).
IDEMPOTENT = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PUT", "QUERY"))


# No cache may keep what was made for one caller's key.
_NOT_KEPT = (b"cache-control", b"private, no-store")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")

# A model's output is a stranger's: what a browser would run has an origin of its own, and loads nothing.
_SANDBOXED = (b"content-security-policy", b"sandbox; default-src 'none'")

# nginx collects an answer unless it is told otherwise (nginx.org, ngx_http_proxy_module, proxy_buffering).
_AT_ONCE = (b"x-accel-buffering", b"no")

_SET_HERE = frozenset((b"cache-control", b"content-type", b"x-content-type-options", b"x-should-retry"))


def complete(response: ProxyResponse, *, method: str, trace_id: str) -> ProxyResponse:
    """The answer with all that clients need to find in it, whoever made it.

    A trace id keeps Portkey's SDKs from sending a create twice, `x-should-retry` keeps OpenAI's: the first may have
    been received. Portkey's SDK for Python fails without a content type even at a 204, the one for Node with a JSON
    type there; with parameters after `text/event-stream` the former takes a stream for JSON.

    Nothing that it shows may run in the host's origin, and no cache may keep it: what says `no-store` already stays as
    it came, and `no-transform` stays. A 304 says so too, since a copy takes its headers (RFC 9110, section 15.4.5).
    """
    sent = dict(reversed(response.headers))
    content_type = sent.get(b"content-type", b"")
    headers = [pair for pair in response.headers if pair[0] not in _SET_HERE]
    if b"event-stream" in content_type.lower() and _media_type(content_type) == b"text/event-stream":
        content_type = b"text/event-stream"
        headers = _with(headers, _AT_ONCE)
    elif content_type:
        if _is_active(content_type):
            headers = _with(headers, _SANDBOXED)
    elif response.status == 204 or sent.get(b"content-length") == b"0":
        content_type = b"text/plain"
    elif response.status != 304:
        content_type = b"application/octet-stream"
        headers = _with(headers, _SANDBOXED)
    if content_type:
        headers.insert(0, (b"content-type", content_type))
    if (response.status >= 500 or response.status in (408, 409)) and method not in IDEMPOTENT:
        headers.append((b"x-should-retry", b"false"))
    said = [value for name, value in response.headers if name == b"cache-control"]
    headers += (_not_kept(b", ".join(said)) if said else _NOT_KEPT, _NO_SNIFFING)
    headers += portkey.answer(trace_id=trace_id, sent=sent)
    return ProxyResponse(status=response.status, headers=tuple(headers), body=response.body, aclose=response.aclose)


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def _with(headers: list[tuple[bytes, bytes]], added: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [*[pair for pair in headers if pair[0] != added[0]], added]


# Documents that browsers show and that may hold scripts or frames, archives of such, and what they look into for such
# (WHATWG, "MIME Sniffing", section 7); beside these all XML, and all multipart, whose parts have types of their own.
_ACTIVE = frozenset(
    b"text/html text/xml application/xml text/xsl text/rdf message/rfc822"
    b" */* unknown/unknown application/unknown".split()
)
_HARMLESS = frozenset((b"application/json", b"application/json; charset=utf-8"))
_ONE_TYPE = re.compile(rb"[\w!#$%&'*+.^`|~-]+/[\w!#$%&'*+.^`|~-]+[ \t]*(?:;[^,]*)?")


def _is_active(content_type: bytes) -> bool:
    if content_type in _HARMLESS:
        return False
    if not _ONE_TYPE.fullmatch(content_type):
        return True  # of a list a browser takes the last one
    kind = _media_type(content_type)
    return kind in _ACTIVE or kind.endswith(b"+xml") or kind.startswith(b"multipart/")


def _not_kept(said: bytes) -> tuple[bytes, bytes]:
    directives = [directive.strip().lower() for directive in said.split(b",")]
    if b'"' in said:
        return _NOT_KEPT  # a comma may stand within an argument
    if b"no-store" in directives:
        return b"cache-control", said
    return (b"cache-control", b"private, no-store, no-transform") if b"no-transform" in directives else _NOT_KEPT


def render(error: ProxyError, *, request_id: str) -> ProxyResponse:
    """Our own answer, in the one shape that all six SDKs of Portkey, OpenAI and Replicate read well.

    `type`, `title`, `detail`, `status` and `instance` are Replicate's own (RFC 9457) and what its SDKs show; Portkey's
    Node SDK shows `message`, Portkey's for Python and OpenAI's show `error.message`.
    """
    content = {
        "title": error.code.replace("_", " ").capitalize(),
        "detail": error.message,
        "status": error.status,
        "type": error.code,
        "instance": request_id,
        "message": error.message,
        "error": {"message": error.message, "type": error.type or error.outcome, "param": None, "code": error.code},
        "request_id": request_id,
        **error.members,
    }
    headers = ((b"x-request-id", request_id.encode()), (b"x-portkey-gateway-exception", b"true"))
    return ProxyResponse.json(error.status, content, headers=(*headers, *error.headers))
