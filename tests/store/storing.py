"""What storages of answers hold in tests, and one with a switch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import hishel

from replicate_proxy_mw.store.responses import AS_THEY_CAME
from replicate_proxy_mw.store.responses_memory import MemoryResponses
from tests.raw_asgi import Arriving

KEY = "00" * 32
BODY = b"x" * 100


def request_for(target: str = "/models", **headers: str) -> hishel.Request:
    return hishel.Request("GET", target, hishel.Headers(headers))


def response_of(chunks: Iterable[bytes] = (BODY,), **headers: str) -> hishel.Response:
    return hishel.Response(200, hishel.Headers({AS_THEY_CAME: "[]", **headers}), aiter(Arriving(chunks)))


async def body_of(entry: hishel.Entry) -> bytes:
    assert isinstance(entry.response.stream, AsyncIterator)
    return b"".join([chunk async for chunk in entry.response.stream])


async def targets_in(storage: hishel.AsyncBaseStorage, *keys: str) -> list[str]:
    return [entry.request.url for key in keys or (KEY,) for entry in await storage.get_entries(key)]


async def nothing() -> None:
    pass


class Switched(MemoryResponses):
    """A storage with a switch: what is awaited before each call may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.before: Callable[[], Awaitable[None]] = nothing
        self.fails_at = ""

    async def create_entry(self, *arguments: Any, **limits: Any) -> hishel.Entry:
        await self._before("create")
        return await super().create_entry(*arguments, **limits)

    async def get_entries(self, key: str) -> list[hishel.Entry]:
        await self._before("get")
        return await super().get_entries(key)

    async def update_headers(self, id: Any, headers: hishel.Headers) -> None:
        await self._before("update")
        await super().update_headers(id, headers)

    async def remove_entry(self, id: Any) -> None:
        await self._before("remove")
        await super().remove_entry(id)

    async def _before(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise ConnectionError
        await self.before()
