from __future__ import annotations

import asyncio
import gc
import select
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw.upstream import network
from replicate_proxy_mw.upstream.network import HIGH_WATER, AsyncioStream, NetworkStream, connect
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])
trio_only = pytest.mark.parametrize("anyio_backend", ["trio"])


async def _open(upstream: RawUpstream, seconds: float | None = 5) -> NetworkStream:
    return await connect("127.0.0.1", upstream.port, ssl_context=None, seconds=seconds)


async def _readable(stream: NetworkStream) -> None:
    for _ in range(500):
        if stream.get_extra_info("is_readable"):
            return
        await anyio.sleep(0.01)


def _echo(connection: Connection) -> None:
    while data := connection.socket.recv(65536):
        connection.send(data)


def _waits_closed(connection: Connection) -> None:
    connection.wait_closed()


def _waits(connection: Connection) -> None:
    connection.upstream.go_on.wait(5)


async def test_bytes_there_and_back(upstream: RawUpstream) -> None:
    upstream.script = _echo
    stream = await _open(upstream, None)
    await stream.write(b"abc")
    assert await stream.read(2) == b"ab"
    assert await stream.read(2) == b"c"
    await stream.write(b"")
    await stream.write(b"def", 5)
    assert await stream.read(100, 5) == b"def"
    await stream.aclose()


async def test_small_writes_do_not_wait_for_each_other(upstream: RawUpstream) -> None:
    stream = await _open(upstream)
    assert stream.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await stream.aclose()


async def test_what_has_arrived_is_seen_without_reading(upstream: RawUpstream) -> None:
    upstream.script = _echo
    stream = await _open(upstream)
    assert not stream.get_extra_info("is_readable")
    await stream.write(b"abc")
    await _readable(stream)
    assert await stream.read(100) == b"abc"
    assert not stream.get_extra_info("is_readable")
    await stream.aclose()


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_the_end_is_seen_without_reading(upstream: RawUpstream, end: str) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.go_on.wait(5)
        if end == "reset":
            connection.reset()

    upstream.script = script
    stream = await _open(upstream)
    upstream.go_on.set()
    await _readable(stream)
    if end == "close":
        assert await stream.read(100, 5) == b""
    else:
        with pytest.raises(httpx.ReadError):
            await stream.read(100, 5)
    await stream.aclose()
    await stream.aclose()


async def _end_that_only_the_kernel_knows(upstream: RawUpstream) -> NetworkStream:
    upstream.script = _waits
    stream = await _open(upstream)
    assert stream.get_extra_info("is_idle")
    upstream.go_on.set()
    # The loop has no turn meanwhile.
    assert select.select([stream.get_extra_info("socket").fileno()], [], [], 5)[0]
    return stream


async def test_an_end_that_was_not_handed_on_yet_is_seen(upstream: RawUpstream) -> None:
    stream = await _end_that_only_the_kernel_knows(upstream)
    assert not stream.get_extra_info("is_idle")
    await stream.aclose()


