from __future__ import annotations

import anyio
import httpx
import pytest

from replicate_proxy_mw.upstream import BoundedTransport
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio


def _request(upstream: RawUpstream) -> httpx.Request:
    return httpx.Request("GET", upstream.url, extensions={"timeout": {"read": 5.0}})


async def _read(response: httpx.Response) -> bytes:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    try:
        return b"".join([chunk async for chunk in response.stream])
    finally:
        await response.stream.aclose()


async def test_a_connection_is_used_again(upstream: RawUpstream) -> None:
    transport = BoundedTransport(max_connections=1, wait=5)
    for _ in range(3):
        assert await _read(await transport.handle_async_request(_request(upstream))) == b"{}"
    await transport.aclose()
    assert len(upstream.connections) == 1


async def test_who_waits_too_long_is_told_so(upstream: RawUpstream) -> None:
    transport = BoundedTransport(max_connections=1, wait=0.05)
    held = await transport.handle_async_request(_request(upstream))
    with pytest.raises(httpx.PoolTimeout):
        await transport.handle_async_request(_request(upstream))
    await _read(held)
    await _read(await transport.handle_async_request(_request(upstream)))
    await transport.aclose()


async def test_a_waiter_is_served_when_a_connection_is_given_back(upstream: RawUpstream) -> None:
    transport = BoundedTransport(max_connections=1, wait=5)
    held = await transport.handle_async_request(_request(upstream))
    async with anyio.create_task_group() as tasks:

        async def waiter() -> None:
            await _read(await transport.handle_async_request(_request(upstream)))

        tasks.start_soon(waiter)
        await anyio.wait_all_tasks_blocked()
        await _read(held)
    await transport.aclose()


async def test_a_request_that_fails_gives_its_slot_back(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.reset()

    upstream.script = script
    transport = BoundedTransport(max_connections=1, wait=0.05)
    for _ in range(2):
        with pytest.raises(httpx.ReadError):
            await transport.handle_async_request(_request(upstream))
    await transport.aclose()


async def test_closing_twice_gives_one_slot_back(upstream: RawUpstream) -> None:
    transport = BoundedTransport(max_connections=1, wait=0.05)
    first = await transport.handle_async_request(_request(upstream))
    await _read(first)
    assert isinstance(first.stream, httpx.AsyncByteStream)
    await first.stream.aclose()
    held = await transport.handle_async_request(_request(upstream))
    with pytest.raises(httpx.PoolTimeout):
        await transport.handle_async_request(_request(upstream))
    await _read(held)
    await transport.aclose()


async def test_the_environment_does_not_steer_the_token(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    transport = BoundedTransport(max_connections=1, wait=5)
    assert await _read(await transport.handle_async_request(_request(upstream))) == b"{}"
    await transport.aclose()
