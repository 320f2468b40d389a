"""What every transport of ours does, byte by byte, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import anyio
import anyio.lowlevel
import httpx
import pytest

from replicate_proxy_mw.upstream import fast, http11, network
from replicate_proxy_mw.upstream.contract import Received
from replicate_proxy_mw.upstream.fast import FastTransport
from replicate_proxy_mw.upstream.transport import PooledTransport
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

Kind: TypeAlias = type[PooledTransport]
Script: TypeAlias = Callable[[Connection], None]

TOKEN = b"r8_0000000000000000000000000000"
TIMEOUT = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(params=[PooledTransport, FastTransport])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
async def transport(kind: Kind, upstream: RawUpstream) -> AsyncIterator[PooledTransport]:
    """One connection at a time, so that a slot that is lost shows."""
    opened = kind(origin=upstream.url, max_connections=1)
    yield opened
    await opened.aclose()


async def _ask(
    transport: PooledTransport,
    method: str = "GET",
    target: bytes = b"/v1/x",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes | AsyncIterator[bytes] = b"",
    **timeout: float,
) -> Received:
    sent = [(b"host", b"api.test"), (b"authorization", b"Bearer " + TOKEN), *headers]
    return await transport.exchange(method, target, sent, body, TIMEOUT | timeout)


async def _body(received: Received) -> bytes:
    if isinstance(received.body, bytes):
        return received.body
    try:
        return b"".join([piece async for piece in received.body])
    finally:
        await received.body.aclose()


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _always(answer: bytes, *, close: bool = False) -> Script:
    """To the first request on each connection `answer`, to others OK."""

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(answer)
            if close:
                return

    return script


def _once(answer: bytes) -> Script:
    """To the first of all requests `answer`, to others OK."""
    answers = [answer]

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(answers.pop() if answers else OK)

    return script


async def _still_works(transport: PooledTransport) -> None:
    received = await _ask(transport)
    assert (received.status, await _body(received)) == (200, b"ok")


# Requests


async def test_a_request_goes_out_as_it_is_given(transport: PooledTransport, upstream: RawUpstream) -> None:
    headers = [(b"X-B", b"\xff\xe9 b"), (b"x-a", b""), (b"X-B", b"2"), (b"cookie", b"q=1")]
    await _ask(transport, "DELETE", b"/v1//a%2Fb/..%2f/%41?x=%7e&y=[|]", headers)
    [received] = upstream.requests
    assert received.head.split(b"\r\n") == [
        b"DELETE /v1//a%2Fb/..%2f/%41?x=%7e&y=[|] HTTP/1.1",
        b"host: api.test",
        b"authorization: Bearer " + TOKEN,
        b"X-B: \xff\xe9 b",
        b"x-a: ",
        b"X-B: 2",
        b"cookie: q=1",
    ]


@pytest.mark.parametrize("size", [0, 5, 65537, 1_000_000])
async def test_a_body_of_known_length_arrives(transport: PooledTransport, upstream: RawUpstream, size: int) -> None:
    await _ask(transport, "POST", headers=[(b"Content-Length", b"%d" % size)], body=b"x" * size)
    assert upstream.requests[0].body == b"x" * size


async def test_a_streamed_body_of_known_length_arrives(transport: PooledTransport, upstream: RawUpstream) -> None:
    body = _pieces(b"ab", b"", b"c" * 100_000)
    await _ask(transport, "POST", headers=[(b"content-length", b"100002")], body=body)
    assert upstream.requests[0].body == b"ab" + b"c" * 100_000


class _Countdown:
    """A body that is no generator."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __aiter__(self) -> _Countdown:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return b"x"


async def test_a_body_need_not_be_a_generator(transport: PooledTransport, upstream: RawUpstream) -> None:
    await _ask(transport, "POST", headers=[(b"content-length", b"3")], body=_Countdown(3))
    assert upstream.requests[0].body == b"xxx"


