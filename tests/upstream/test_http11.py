from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.upstream.http11 import MAX_HEAD, MAX_INTERIM, SMALL_BODY, Http11Connection
from replicate_proxy_mw.upstream.network import connect
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

TIMEOUT = {"read": 5.0, "write": 5.0}
HOST = (b"host", b"host.test")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


async def _open(upstream: RawUpstream) -> Http11Connection:
    return Http11Connection(await connect("127.0.0.1", upstream.port, ssl_context=None, seconds=5))


async def _exchange(
    upstream: RawUpstream,
    *headers: tuple[bytes, bytes],
    method: str = "POST",
    target: bytes = b"/x",
    body: Any = b"",
    **timeout: float,
) -> tuple[int, list[tuple[bytes, bytes]], bytes, bool]:
    """Status, headers and body of an answer, and whether the connection can be used again."""
    connection = await _open(upstream)
    try:
        status, fields, content, whole = await connection.exchange(
            method, target, [HOST, *headers], body, {**TIMEOUT, **timeout}
        )
        while not whole:
            more, whole = await connection.more(timeout.get("read", 5.0))
            content += more
        return status, fields, content, connection.is_reusable()
    finally:
        await connection.aclose()


def _answering(*pieces: bytes, close: bool = False) -> Callable[[Connection], None]:
    """Answers a request with `pieces`, and keeps the connection open unless told otherwise."""

    def script(connection: Connection) -> None:
        connection.request()
        for piece in pieces:
            connection.send(piece)
        if not close:
            connection.wait_closed()

    return script


def _pieces(*pieces: bytes) -> Chunks:
    return Chunks(pieces)


async def test_the_wire(upstream: RawUpstream) -> None:
    upstream.script = _answering(b"HTTP/1.1 201 Created\r\nX-Odd: a  b\r\ncontent-length: 2\r\n\r\n{}")
    answer = await _exchange(upstream, (b"X-Case", b""), (b"content-length", b"3"), target=b"/a%2F|?x=%20", body=b"abc")
    assert answer == (201, [(b"X-Odd", b"a  b"), (b"content-length", b"2")], b"{}", True)
    [received] = upstream.requests
    assert received.head == b"POST /a%2F|?x=%20 HTTP/1.1\r\nhost: host.test\r\nX-Case: \r\ncontent-length: 3"
    assert received.body == b"abc"


@pytest.mark.parametrize(
    ("headers", "body", "sent"),
    [
        ([(b"content-length", b"3")], _pieces, b"abc"),
        ([(b"Transfer-Encoding", b"chunked")], _pieces, b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"),
        ([(b"transfer-encoding", b"chunked")], b"abc", b"3\r\nabc\r\n0\r\n\r\n"),
        ([(b"content-length", b"3"), (b"connection", b"keep-alive")], b"abc", b"abc"),
    ],
)
async def test_a_body_is_framed_as_announced(upstream: RawUpstream, headers: Any, body: Any, sent: bytes) -> None:
    upstream.script = _answering(OK)
    body = body if isinstance(body, bytes) else body(b"a", b"bc")
    assert (await _exchange(upstream, *headers, body=body))[2:] == (b"{}", True)
    assert upstream.requests[0].body == sent


@pytest.mark.parametrize("length", [SMALL_BODY, SMALL_BODY + 1, 1_000_000])
async def test_a_body_of_any_size(upstream: RawUpstream, length: int) -> None:
    upstream.script = _answering(OK)
    assert (await _exchange(upstream, (b"content-length", b"%d" % length), body=b"a" * length))[3]
    assert len(upstream.requests[0].body) == length


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([(b"content-length", b"2")], b"abc"),
        ([(b"content-length", b"4")], b"abc"),
        ([], b"abc"),
        ([(b"content-length", b"2")], (b"abc",)),
        ([(b"content-length", b"4")], (b"abc",)),
        ([(b"content-length", b"1")], ()),
        ([], (b"a",)),
        ([(b"content-length", b"1"), (b"content-length", b"2")], b"a"),
        ([(b"content-length", b"1"), (b"content-length", b"1")], b"a"),
        ([(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], b"a"),
        ([(b"content-length", b"1, 1")], (b"a",)),
        ([(b"content-length", b"+1")], (b"a",)),
        ([(b"transfer-encoding", b"gzip")], b"abc"),
    ],
)
async def test_a_body_that_does_not_fit_its_headers_is_not_sent_whole(
    upstream: RawUpstream, headers: Any, body: Any
) -> None:
    upstream.script = _answering(OK)
    with pytest.raises(httpx.LocalProtocolError):
        await _exchange(upstream, *headers, body=_pieces(*body) if isinstance(body, tuple) else body)


