"""The answer on its way to the caller: Replicate's, relayed as it arrives, or our own."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import TYPE_CHECKING

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
        ending: the last message is on its way.
        complete: it went out.
        waiting: what is spent waiting for the server is counted here, if anybody counts.
    """

    def __init__(self, send: ASGISendCallable, *, method: str) -> None:
        self._send = send
        self._bodiless = method == "HEAD"
        self.status: int | None = None
        self.size = 0
        self.ending = False
        self.complete = False
        self.waiting: Waiting | None = None

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
        await self._out(start)
        chunk = b""
        if not self._bodiless:
            if (at_hand := _short(response.body)) is None:
                async for chunk in response.body:
                    self.size += len(chunk)
                    await self._out({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = at_hand or b""
            del at_hand  # exceptions show the locals of their frames
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


def complete(response: ProxyResponse, *, method: str, trace_id: str) -> ProxyResponse:
    """The answer with all that clients need to find in it, whoever made it.

    A trace id keeps Portkey's SDKs from sending a create twice, `x-should-retry` keeps OpenAI's: the first may have
    been received. Portkey's SDK for Python fails without a content type even at a 204, the one for Node with a JSON
    type there; with parameters after `text/event-stream` the former takes a stream for JSON.
    """
    sent = dict(reversed(response.headers))
    content_type = sent.get(b"content-type", b"")
    headers = [pair for pair in response.headers if pair[0] not in _SET_HERE]
    if b"event-stream" in content_type.lower() and _media_type(content_type) == b"text/event-stream":
        content_type = b"text/event-stream"
    elif not content_type and response.status != 304:
        bodiless = response.status == 204 or sent.get(b"content-length") == b"0"
        content_type = b"text/plain" if bodiless else b"application/octet-stream"
    if content_type:
        headers.insert(0, (b"content-type", content_type))
    if (response.status >= 500 or response.status in (408, 409)) and method not in IDEMPOTENT:
        headers.append((b"x-should-retry", b"false"))
    headers += portkey.answer(trace_id=trace_id, sent=sent)
    return ProxyResponse(status=response.status, headers=tuple(headers), body=response.body, aclose=response.aclose)


_SET_HERE = frozenset((b"content-type", b"x-should-retry"))


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


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
    headers = (
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id.encode()),
        (b"x-portkey-gateway-exception", b"true"),
    )
    return ProxyResponse.json(error.status, content, headers=(*headers, *error.headers))
