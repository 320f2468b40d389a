"""What tests of layers that count share: a Redis of their own, out of order or not, and two processes at it."""

from __future__ import annotations

import subprocess
import sys
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


def two_processes(program: str, *arguments: str) -> list[str]:
    """What each of two has to tell, which begin at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [process.communicate(timeout=15)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