@pytest.mark.parametrize(
    "odd",
    [
        {"target": b"/a b"},
        {"target": b"/a\r\nx: y"},
        {"target": b""},
        {"target": b"/\xff"},
        {"method": "GET /x"},
        {"method": ""},
        {"method": "G\u00c9T"},
        {"name": b"x:"},
        {"name": b"x: y"},
        {"name": b""},
        {"name": b"x y"},
        {"name": b"x\r\ny"},
        {"value": b"a\r\nx: y"},
        {"value": b"a\nx: y"},
        {"value": b"a\rb"},
        {"value": b"\x00"},
        {"value": b"a\r\n\r\nGET / HTTP/1.1"},
    ],
)
async def test_a_head_that_says_more_than_it_should_is_not_sent(upstream: RawUpstream, odd: Any) -> None:
    header = (odd.get("name", b"x-name"), odd.get("value", b"secret"))
    line = {name: odd[name] for name in ("method", "target") if name in odd}
    with pytest.raises(httpx.LocalProtocolError) as raised:
        await _exchange(upstream, header, **line)
    assert "secret" not in str(raised.value)
    assert not upstream.requests


async def test_interim_answers_are_passed_over(upstream: RawUpstream) -> None:
    upstream.script = _answering(
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * (MAX_INTERIM - 1), OK
    )
    assert await _exchange(upstream) == (200, [(b"content-length", b"2")], b"{}", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * (MAX_INTERIM + 1) + OK,
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\x16\x03\x01",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * (MAX_HEAD + 70000),
    ],
)
async def test_an_answer_that_is_none(upstream: RawUpstream, answer: bytes) -> None:
    upstream.script = _answering(answer)
    with pytest.raises(httpx.RemoteProtocolError) as raised:
        await _exchange(upstream, (b"authorization", b"Bearer secret"))
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-le"])
async def test_a_connection_that_ends_before_the_answer(upstream: RawUpstream, answer: bytes) -> None:
    upstream.script = _answering(answer, close=True)
    with pytest.raises(httpx.RemoteProtocolError):
        await _exchange(upstream)


