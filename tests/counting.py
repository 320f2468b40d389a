"""What tests of layers that count share: counters in a Redis, out of order or not."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from limits.aio.storage import RedisStorage

from tests.services import RedisServer

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@asynccontextmanager
async def storage_of(
    server: RedisServer, prefix: str = "", *, kind: type[RedisStorage] = RedisStorage
) -> AsyncIterator[Any]:
    prefix = prefix or str(uuid.uuid4())
    storage: Any = kind(f"async+{server.url}", implementation="redispy", key_prefix=prefix)
    try:
        yield storage
    finally:
        await storage.bridge.storage.aclose()


@contextmanager
def out_of_order(server: RedisServer, outage: str) -> Iterator[None]:
    if outage == "frozen":
        with server.frozen():
            yield
        return
    server.stop()
    try:
        yield
    finally:
        server.start()