@asyncio_only
async def test_an_end_is_seen_without_poll(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll")
    stream = await _end_that_only_the_kernel_knows(upstream)
    assert not stream.get_extra_info("is_idle")
    await stream.aclose()


async def test_what_came_before_the_end_is_read_first(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.send(b"abc")

    upstream.script = script
    stream = await _open(upstream)
    await anyio.sleep(0.05)
    assert await stream.read(100) == b"abc"
    assert await stream.read(100) == b""
    await stream.aclose()


async def test_a_read_ends_in_time(upstream: RawUpstream) -> None:
    upstream.script = _waits
    stream = await _open(upstream)
    for seconds in (0.05, 0.01, 0.05):
        with pytest.raises(httpx.ReadTimeout):
            await stream.read(100, seconds)
    await stream.aclose()


async def test_a_write_ends_in_time(upstream: RawUpstream) -> None:
    upstream.script = _waits
    stream = await _open(upstream)
    with pytest.raises(httpx.WriteTimeout):
        await stream.write(b"a" * 20_000_000, 0.1)
    await stream.aclose()


async def test_what_is_received_gives_a_write_no_more_time(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while not connection.upstream.go_on.is_set():
            connection.send(b"a")
            time.sleep(0.01)

    upstream.script = script
    stream = await _open(upstream)
    with anyio.fail_after(5), pytest.raises(httpx.WriteTimeout):
        await stream.write(b"a" * 20_000_000, 0.3)
    await stream.aclose()
    upstream.go_on.set()


@trio_only
async def test_an_error_nobody_thought_of_does_not_say_that_nothing_was_sent(upstream: RawUpstream) -> None:
    upstream.script = _waits
    stream = await _open(upstream)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.read, 1, 5)
        tasks.start_soon(stream.write, b"a" * 20_000_000, 5)
        await anyio.wait_all_tasks_blocked()
        # trio's BusyResourceError.
        with pytest.raises(httpx.ReadError):
            await stream.read(1, 5)
        with pytest.raises(httpx.WriteError):
            await stream.write(b"a", 5)
        tasks.cancel_scope.cancel()
    await stream.aclose()


async def test_a_write_to_one_who_is_gone_fails(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.go_on.wait(0.05)
        connection.reset()

    upstream.script = script
    stream = await _open(upstream)
    for _ in range(2):
        with pytest.raises(httpx.WriteError):
            await stream.write(b"a" * 20_000_000, 5)
    await stream.aclose()


async def test_a_large_write_arrives_whole(upstream: RawUpstream) -> None:
    received = []

    def script(connection: Connection) -> None:
        connection.upstream.go_on.wait(0.05)
        while data := connection.socket.recv(1 << 20):
            received.append(len(data))
            if sum(received) == 20_000_001:
                connection.send(b"ok")

    upstream.script = script
    stream = await _open(upstream)
    await stream.write(b"a" * 20_000_001, 5)
    assert await stream.read(2, 5) == b"ok"
    await stream.aclose()


async def _waited(upstream: RawUpstream, stream: NetworkStream) -> None:
    """A read that had to wait, and that ended before its timer, of 0.1 seconds."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.read, 1, 0.1)
        await anyio.wait_all_tasks_blocked()
        upstream.ready.set()


@asyncio_only
async def test_a_timer_that_is_left_over_ends_nothing_else(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.ready.wait(5)
        connection.send(b"a")
        connection.upstream.go_on.wait(5)
        connection.send(b"b")
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    assert isinstance(stream, AsyncioStream)
    await _waited(upstream, stream)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.read, 1, 5)
        # The first timer ends meanwhile, and is set again for the second wait.
        await anyio.sleep(0.2)
        upstream.go_on.set()
    with pytest.raises(httpx.ReadTimeout):
        await stream.read(1, 0.05)
    await stream.aclose()


@asyncio_only
async def test_a_timer_ends_no_wait_without_end(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.ready.wait(5)
        connection.send(b"a")
        connection.upstream.go_on.wait(5)
        connection.send(b"b")
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    await _waited(upstream, stream)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.read, 1)
        await anyio.sleep(0.2)
        upstream.go_on.set()
    await stream.aclose()


@asyncio_only
async def test_a_timer_finds_nobody_waiting(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.ready.wait(5)
        connection.send(b"a")
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    await _waited(upstream, stream)
    await anyio.sleep(0.2)
    with pytest.raises(httpx.ReadTimeout):
        await stream.read(1, 0.01)
    await stream.aclose()


@asyncio_only
async def test_what_nobody_reads_is_not_taken_in(upstream: RawUpstream) -> None:
    """A bounded part of it, and all of it once it is read."""

    def script(connection: Connection) -> None:
        for _ in range(320):
            connection.send(b"a" * 65536)
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    assert isinstance(stream, AsyncioStream)
    await anyio.sleep(0.1)
    assert not upstream.ready.is_set()
    received = 0
    while received < 320 * 65536:
        # One read of asyncio's at most above the mark.
        assert stream._size <= HIGH_WATER + 256 * 1024
        received += len(await stream.read(65536, 5))
    await stream.aclose()


@asyncio_only
async def test_what_cannot_be_sent_yet_is_not_taken_in(upstream: RawUpstream) -> None:
    upstream.script = _waits
    stream = await _open(upstream)
    assert isinstance(stream, AsyncioStream)
    with pytest.raises(httpx.WriteTimeout):
        await stream.write(b"a" * 20_000_000, 0.1)
    assert stream._transport.get_write_buffer_size() <= 2 * HIGH_WATER
    await stream.aclose()


async def test_a_connection_closed_within_a_write_sends_no_more(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await stream.aclose()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)


async def test_nobody_listens() -> None:
    with RawUpstream() as gone:
        port = gone.port
    with pytest.raises(httpx.ConnectError):
        await connect("127.0.0.1", port, ssl_context=None, seconds=5)


@pytest.mark.parametrize("host", ["host.invalid", "x" * 70 + ".test"])
async def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)) as raised:
        await connect(host, 80, ssl_context=None, seconds=5)
    assert raised.value.__context__ is None


@asyncio_only
async def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolved(monkeypatch, [])
    with pytest.raises(httpx.ConnectError):
        await connect("host.test", 80, ssl_context=None, seconds=5)


async def test_tls_with_one_who_speaks_none(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.socket.recv(65536)
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    upstream.script = script
    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            await connect("127.0.0.1", upstream.port, ssl_context=ssl.create_default_context(), seconds=5)


async def test_tls_with_one_who_hangs_up(upstream: RawUpstream) -> None:
    upstream.script = lambda connection: None
    with pytest.raises(httpx.ConnectError):
        await connect("127.0.0.1", upstream.port, ssl_context=ssl.create_default_context(), seconds=None)


async def test_a_handshake_that_is_cancelled_leaves_nothing_open(upstream: RawUpstream) -> None:
    upstream.script = _waits_closed
    context = ssl.create_default_context()  # takes long where much else runs
    gc.disable()
    try:
        with anyio.move_on_after(0.2) as scope:
            await connect("127.0.0.1", upstream.port, ssl_context=context, seconds=5)
        assert scope.cancelled_caught
        assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    finally:
        gc.enable()


@asyncio_only
async def test_what_is_said_before_tls_does_not_pass_for_secured(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstray")
        connection.wait_closed()

    upstream.script = script
    stream = await _open(upstream)
    assert isinstance(stream, AsyncioStream)
    await _readable(stream)
    with pytest.raises(ConnectionResetError):
        await stream.start_tls(ssl.create_default_context(), "localhost")
    await stream.aclose()
    with pytest.raises(httpx.ConnectError):
        await connect("127.0.0.1", upstream.port, ssl_context=ssl.create_default_context(), seconds=5)


def _resolved(monkeypatch: pytest.MonkeyPatch, found: list[tuple[Any, str, int]]) -> None:
    """Every host has these addresses."""

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address, port in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


Dialing = Callable[[str], Awaitable[None]]


def _dialing(monkeypatch: pytest.MonkeyPatch, first: Dialing) -> None:
    """What is awaited before an address is tried."""
    attempt = network._attempt

    async def told(loop: asyncio.AbstractEventLoop, address: str, port: int) -> network.Dialed:
        await first(address)
        return await attempt(loop, address, port)

    monkeypatch.setattr(network, "_attempt", told)


@asyncio_only
@pytest.mark.parametrize("broken", ["silent", "refused"])
async def test_broken_ipv6_does_not_keep_from_ipv4(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    tried = []

    async def first(address: str) -> None:
        tried.append(address)
        if ":" in address:
            if broken == "refused":
                raise ConnectionRefusedError
            await asyncio.Event().wait()

    _resolved(
        monkeypatch,
        [
            (socket.AF_INET6, "2001:db8::1", 1),
            (socket.AF_INET6, "2001:db8::2", 1),
            (socket.AF_INET, "127.0.0.1", upstream.port),
        ],
    )
    _dialing(monkeypatch, first)
    stream = await connect("host.test", 80, ssl_context=None, seconds=5)
    await stream.aclose()
    assert tried == ["2001:db8::1", "127.0.0.1"]


@asyncio_only
async def test_a_slow_address_is_waited_for_when_the_others_fail(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = asyncio.Event()

    async def first(address: str) -> None:
        if ":" in address:
            failed.set()
            raise ConnectionRefusedError
        await failed.wait()
        await asyncio.sleep(0.01)

    monkeypatch.setattr(network, "ATTEMPT_DELAY", 0.01)
    _resolved(
        monkeypatch, [(socket.AF_INET, "127.0.0.1", upstream.port), (socket.AF_INET6, "2001:db8::1", upstream.port)]
    )
    _dialing(monkeypatch, first)
    await (await connect("host.test", 80, ssl_context=None, seconds=5)).aclose()


@asyncio_only
async def test_of_two_that_answer_one_is_closed(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    both = asyncio.Event()
    upstream.script = _waits_closed
    monkeypatch.setattr(network, "ATTEMPT_DELAY", 0.01)
    # Both are the same listener.
    addresses = [(socket.AF_INET, "127.0.0.1", upstream.port), (socket.AF_INET, "localhost", upstream.port)]
    _resolved(monkeypatch, addresses)
    other = network._attempt

    async def told(loop: asyncio.AbstractEventLoop, address: str, port: int) -> network.Dialed:
        dialed = await other(loop, "127.0.0.1", port)
        if address == "localhost":
            both.set()
        await both.wait()
        return dialed

    monkeypatch.setattr(network, "_attempt", told)
    stream = await connect("host.test", 80, ssl_context=None, seconds=5)
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    assert (len(upstream.connections), len(upstream.closed_at)) == (2, 1)
    await stream.aclose()


@asyncio_only
@pytest.mark.parametrize("steps", range(6))
async def test_cancelled_while_connecting_nothing_stays_open(upstream: RawUpstream, steps: int) -> None:
    upstream.script = _waits_closed
    task = asyncio.ensure_future(_open(upstream))
    for _ in range(steps):
        await asyncio.sleep(0.001)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task])
    if not task.cancelled():
        await task.result().aclose()
    await anyio.sleep(0.05)
    await anyio.to_thread.run_sync(upstream.all_closed, len(upstream.connections), 2)
    assert len(upstream.closed_at) == len(upstream.connections)


async def test_connecting_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        filling = [socket.socket() for _ in range(3)]
        for one in filling:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        with pytest.raises(httpx.ConnectTimeout):
            await connect("127.0.0.1", port, ssl_context=None, seconds=0.1)
        for one in filling:
            one.close()