async def test_a_reset_before_the_answer(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.reset()

    upstream.script = script
    with pytest.raises(httpx.ReadError):
        await _exchange(upstream)


async def test_silence_before_the_answer(upstream: RawUpstream) -> None:
    upstream.script = _answering()
    with pytest.raises(httpx.ReadTimeout):
        await _exchange(upstream, read=0.05)


async def test_silence_within_the_answer(upstream: RawUpstream) -> None:
    upstream.script = _answering(OK[:-1])
    with pytest.raises(httpx.ReadTimeout):
        await _exchange(upstream, read=0.05)


@pytest.mark.parametrize(
    ("method", "status", "headers"),
    [
        ("HEAD", b"200", b"content-length: 5\r\n"),
        ("GET", b"204", b""),
        ("GET", b"304", b"content-length: 5\r\n"),
        ("POST", b"200", b"content-length: 0\r\n"),
    ],
)
async def test_answers_without_a_body(upstream: RawUpstream, method: str, status: bytes, headers: bytes) -> None:
    upstream.script = _answering(b"HTTP/1.1 %s X\r\n%s\r\n" % (status, headers))
    answer = await _exchange(upstream, method=method)
    assert (answer[0], *answer[2:]) == (int(status), b"", True)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "body", "reusable"),
    [
        ([CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"], b"abcde", True),
        ([CHUNKED, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n", b"x-trailer: y\r\n\r\n"], b"abcde", True),
        ([b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"], b"{}", False),
        ([b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"], b"{}", False),
        ([OK + b"x"], b"{}", False),
        ([OK + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstray"], b"{}", False),
        ([CHUNKED + b"0\r\n\r\nx"], b"", False),
    ],
)
async def test_where_a_body_ends(upstream: RawUpstream, pieces: list[bytes], body: bytes, reusable: bool) -> None:
    upstream.script = _answering(*pieces)
    assert (await _exchange(upstream))[2:] == (body, reusable)


async def test_a_body_that_ends_with_its_connection(upstream: RawUpstream) -> None:
    upstream.script = _answering(b"HTTP/1.1 200 OK\r\n\r\n", b"abc", close=True)
    assert (await _exchange(upstream))[2:] == (b"abc", False)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"3\r\nabc\r\nzz\r\n",
        CHUNKED + b"3\r\nabcde\r\n",
        CHUNKED + b"3\r\nabc\r\n0\r\nbad trailer\r\n\r\n",
    ],
)
async def test_what_came_before_a_body_broke_off_is_handed_on(upstream: RawUpstream, answer: bytes) -> None:
    upstream.script = _answering(answer, close=True)
    connection = await _open(upstream)
    content = (await connection.exchange("GET", b"/", [HOST], b"", TIMEOUT)).body

    async def rest() -> None:
        nonlocal content
        while True:
            content += (await connection.more(5))[0]

    with pytest.raises(httpx.RemoteProtocolError) as raised:
        await rest()
    assert content == b"abc"
    assert "abc" not in str(raised.value)
    await connection.aclose()


async def test_an_event_is_handed_on_before_the_next_one_comes(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(CHUNKED + b"6\r\ndata: \r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"1\r\nx\r\n0\r\n\r\n")
        connection.wait_closed()

    upstream.script = script
    connection = await _open(upstream)
    content, whole = (await connection.exchange("GET", b"/", [HOST], b"", TIMEOUT))[2:]
    if not content:
        content, whole = await connection.more(5)
    assert (content, whole) == (b"data: ", False)
    upstream.go_on.set()
    assert await connection.more(5) == (b"x", True)
    await connection.aclose()


def _refuses(connection: Connection) -> None:
    """Answers and closes with the upload unread."""
    connection.head()
    connection.answer(b"too large", status=b"413 Content Too Large")
    connection.upstream.go_on.wait(0.1)


def _lingers(connection: Connection) -> None:
    """Answers and says no more, but reads on, so that no reset overtakes the answer."""
    connection.head()
    connection.answer(b"too large", status=b"413 Content Too Large")
    connection.socket.shutdown(socket.SHUT_WR)
    connection.wait_closed()


def _stalls(connection: Connection) -> None:
    """Answers and takes no more."""
    connection.head()
    connection.answer(b"too large", status=b"413 Content Too Large")
    connection.upstream.go_on.wait(5)


@pytest.mark.parametrize("script", [_refuses, _lingers, _stalls])
@pytest.mark.parametrize("announced", [(b"content-length", b"%d" % (500 * 65536)), (b"transfer-encoding", b"chunked")])
async def test_an_early_answer_is_read_although_the_upload_fails(
    upstream: RawUpstream, script: Any, announced: tuple[bytes, bytes]
) -> None:
    upstream.script = script
    connection = await _open(upstream)
    answer = await connection.exchange(
        "POST", b"/", [HOST, announced], _pieces(*[b"a" * 65536] * 500), {**TIMEOUT, "write": 1}
    )
    content, whole = answer.body, answer.whole
    while not whole:
        more, whole = await connection.more(5)
        content += more
    assert (answer.status, content) == (413, b"too large")
    if script is not _lingers:
        assert not connection.is_reusable()
    await connection.aclose()


async def test_an_upload_that_nobody_takes_ends_in_time(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.upstream.go_on.wait(5)

    upstream.script = script
    with pytest.raises(httpx.WriteTimeout):
        await _exchange(upstream, (b"content-length", b"20000000"), body=b"a" * 20_000_000, write=0.1)


async def test_what_a_body_raises_comes_through(upstream: RawUpstream) -> None:
    class Left(Exception):
        pass

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        raise Left

    with pytest.raises(Left):
        await _exchange(upstream, (b"transfer-encoding", b"chunked"), body=body())


async def test_the_next_request_waits_for_no_state_of_the_last(upstream: RawUpstream) -> None:
    connection = await _open(upstream)
    for _ in range(3):
        assert connection.is_usable()
        await connection.exchange("GET", b"/", [HOST], b"", TIMEOUT)
        assert connection.is_reusable()
    await connection.aclose()
    assert len(upstream.requests) == 3
