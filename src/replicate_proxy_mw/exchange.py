"""The two values that travel through the proxy, and the shape of what they travel through."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .headers import HeaderList
from .keys import ReplicateKey
from .portkey import PortkeyContext
from .routing import Route


class Opened(Protocol):
    """What is closed when an exchange ends."""

    @property
    def aclose(self) -> Callable[[], Awaitable[None]]: ...


class AtOnce:
    """What is closed without waiting for anything. It may be asked to more than once."""

    __slots__ = ("close",)

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close

    async def aclose(self) -> None:
        self.close()


# Neither of the two is frozen, though both are taken for it: that would triple what making one costs.
@dataclass(kw_only=True, slots=True)
class ProxyRequest:
    """One request on its way to Replicate, already authenticated and cleaned. Not to be changed, but replaced.

    Attributes:
        method: in capitals.
        target: path and query below the prefix, as the caller sent them.
        route: what it asks of Replicate's API.
        headers: those that may go up, lower-case, in the caller's order; the token is not among them: it is put in from
            `key` at the very last.
        body: can be read once, and only until there is an answer: a layer that reads it passes on what it read,
            `replace(request, body=..., content_length=...)`.
        content_length: in bytes, None for a body of unknown length.
        key: the token, whose it is, and what it may do.
        portkey: what the caller says by Portkey's headers.
        scope: of ASGI, as the server made it.
        resend_count: how often it has been sent before.
        unwrapped_data: its body was within `{"data": ...}`.
        repaired_path: its path was not spelled as Replicate has it.
        via: goes up before `headers`.
        traceparent: that of the request span.
        notes: what is to stand on that span beside, by names that `telemetry.names` has.
        afterwards: run when the exchange has ended and all is closed, for a few seconds at most.
        opened: closed when the exchange ends, the last first, whatever happened.
    """

    method: str
    target: str
    route: Route
    headers: HeaderList
    body: AsyncIterable[bytes] = field(repr=False)
    content_length: int | None
    key: ReplicateKey
    portkey: PortkeyContext
    scope: Mapping[str, Any] = field(repr=False)
    resend_count: int = 0
    unwrapped_data: bool = False
    repaired_path: bool = False
    via: HeaderList = ()
    traceparent: str | None = None
    notes: dict[str, bool | int | float | str] = field(default_factory=dict, compare=False)
    afterwards: list[Callable[[], Awaitable[None]]] = field(default_factory=list, repr=False, compare=False)
    opened: list[Opened] = field(default_factory=list, repr=False, compare=False)

    @property
    def operation(self) -> str | None:
        """The operation id of Replicate's OpenAPI document, such as `predictions.create`."""
        return self.route.operation

    def with_headers(self, headers: HeaderList) -> ProxyRequest:
        """The same with other headers: `replace` at a third of the cost, for what nearly every request needs."""
        other = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            setattr(other, name, getattr(self, name))
        other.headers = headers
        return other


async def nothing_to_close() -> None:
    """`aclose` of an answer that holds nothing open."""


@dataclass(kw_only=True, slots=True)
class ProxyResponse:
    """One answer on its way to the caller. `body` is read once. Not to be changed, but replaced.

    When the exchange ends, `aclose` is called, whatever happened, and that of every answer that was had from Replicate
    on the way: a layer may drop one, or put another body in its place.
    """

    status: int
    headers: HeaderList
    body: AsyncIterable[bytes] = field(repr=False)
    aclose: Callable[[], Awaitable[None]] = field(default=nothing_to_close, repr=False)

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events (HTML standard, section 9.2)."""
        content_type = b""
        for name, value in self.headers:
            if name == b"content-type":
                content_type = value
        return content_type.strip().lower().startswith(b"text/event-stream")

    @classmethod
    def json(cls, status: int, content: Any, *, headers: HeaderList = ()) -> ProxyResponse:
        """An answer made here, for layers that answer by themselves."""
        body = json.dumps(content, separators=(",", ":")).encode()
        framing = ((b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()))
        return cls(status=status, headers=(*framing, *headers), body=Chunks([body]))


class Chunks:
    """Bytes at hand, as a body that can be read again; or these and then, once, the rest as it arrives."""

    def __init__(self, chunks: Iterable[bytes], rest: AsyncIterator[bytes] | None = None) -> None:
        self._chunks = tuple(chunks)
        self._rest = rest

    @property
    def at_hand(self) -> bytes | None:
        """The whole body, None if there is a rest."""
        if self._rest is not None:
            return None
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Reading(self._chunks, self._rest)


class _Reading:
    def __init__(self, chunks: Iterable[bytes], rest: AsyncIterator[bytes] | None) -> None:
        self._chunks = iter(chunks)
        self._rest = rest

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        if self._rest is None:
            raise StopAsyncIteration
        return await self._rest.__anext__()


Forward = Callable[[ProxyRequest], Awaitable[ProxyResponse]]
"""The next step on the way to Replicate: an async function from a request to its answer."""

Layer = Callable[[Forward], Forward]
"""Takes the next step and gives one in its place."""


def where(applies: Callable[[ProxyRequest], object], *, then: Forward, otherwise: Forward) -> Forward:
    """`then` for requests that it applies to. Of a layer that is passed by so, nothing waits for the answer: a
    coroutine of each that had nothing to do would be most of what a held request takes."""

    def passing(request: ProxyRequest) -> Awaitable[ProxyResponse]:
        return then(request) if applies(request) else otherwise(request)

    return passing