@pytest.mark.parametrize(
    ("body", "wire"),
    [
        ((b"ab", b"", b"cde"), b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"),
        ((), b"0\r\n\r\n"),
        (b"abc", b"3\r\nabc\r\n0\r\n\r\n"),
        (b"", b"0\r\n\r\n"),
    ],
)
async def test_a_body_of_unknown_length_arrives(
    transport: PooledTransport, upstream: RawUpstream, body: bytes | tuple[bytes, ...], wire: bytes
) -> None:
    given = body if isinstance(body, bytes) else _pieces(*body)
    await _ask(transport, "POST", headers=[(b"Transfer-Encoding", b"chunked")], body=given)
    assert upstream.requests[0].body == wire
    await _ask(transport)
    assert len(upstream.connections) == 1


async def test_a_stream_without_a_length_has_to_be_empty(transport: PooledTransport, upstream: RawUpstream) -> None:
    await _ask(transport, body=_pieces())
    with pytest.raises(httpx.LocalProtocolError):
        await _ask(transport, body=_pieces(b"x"))
    await _ask(transport)
    assert not any(request.body for request in upstream.requests)


@pytest.mark.parametrize(
    ("method", "target", "header"),
    [
        ("GET /", b"/", (b"a", b"b")),
        ("GET\r\n", b"/", (b"a", b"b")),
        ("", b"/", (b"a", b"b")),
        ("GET", b"", (b"a", b"b")),
        ("GET", b"/ HTTP/1.1\r\nx: y", (b"a", b"b")),
        ("GET", b"/a b", (b"a", b"b")),
        ("GET", b"/a\0", (b"a", b"b")),
        ("GET", b"/", (b"", b"b")),
        ("GET", b"/", (b"a\r\nb", b"c")),
        ("GET", b"/", (b"a\n", b"c")),
        ("GET", b"/", (b"a\0", b"c")),
        ("GET", b"/", (b"a: b", b"c")),
        ("GET", b"/", (b"a ", b"c")),
        ("GET", b"/", (b"a", b"b\r\nc: d")),
        ("GET", b"/", (b"a", b"b\nc: d")),
        ("GET", b"/", (b"a", b"b\rc")),
        ("GET", b"/", (b"a", b"b\0c")),
        ("GET", b"/", (b"content-length", b"+0")),
        ("GET", b"/", (b"content-length", b"-1")),
        ("GET", b"/", (b"content-length", b"0, 0")),
        ("GET", b"/", (b"content-length", b"1")),
        ("GET", b"/", (b"content-length", b"9" * 30)),
    ],
)
async def test_a_head_that_would_be_another_is_not_sent(
    transport: PooledTransport, upstream: RawUpstream, method: str, target: bytes, header: tuple[bytes, bytes]
) -> None:
    for _ in range(2):
        with pytest.raises(httpx.LocalProtocolError) as raised:
            await _ask(transport, method, target, [header])
        assert TOKEN.decode() not in str(raised.value)
    await _ask(transport)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"2"), (b"content-length", b"2")],
        [(b"content-length", b"2"), (b"Transfer-Encoding", b"chunked")],
        [(b"transfer-encoding", b"gzip")],
        [(b"content-length", b"1")],
        [(b"content-length", b"3")],
        [],
    ],
)
async def test_a_body_is_not_sent_under_another_length(
    transport: PooledTransport, upstream: RawUpstream, headers: list[tuple[bytes, bytes]]
) -> None:
    with pytest.raises(httpx.LocalProtocolError):
        await _ask(transport, "POST", headers=headers, body=b"ok")
    await _ask(transport)
    assert [request.line[:3] for request in upstream.requests] == [b"GET"]


@pytest.mark.parametrize("pieces", [(b"abc",), (b"abcde", b"f"), (b"abcdef",)])
async def test_a_stream_of_another_length_never_becomes_whole(
    transport: PooledTransport, upstream: RawUpstream, pieces: tuple[bytes, ...]
) -> None:
    with pytest.raises(httpx.LocalProtocolError):
        await _ask(transport, "POST", headers=[(b"content-length", b"5")], body=_pieces(*pieces))
    await _ask(transport)
    # All of "abcde" was there before the sixth byte showed that it was too long.
    assert all(request.line[:3] == b"GET" or pieces[0] == b"abcde" for request in upstream.requests)


async def test_what_a_body_raises_is_what_is_raised(transport: PooledTransport, upstream: RawUpstream) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        raise LookupError

    with pytest.raises(LookupError):
        await _ask(transport, "POST", headers=[(b"content-length", b"5")], body=body())
    await _ask(transport)


# Answers


