from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw.upstream import PooledTransport
from replicate_proxy_mw.upstream.contract import Received
from replicate_proxy_mw.upstream.fast import FastTransport
from tests.raw_upstream import Connection, RawUpstream, answer_all

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("kind", [PooledTransport, FastTransport])

TIMEOUT = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}


def _to(upstream: RawUpstream, **options: Any) -> PooledTransport:
    return PooledTransport(origin=upstream.url, **{"max_connections": 1, **options})


async def _get(transport: PooledTransport, upstream: RawUpstream, method: str = "GET", **timeout: float) -> Received:
    headers = [(b"host", b"127.0.0.1:%d" % upstream.port)]
    return await transport.exchange(method, b"/v1", headers, b"", {**TIMEOUT, **timeout})


async def _read(received: Received) -> bytes:
    if isinstance(received.body, bytes):
        return received.body
    try:
        return b"".join([chunk async for chunk in received.body])
    finally:
        await received.body.aclose()


def _in_two(connection: Connection) -> None:
    """The body comes when the test says so."""
    while connection.request():
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"{}")


async def test_a_connection_is_used_again(upstream: RawUpstream) -> None:
    transport = _to(upstream)
    for _ in range(3):
        received = await _get(transport, upstream)
        assert received.body == b"{}"
        assert received.headers == [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await transport.aclose()
    assert len(upstream.connections) == 1


async def test_a_body_that_comes_later_gives_its_connection_back(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    transport = _to(upstream)
    for _ in range(2):
        received = await _get(transport, upstream)
        upstream.go_on.set()
        assert await _read(received) == b"{}"
        upstream.go_on.clear()
    await transport.aclose()
    assert len(upstream.connections) == 1


async def test_a_connection_is_given_back_at_the_end_of_a_body_and_once(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    transport = _to(upstream)
    received = await _get(transport, upstream)
    upstream.go_on.set()
    assert not isinstance(received.body, bytes)
    assert await anext(received.body) == b"{}"
    other = await _get(transport, upstream, pool=0.05)
    with pytest.raises(StopAsyncIteration):
        await anext(received.body)
    await received.body.aclose()
    await _read(other)
    await transport.aclose()
    assert len(upstream.connections) == 1


async def test_who_waits_too_long_is_told_so(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    transport = _to(upstream)
    held = await _get(transport, upstream)
    with pytest.raises(httpx.PoolTimeout):
        await _get(transport, upstream, pool=0.05)
    upstream.go_on.set()
    await _read(held)
    await _read(await _get(transport, upstream))
    await transport.aclose()


async def test_a_request_that_fails_gives_its_slot_back(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.reset()

    upstream.script = script
    transport = _to(upstream)
    for _ in range(2):
        with pytest.raises(httpx.ReadError):
            await _get(transport, upstream, pool=0.05)
    await transport.aclose()


async def test_closing_twice_gives_one_slot_back(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    transport = _to(upstream)
    first = await _get(transport, upstream)
    assert not isinstance(first.body, bytes)
    await first.body.aclose()
    await first.body.aclose()
    held = await _get(transport, upstream)
    with pytest.raises(httpx.PoolTimeout):
        await _get(transport, upstream, pool=0.05)
    upstream.go_on.set()
    await _read(held)
    await transport.aclose()


async def test_what_is_left_over_answers_nobody(upstream: RawUpstream) -> None:
    """Bytes after an answer are never the answer to the next request."""

    def script(connection: Connection) -> None:
        connection.request()
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
        connection.send(answer + b"mine!" + answer + b"stray")
        connection.wait_closed()

    upstream.script = script
    transport = _to(upstream)
    for _ in range(3):
        assert await _read(await _get(transport, upstream)) == b"mine!"
    await transport.aclose()
    assert len(upstream.connections) == 3


@pytest.mark.parametrize("ending", ["stray", "end", "reset"])
async def test_an_idle_connection_that_has_something_to_say_is_not_used(upstream: RawUpstream, ending: str) -> None:
    def first(connection: Connection) -> None:
        connection.request()
        connection.answer()
        upstream.go_on.wait(5)
        if ending == "stray":
            connection.answer(b"stray")
        elif ending == "end":
            connection.socket.shutdown(socket.SHUT_WR)
        else:
            connection.reset()
        upstream.ready.set()
        if ending != "reset":
            connection.wait_closed()

    upstream.script = first
    transport = _to(upstream)
    await _get(transport, upstream)
    upstream.script = answer_all
    upstream.go_on.set()
    assert await anyio.to_thread.run_sync(upstream.ready.wait, 2)
    await anyio.sleep(0.05)
    assert (await _get(transport, upstream)).body == b"{}"
    await transport.aclose()
    assert len(upstream.connections) == 2


async def test_what_was_sent_is_never_sent_again(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer()
        connection.request()

    upstream.script = script
    transport = _to(upstream)
    await _get(transport, upstream)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await _get(transport, upstream, "POST")
    await transport.aclose()
    assert len(upstream.requests) == 2


async def test_the_environment_does_not_steer_the_token(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    transport = _to(upstream)
    assert (await _get(transport, upstream)).body == b"{}"
    await transport.aclose()


async def test_a_client_of_httpx_can_use_it(upstream: RawUpstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"c"

    async with httpx.AsyncClient(transport=PooledTransport(max_connections=2)) as client:
        response = await client.post(upstream.url, json={"a": 1})
        assert (response.json(), response.http_version) == ({}, "HTTP/1.1")
        await client.post(upstream.url, content=pieces())
        assert (await client.get(upstream.url)).content == b"{}"
        async with client.stream("GET", upstream.url) as response:
            assert [chunk async for chunk in response.aiter_raw()] == [b"{}"]
    assert [received.body for received in upstream.requests] == [
        b'{"a":1}',
        b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        b"",
        b"",
    ]
    assert len(upstream.connections) == 1


async def test_httpx_reads_a_body_that_comes_later(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    async with httpx.AsyncClient(transport=PooledTransport(max_connections=2)) as client:
        for _ in range(2):
            async with client.stream("GET", upstream.url) as response:
                upstream.go_on.set()
                assert await response.aread() == b"{}"
            upstream.go_on.clear()
    assert len(upstream.connections) == 1


async def test_a_body_in_many_pieces(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n")
        connection.send(b"a" * 5_000_000)
        connection.wait_closed()

    upstream.script = script
    transport = _to(upstream)
    assert len(await _read(await _get(transport, upstream))) == 5_000_000
    await transport.aclose()


async def test_a_body_without_length_that_is_empty_ends(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
        upstream.go_on.wait(5)

    upstream.script = script
    transport = _to(upstream)
    received = await _get(transport, upstream)
    upstream.go_on.set()
    assert await _read(received) == b""
    await transport.aclose()


async def test_other_schemes_are_refused() -> None:
    transport = PooledTransport(max_connections=1)
    with pytest.raises(httpx.UnsupportedProtocol):
        await transport.handle_async_request(httpx.Request("GET", "ftp://host.test/"))


async def test_two_origins_share_the_bound_and_nothing_else(upstream: RawUpstream) -> None:
    with RawUpstream() as second:
        transport = PooledTransport(max_connections=1)
        for one in (upstream, second, upstream):
            request = httpx.Request("GET", one.url, extensions={"timeout": TIMEOUT})
            assert (await transport.handle_async_request(request)).status_code == 200
        await transport.aclose()
        # Each new one made room by closing the other's.
        assert (len(upstream.connections), len(second.connections)) == (2, 1)
        assert [len(one.requests) for one in (upstream, second)] == [2, 1]


async def test_an_answer_in_use_outlives_the_transport(upstream: RawUpstream) -> None:
    upstream.script = _in_two
    transport = _to(upstream)
    received = await _get(transport, upstream)
    await transport.aclose()
    upstream.go_on.set()
    assert await _read(received) == b"{}"
    # It was closed then, not kept.
    await _read(await _get(transport, upstream))
    assert len(upstream.connections) == 2


async def test_cancelled_within_a_body_the_connection_is_closed(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        connection.wait_closed()

    upstream.script = script
    transport = _to(upstream)
    received = await _get(transport, upstream)
    with anyio.move_on_after(0.05) as scope:
        await _read(received)
    assert scope.cancelled_caught
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    upstream.script = _in_two
    upstream.go_on.set()
    assert await _read(await _get(transport, upstream, pool=0.05)) == b"{}"
    await transport.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("rounds", range(8))
async def test_a_task_cancelled_twice_anywhere_loses_no_slot(upstream: RawUpstream, rounds: int) -> None:
    """asyncio's own cancellation, at each step of an exchange, and once more while that is cleaned up."""

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{")
            connection.upstream.go_on.wait(0.02)
            connection.send(b"}")

    upstream.script = script
    transport = _to(upstream)

    async def exchange() -> None:
        await _read(await _get(transport, upstream))

    tasks = [asyncio.create_task(exchange()) for _ in range(3)]
    for _ in range(rounds):
        await asyncio.sleep(0 if rounds % 2 else 0.01)
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await _read(await _get(transport, upstream, pool=1.0)) == b"{}"
    await transport.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for `localhost` that nobody trusts, in one file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(path), "-out", str(path) + ".crt", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(str(path) + ".crt").read_text())
    return path


@pytest.fixture
def secure(upstream: RawUpstream, certificate: Path) -> RawUpstream:
    """The upstream behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    play = upstream._play

    def secured(connection: Connection) -> None:
        try:
            connection.socket = context.wrap_socket(connection.socket, server_side=True)
        except OSError:
            return
        upstream.protocol = connection.socket.selected_alpn_protocol()  # type: ignore[attr-defined]
        play(connection)

    upstream._play = secured  # type: ignore[method-assign]
    return upstream


def _to_secure(kind: type[PooledTransport], secure: RawUpstream, certificate: Path) -> PooledTransport:
    context = ssl.create_default_context(cafile=certificate)
    return kind(origin=f"https://localhost:{secure.port}", max_connections=1, ssl_context=context)


@both
async def test_over_tls(
    secure: RawUpstream, certificate: Path, kind: type[PooledTransport], anyio_backend_name: str
) -> None:
    transport = _to_secure(kind, secure, certificate)
    for _ in range(2):
        assert (await _get(transport, secure)).body == b"{}"
    await transport.aclose()
    # trio cannot be asked whether TLS holds something back.
    assert len(secure.connections) == (2 if anyio_backend_name == "trio" else 1)


@both
async def test_session_tickets_are_no_answer(
    secure: RawUpstream, certificate: Path, kind: type[PooledTransport]
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            await anyio.sleep(0.01)
            yield b"abc"

    transport = _to_secure(kind, secure, certificate)
    for _ in range(2):
        headers = [(b"host", b"x"), (b"content-length", b"9")]
        assert (await transport.exchange("POST", b"/", headers, pieces(), TIMEOUT)).body == b"{}"
    await transport.aclose()
    assert [received.body for received in secure.requests] == [b"abcabcabc"] * 2


@both
async def test_a_stray_record_answers_nobody(
    secure: RawUpstream, certificate: Path, kind: type[PooledTransport]
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        connection.upstream.go_on.wait(5)
        # Two records, which are there when the first of them is read.
        connection.send(b"{}")
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstray")
        connection.upstream.ready.set()
        answer_all(connection)

    secure.script = script
    transport = _to_secure(kind, secure, certificate)
    received = await _get(transport, secure)
    secure.go_on.set()
    assert await anyio.to_thread.run_sync(secure.ready.wait, 5)
    assert await _read(received) == b"{}"
    secure.script = answer_all
    assert await _read(await _get(transport, secure)) == b"{}"
    await transport.aclose()


async def test_a_stranger_s_certificate_is_refused(
    secure: RawUpstream, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    transport = PooledTransport(origin=f"https://localhost:{secure.port}", max_connections=1)
    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            await _get(transport, secure)
    assert not secure.requests


async def test_a_certificate_of_another_host_is_refused(secure: RawUpstream, certificate: Path) -> None:
    context = ssl.create_default_context(cafile=certificate)
    transport = PooledTransport(origin=f"https://127.0.0.1:{secure.port}", max_connections=1, ssl_context=context)
    with pytest.raises(httpx.ConnectError):
        await _get(transport, secure)
    assert not secure.requests


async def test_a_handshake_that_hangs_ends_in_time(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.wait_closed()

    upstream.script = script
    transport = PooledTransport(origin=f"https://127.0.0.1:{upstream.port}", max_connections=1)
    for _ in range(2):
        with pytest.raises(httpx.ConnectTimeout):
            await _get(transport, upstream, connect=0.1, pool=0.05)
    await anyio.to_thread.run_sync(upstream.all_closed, 2)
    assert len(upstream.closed_at) == 2
