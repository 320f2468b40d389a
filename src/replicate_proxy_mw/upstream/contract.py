"""What a transport of ours does beside httpx's contract: an exchange without an object of httpx, and why none came."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import httpx


class NotConnected(httpx.ConnectError):
    """`because` is the class of what failed: DNS, TCP or TLS."""

    def __init__(self, because: str) -> None:
        super().__init__(f"not connected: {because}")
        self.because = because


class ResponseBody(Protocol):
    """The rest of an answer, as it arrives. `aclose` gives the connection back or closes it, whatever has been read."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None: ...


class Received(NamedTuple):
    """The final head of an answer, names in the case that they came in. A body that came along with it is bytes, and
    then there is nothing to close."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes | ResponseBody


class Exchanging(Protocol):
    """A transport that can do without httpx's objects.

    Both this and httpx's `handle_async_request` raise httpx's exceptions: `PoolTimeout` and `ConnectError` if not one
    byte was sent.
    """

    async def exchange(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes],
        timeouts: Mapping[str, float],
    ) -> Received:
        """Send one request to the transport's origin.

        Args:
            target: path and query.
            headers: in order, `host` and one of `content-length` and `transfer-encoding: chunked` among them where
                there is a body.
            body: what does not fit the announced length fails the request before it is whole.
            timeouts: seconds, by httpx's names: `connect`, `read`, `write` and `pool`. Of these `read` is for the whole
                head of the answer, from the request's last byte, and then for each read of the body.
        """
        ...