async def test_headers_come_as_they_are(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(
        b"HTTP/1.1 200 OK\r\nX-B: \xff\xe9\r\nSet-Cookie: a=1\r\nx-empty:\r\nX-A: \t 1 1 \t\r\n"
        b"set-cookie: b=2\r\nContent-Length: 2\r\n\r\nok"
    )
    received = await _ask(transport)
    assert list(received.headers) == [
        (b"X-B", b"\xff\xe9"),
        (b"Set-Cookie", b"a=1"),
        (b"x-empty", b""),
        (b"X-A", b"1 1"),
        (b"set-cookie", b"b=2"),
        (b"Content-Length", b"2"),
    ]


async def test_a_body_that_came_along_is_bytes(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(OK)
    for _ in range(3):
        assert (await _ask(transport)).body == b"ok"
    assert len(upstream.connections) == 1


async def test_an_event_is_not_held_back(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in (b"data: 1\n\n", b"data: 2\n\n"):
                connection.send(b"%x\r\n%b\r\n" % (len(event), event))
                upstream.go_on.wait(5)
                upstream.go_on.clear()
            connection.send(b"0\r\n\r\n")

    upstream.script = script
    for _ in range(2):
        received = await _ask(transport)
        assert not isinstance(received.body, bytes)
        for expected in (b"data: 1\n\n", b"data: 2\n\n"):
            assert await received.body.__anext__() == expected
            upstream.go_on.set()
        assert await _body(received) == b""
        with pytest.raises(StopAsyncIteration):
            await received.body.__anext__()
    assert len(upstream.connections) == 1


async def test_interim_answers_are_skipped(transport: PooledTransport, upstream: RawUpstream) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    upstream.script = _always(b"HTTP/1.1 100 Continue\r\n\r\n" + early + OK)
    for _ in range(2):
        received = await _ask(transport)
        assert (received.status, list(received.headers)) == (200, [(b"content-length", b"2")])
        assert await _body(received) == b"ok"
    assert len(upstream.connections) == 1


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", b"200 OK"), ("HEAD", b"404 x"), ("GET", b"204 x"), ("GET", b"304 x")]
)
async def test_answers_without_a_body(
    transport: PooledTransport, upstream: RawUpstream, method: str, status: bytes
) -> None:
    upstream.script = _once(b"HTTP/1.1 %b\r\netag: x\r\ncontent-length: 2\r\n\r\n" % status)
    received = await _ask(transport, method)
    assert (received.status, received.body) == (int(status[:3]), b"")
    assert (b"etag", b"x") in received.headers
    await _still_works(transport)


async def test_a_body_may_end_with_the_connection(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n" + b"a" * 100_000, close=True)
    for _ in range(2):
        assert await _body(await _ask(transport)) == b"a" * 100_000
    assert len(upstream.connections) == 2


async def test_trailers_and_extensions_are_dropped(transport: PooledTransport, upstream: RawUpstream) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    upstream.script = _always(head + b"2;x=y\r\nok\r\n0\r\nx-trailer: 1\r\n\r\n")
    for _ in range(2):
        received = await _ask(transport)
        assert list(received.headers) == [(b"transfer-encoding", b"chunked")]
        assert await _body(received) == b"ok"
    assert len(upstream.connections) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        OK + b"\0",
        OK + OK,
        b"HTTP/1.1 204 x\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 500 x\r\n\r\n",
    ],
)
async def test_a_connection_with_something_left_over_is_not_used_again(
    transport: PooledTransport, upstream: RawUpstream, answer: bytes
) -> None:
    upstream.script = _once(answer)
    received = await _ask(transport)
    assert (received.status, await _body(received)) in [(200, b"ok"), (204, b"")]
    await _still_works(transport)
    assert len(upstream.connections) == 2


async def test_what_comes_unasked_is_no_answer(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        first = len(upstream.connections) == 1
        while connection.request():
            connection.send(OK)
            if first:
                upstream.ready.wait(5)
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
                upstream.go_on.set()

    upstream.script = script
    await _still_works(transport)
    upstream.ready.set()
    await anyio.to_thread.run_sync(upstream.go_on.wait)
    await anyio.sleep(0.05)
    await _still_works(transport)
    assert len(upstream.connections) == 2


LONG = b"a" * 1000

MALFORMED = {
    "nothing": b"",
    "not http": b"SSH-2.0-OpenSSH\r\n",
    "a request": b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nok",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "no status": b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\nok",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok",
    "a status below 100": b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok",
    "switching protocols": b"HTTP/1.1 101 x\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nok",
    "interim without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + OK,
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "a list of lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2, 3\r\n\r\nok",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok",
    "a length with a sign": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
    "no length": b"HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\nok",
    "a huge length": b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nok",
    "a coding not asked for": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked is not last": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a name with a space": b"HTTP/1.1 200 OK\r\nx y: 1\r\ncontent-length: 2\r\n\r\nok",
    "a space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok",
    "no name": b"HTTP/1.1 200 OK\r\n: 1\r\ncontent-length: 2\r\n\r\nok",
    "no colon": b"HTTP/1.1 200 OK\r\nx\r\ncontent-length: 2\r\n\r\nok",
    "nul in a value": b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 2\r\n\r\nok",
    "cr in a value": b"HTTP/1.1 200 OK\r\nx: a\rb\r\ncontent-length: 2\r\n\r\nok",
    "a negative chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-2\r\nok\r\n0\r\n\r\n",
    "no chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\nok\r\n0\r\n\r\n",
    "a huge chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffffffff\r\nok\r\n0\r\n\r\n",
    "a chunk that goes on": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokok\r\n0\r\n\r\n",
    "a body cut off": b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok",
    "no body": b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n",
    "chunks cut off": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
    "trailers cut off": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx: y\r\n",
    "a long value": b"HTTP/1.1 200 OK\r\nx: " + LONG * 200 + b"\r\ncontent-length: 2\r\n\r\nok",
    "a long name": b"HTTP/1.1 200 OK\r\n" + LONG * 200 + b": x\r\ncontent-length: 2\r\n\r\nok",
    "a long reason": b"HTTP/1.1 200 " + LONG * 200 + b"\r\ncontent-length: 2\r\n\r\nok",
    "many headers": b"HTTP/1.1 200 OK\r\n" + (b"x: " + LONG + b"\r\n") * 200 + b"content-length: 2\r\n\r\nok",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + (b"x: " + LONG + b"\r\n") * 1000,
    "trailers without end": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    + (b"x: " + LONG + b"\r\n") * 1000,
}


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/9.7", b"SSH-2.0"])
async def test_the_first_bytes_of_an_answer_may_come_one_by_one(
    transport: PooledTransport, upstream: RawUpstream, version: bytes
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        for byte in version:
            connection.send(bytes([byte]))
            time.sleep(0.02)
        connection.send(b" 200 OK\r\ncontent-length: 2\r\n\r\nok")
        connection.wait_closed()

    upstream.script = script
    if version == b"HTTP/1.1":
        assert await _body(await _ask(transport)) == b"ok"
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            await _ask(transport)


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_answer_is_an_error(transport: PooledTransport, upstream: RawUpstream, answer: bytes) -> None:
    answers = [answer]

    def script(connection: Connection) -> None:
        while connection.request():
            if answers:
                connection.send(answers.pop())
                return
            connection.send(OK)

    upstream.script = script
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)) as raised:
        await _body(await _ask(transport, "POST", headers=[(b"content-length", b"0")]))
    assert TOKEN.decode() not in str(raised.value)
    assert raised.value.__cause__ is None
    await _still_works(transport)
    # Sent once: nobody knows what the first one did.
    assert [request.line[:4] for request in upstream.requests] == [b"POST", b"GET "]


@pytest.mark.parametrize(
    "head",
    [
        b"x: a\r\n b\r\ncontent-length: 2\r\n",
        b"x: a\x01b\r\ncontent-length: 2\r\n",
        b"content-length: 7\r\ntransfer-encoding: chunked\r\n",
    ],
)
async def test_what_is_not_quite_right_is_refused_or_harmless(
    transport: PooledTransport, upstream: RawUpstream, head: bytes
) -> None:
    body = b"2\r\nok\r\n0\r\n\r\n" if b"chunked" in head else b"ok"
    upstream.script = _once(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)
    with suppress(httpx.RemoteProtocolError):
        received = await _ask(transport)
        assert await _body(received) == b"ok"
        assert not any(b"\n" in value or b"\r" in value for _, value in received.headers)
    await _still_works(transport)


async def test_a_reset_is_an_error(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            if len(upstream.requests) == 1:
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok")
                upstream.go_on.wait(5)
                return connection.reset()
            connection.send(OK)

    upstream.script = script
    received = await _ask(transport)
    upstream.go_on.set()
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        await _body(received)
    await _still_works(transport)


# Connections


async def test_one_that_was_closed_meanwhile_is_not_used(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(OK, close=True)
    for count in (1, 2, 3):
        await _still_works(transport)
        await anyio.sleep(0.05)
        assert len(upstream.connections) == count


async def test_a_request_is_not_sent_twice(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(OK)
        connection.request()

    upstream.script = script
    await _still_works(transport)
    with pytest.raises(httpx.RemoteProtocolError):
        await _ask(transport)
    assert len(upstream.requests) == 2


async def test_an_answer_ends_an_upload(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        if len(upstream.connections) == 1:
            connection.send(b"HTTP/1.1 413 x\r\ncontent-length: 2\r\n\r\nno")
            upstream.go_on.wait(10)
        else:
            connection.send(OK)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65536
            await anyio.lowlevel.checkpoint()

    upstream.script = script
    with anyio.fail_after(10):
        received = await _ask(transport, "POST", headers=[(b"content-length", b"65536000")], body=body(), write=1)
        assert (received.status, await _body(received)) == (413, b"no")
        await _still_works(transport)


@pytest.mark.parametrize(
    ("announced", "rest"),
    [
        ((b"content-length", b"2"), (b"b", b"")),
        ((b"transfer-encoding", b"chunked"), (b"b",)),
        ((b"transfer-encoding", b"chunked"), ()),
    ],
)
async def test_who_answers_before_the_end_of_an_upload_is_not_asked_again(
    transport: PooledTransport, upstream: RawUpstream, announced: tuple[bytes, bytes], rest: tuple[bytes, ...]
) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(OK)
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        await anyio.sleep(0.02)
        for piece in rest:
            yield piece

    assert await _body(await _ask(transport, "POST", headers=[announced], body=pieces())) == b"ok"
    upstream.script = _always(OK)
    await _still_works(transport)
    assert len(upstream.connections) == 2


async def test_who_answers_before_the_end_of_a_large_body_is_not_asked_again(
    transport: PooledTransport, upstream: RawUpstream
) -> None:
    size = 20_000_000

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(OK)
        while len(connection.buffer) < size and connection._more():
            pass
        connection.wait_closed()

    upstream.script = script
    received = await _ask(transport, "POST", headers=[(b"content-length", b"%d" % size)], body=b"x" * size)
    assert await _body(received) == b"ok"
    upstream.script = _always(OK)
    await _still_works(transport)
    assert len(upstream.connections) == 2


async def test_an_interim_answer_does_not_end_an_upload(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(connection.buffer) < 20:
            connection.buffer += connection.socket.recv(100)
        connection.send(OK)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"xx"
            await anyio.sleep(0.005)

    upstream.script = script
    received = await _ask(transport, "POST", headers=[(b"content-length", b"20")], body=body())
    assert await _body(received) == b"ok"


async def test_who_answers_and_closes_during_an_upload_is_heard(
    transport: PooledTransport, upstream: RawUpstream
) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 413 x\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
        connection.socket.shutdown(1)
        upstream.go_on.wait(10)

    upstream.script = script
    with anyio.fail_after(10):
        body = b"x" * 20_000_000
        received = await _ask(transport, "POST", headers=[(b"content-length", b"20000000")], body=body, write=1)
        assert (received.status, await _body(received)) == (413, b"no")


async def test_a_slow_upstream_slows_the_upload(transport: PooledTransport, upstream: RawUpstream) -> None:
    total = 64 * 1024 * 1024
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < total:
            taken += 65536
            yield b"x" * 65536
            await anyio.lowlevel.checkpoint()

    def script(connection: Connection) -> None:
        connection.head()
        upstream.ready.set()
        upstream.go_on.wait(10)
        left = total - len(connection.buffer)
        while left:
            left -= len(connection.socket.recv(1 << 20))
        connection.send(OK)

    upstream.script = script
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            headers = [(b"content-length", b"%d" % total)]
            assert await _body(await _ask(transport, "POST", headers=headers, body=body())) == b"ok"

        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(upstream.ready.wait)
        before = -1
        while before != taken:
            before = taken
            await anyio.sleep(0.1)
        assert taken < total / 2
        upstream.go_on.set()


async def test_a_slow_reader_slows_the_upstream(transport: PooledTransport, upstream: RawUpstream) -> None:
    total = 64 * 1024 * 1024
    sent = 0

    def script(connection: Connection) -> None:
        nonlocal sent
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            connection.send(b"x" * 65536)
            sent += 65536

    upstream.script = script
    received = await _ask(transport)
    before = -1
    while before != sent:
        before = sent
        await anyio.sleep(0.1)
    assert sent < total / 2
    assert not isinstance(received.body, bytes)
    size = 0
    async for piece in received.body:
        size += len(piece)
    assert size == total


async def test_closed_while_it_is_read_a_body_does_not_pass_for_whole(
    transport: PooledTransport, upstream: RawUpstream
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nab")
        connection.wait_closed()

    upstream.script = script
    body = (await _ask(transport)).body
    assert not isinstance(body, bytes)
    assert await anext(body) == b"ab"
    raised = []

    async def read() -> None:
        with pytest.raises(httpx.ReadError) as error:
            await anext(body)
        raised.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        await body.aclose()
    assert raised
    upstream.script = _always(OK)
    await _still_works(transport)


async def test_a_slot_is_waited_for(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
    held = await _ask(transport)
    with pytest.raises(httpx.PoolTimeout):
        await _ask(transport, pool=0.05)
    assert not isinstance(held.body, bytes)
    await held.body.aclose()
    await held.body.aclose()
    upstream.script = _always(OK)
    await _still_works(transport)
    assert len(upstream.requests) == 2


async def test_timeouts(transport: PooledTransport, upstream: RawUpstream) -> None:
    upstream.script = _always(b"")
    with pytest.raises(httpx.ReadTimeout):
        await _ask(transport, read=0.05)
    upstream.script = _always(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
    received = await _ask(transport, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        await _body(received)

    def deaf(connection: Connection) -> None:
        connection.head()
        upstream.go_on.wait(10)

    upstream.script = deaf
    with pytest.raises(httpx.WriteTimeout):
        await _ask(transport, "POST", headers=[(b"content-length", b"20000000")], body=b"x" * 20_000_000, write=0.05)
    upstream.script = _always(OK)
    await _still_works(transport)


@pytest.mark.parametrize("pieces", [[b"HTTP/1.1 103 Early Hints\r\n\r\n"] * 9, [OK[i : i + 1] for i in range(len(OK))]])
async def test_a_head_has_one_timeout_however_it_trickles(
    transport: PooledTransport, upstream: RawUpstream, pieces: list[bytes]
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        for piece in pieces:
            connection.send(piece)
            if upstream.go_on.wait(0.2):
                return
        connection.send(OK)

    upstream.script = script
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        await _ask(transport, read=0.5)
    assert 0.4 < time.monotonic() - began < 1.5
    upstream.go_on.set()
    upstream.script = _always(OK)
    await _still_works(transport)


async def test_a_head_that_is_late_with_its_last_byte_is_late(
    transport: PooledTransport, upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if that byte is here when somebody looks."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(OK[:20])
        upstream.go_on.wait(5)

    upstream.script = script
    for module, now in ((http11, 0.0), (fast, 0.0), (network, 5.0)):
        monkeypatch.setattr(module, "monotonic", partial(float, now))
    with anyio.fail_after(2), pytest.raises(httpx.ReadTimeout):
        await _ask(transport)


async def test_each_read_of_a_body_has_its_timeout(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        for _ in range(5):
            upstream.go_on.wait(0.25)
            connection.send(b"a")

    upstream.script = script
    assert await _body(await _ask(transport, read=0.8)) == b"aaaaa"


async def test_the_head_s_timeout_begins_with_the_request_s_last_byte(
    transport: PooledTransport, upstream: RawUpstream
) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2")
        while len(connection.buffer) < 5:
            connection.buffer += connection.socket.recv(100)
        connection.send(OK[10:])

    async def body() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x"
            await anyio.sleep(0.25)

    upstream.script = script
    received = await _ask(transport, "POST", headers=[(b"content-length", b"5")], body=body(), read=0.8)
    assert (received.status, await _body(received)) == (200, b"ok")


async def test_without_a_timeout_a_head_is_waited_for(transport: PooledTransport, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(OK[:20])
        upstream.go_on.wait(0.1)
        connection.send(OK[20:])

    upstream.script = script
    received = await transport.exchange("GET", b"/", [(b"host", b"api.test")], b"", {"connect": 5.0, "pool": 5.0})
    assert await _body(received) == b"ok"


async def test_nobody_listens(kind: Kind) -> None:
    transport = kind(origin="http://127.0.0.1:1", max_connections=1)
    for _ in range(2):
        with pytest.raises(httpx.ConnectError) as raised:
            await _ask(transport)
        assert raised.value.__cause__ is None
    await transport.aclose()


@pytest.mark.parametrize("moment", ["head", "body", "upload", "queue"])
async def test_who_leaves_takes_nothing_along(transport: PooledTransport, upstream: RawUpstream, moment: str) -> None:
    """At each point at which it waits; a slot that is lost would be the only one."""
    part = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok"
    upstream.script = _always(b"" if moment == "head" else part)
    held = await _ask(transport) if moment == "queue" else None

    async def never() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep_forever()

    with anyio.move_on_after(0.05) as leaving:
        if moment == "upload":
            await _ask(transport, "POST", headers=[(b"content-length", b"5")], body=never())
        else:
            await _body(await _ask(transport))
    assert leaving.cancelled_caught
    if held is not None:
        assert not isinstance(held.body, bytes)
        await held.body.aclose()
    upstream.script = _always(OK)
    await _still_works(transport)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("body", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok"])
async def test_a_task_that_is_cancelled_twice_takes_nothing_along(
    transport: PooledTransport, upstream: RawUpstream, body: bytes
) -> None:
    upstream.script = _always(body)

    async def exchange() -> None:
        await _body(await _ask(transport))

    for steps in range(12):
        task = asyncio.create_task(exchange())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    upstream.script = _always(OK)
    await _still_works(transport)


async def test_all_is_closed_in_the_end(kind: Kind, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(OK)
        connection.wait_closed()

    upstream.script = script
    transport = kind(origin=upstream.url, max_connections=2)
    assert await _body(await _ask(transport)) == b"ok"
    await transport.aclose()
    await anyio.to_thread.run_sync(upstream.all_closed, 1)
    assert len(upstream.closed_at) == 1


async def test_a_connection_is_kept_for_so_long(kind: Kind, upstream: RawUpstream) -> None:
    upstream.script = _always(OK)
    transport = kind(origin=upstream.url, max_connections=2, keepalive=0.05)
    await _still_works(transport)
    await anyio.sleep(0.06)
    await _still_works(transport)
    assert len(upstream.connections) == 2
    await transport.aclose()


# httpx's contract


async def test_a_client_can_use_it(kind: Kind, upstream: RawUpstream) -> None:
    with RawUpstream() as other:
        async with httpx.AsyncClient(transport=kind(max_connections=1), timeout=None) as client:
            for there in (upstream, other, upstream):
                answer = await client.post(there.url + "/x?y=1", json={"a": 1})
                assert (answer.status_code, answer.json(), answer.http_version) == (200, {}, "HTTP/1.1")
            async with client.stream("GET", upstream.url) as streamed:
                assert [piece async for piece in streamed.aiter_raw()] == [b"{}"]
            uploaded = await client.put(upstream.url, content=_pieces(b"ab", b"c"))
            assert uploaded.json() == {}
        assert [request.line for request in other.requests] == [b"POST /v1/x?y=1 HTTP/1.1"]
    assert upstream.requests[0].body == b'{"a":1}'
    assert upstream.requests[-1].body == b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"


async def test_a_client_streams_what_comes_in_parts(kind: Kind, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
        upstream.go_on.wait(5)
        connection.send(b"ok")

    upstream.script = script
    async with (
        httpx.AsyncClient(transport=kind(max_connections=1)) as client,
        client.stream("GET", upstream.url) as streamed,
    ):
        upstream.go_on.set()
        assert await streamed.aread() == b"okok"


async def test_only_http_is_spoken(kind: Kind) -> None:
    transport = kind(max_connections=1)
    with pytest.raises(httpx.UnsupportedProtocol):
        await transport.handle_async_request(httpx.Request("GET", "ftp://127.0.0.1/"))
    await transport.aclose()
