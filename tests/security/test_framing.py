"""Row 17: where one request ends and the next begins is said anew, and no value can say more than its own."""

from __future__ import annotations

import socket
from typing import Literal
from urllib.parse import urlsplit

import pytest

from replicate_proxy_mw.testing import serve
from tests.raw_asgi import KEY, TOKEN, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream, Received
from tests.security.rows import row

pytestmark = pytest.mark.anyio

SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"2\r\n{}\r\n0\r\n"

# Some of it servers refuse, some they take for two requests, of which the second has no key.
REQUESTS = {
    "length and chunks": b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED + b"\r\n" + SMUGGLED,
    "chunks and length": b"transfer-encoding: chunked\r\ncontent-length: 100\r\n\r\n" + CHUNKED + b"\r\n" + SMUGGLED,
    "length and chunks that agree": b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED + b"\r\n",
    "two lengths": b"content-length: 2\r\ncontent-length: 42\r\n\r\n{}" + SMUGGLED,
    "two equal lengths": b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "a list of lengths": b"content-length: 2, 42\r\n\r\n{}" + SMUGGLED,
    "a length with a sign": b"content-length: +2\r\n\r\n{}" + SMUGGLED,
    "a negative length": b"content-length: -2\r\n\r\n{}" + SMUGGLED,
    "a length in hex": b"content-length: 0x2\r\n\r\n{}" + SMUGGLED,
    "a length without end": b"content-length: " + b"9" * 30 + b"\r\n\r\n{}" + SMUGGLED,
    "an unknown coding": b"transfer-encoding: xchunked\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "two codings": b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKED + b"\r\n" + SMUGGLED,
    "coding lines": b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED + b"\r\n" + SMUGGLED,
    "a space before the colon": b"transfer-encoding : chunked\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "a vertical tab": b"transfer-encoding: \x0bchunked\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "a folded line": b"accept: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "a bare CR": b"accept: a\rx-evil: 1\r\ncontent-length: 2\r\n\r\n{}",
    "a bare LF": b"accept: a\nx-evil: 1\r\ncontent-length: 2\r\n\r\n{}",
    "a NUL": b"accept: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
    "trailers": b"transfer-encoding: chunked\r\n\r\n" + CHUNKED + b"x-evil: 1\r\nauthorization: Bearer x\r\n\r\n",
    "a chunk's extension": b"transfer-encoding: chunked\r\n\r\n2;x=\ny\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that is no number": b"transfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunks that end in LF": b"transfer-encoding: chunked\r\n\r\n2\n{}\n0\n\n" + SMUGGLED,
}

HEADERS = {b"host", b"content-length", b"transfer-encoding", b"accept", b"via", b"authorization"}


def _is_one(sent: Received) -> bool:
    """Whether it is the request that has a key, told in one way, and nothing else."""
    names = [name for name, _ in sent.headers]
    return (
        sent.line == b"POST /v1/x HTTP/1.1"
        and {*names} <= HEADERS
        and len(names) == len({*names})
        and (b"content-length" in names) + (b"transfer-encoding" in names) == 1
        and sent.header(b"transfer-encoding") in ([], [b"chunked"])
        and sent.header(b"authorization") == [b"Bearer " + TOKEN.encode()]
        and sent.body in (b"{}", CHUNKED + b"\r\n")
        and not any(byte in b"\r\n\x00" for _, value in sent.headers for byte in value)
    )


def _asked(port: int, data: bytes) -> bytes:
    """All that is answered, empty if nothing is for three seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as caller:
        caller.sendall(data)
        try:
            answer = caller.recv(65536)
            # Not before, since it would be taken for a caller who has left.
            caller.shutdown(socket.SHUT_WR)
            return answer + b"".join(iter(lambda: caller.recv(65536), b""))
        except TimeoutError:
            return b""


@row("2.17")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_however_a_request_is_framed_upstream_gets_one_or_none(
    upstream: RawUpstream, http: Literal["h11", "httptools"]
) -> None:
    head = b"POST /v1/x HTTP/1.1\r\nhost: proxy.test\r\nx-portkey-api-key: pk-team-a\r\n"
    with serve(proxy(upstream.url), http=http) as served:
        for name, rest in REQUESTS.items():
            upstream.requests.clear()
            answer = _asked(urlsplit(served.url).port or 0, head + rest)
            assert answer.startswith(b"HTTP/1.1 "), name
            assert len(upstream.requests) <= 1, name
            assert all(_is_one(sent) for sent in upstream.requests), name
            assert b"smuggled" not in answer, name
    assert all(connection.buffer == b"" for connection in upstream.connections)


@row("2.17")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("framing", [[b"chunked"], [b"identity"], [b"chunked", b"gzip"], [b"xchunked"]])
async def test_framing_is_our_own(upstream: RawUpstream, framing: list[bytes]) -> None:
    """Of a server that lets both through."""
    headers = [
        KEY,
        *((b"transfer-encoding", value) for value in framing),
        (b"content-length", b"2"),
        (b"te", b"trailers"),
    ]
    assert (await call(proxy(upstream.url), http_scope("POST", "/v1/x", headers), b"{}")).status == 200
    [sent] = upstream.requests
    assert _is_one(sent)
    assert sent.header(b"content-length") == [b"2"]


@row("2.17")
@pytest.mark.parametrize(
    "lengths",
    [[b"2", b"2"], [b"2", b"3"], [b"2, 2"], [b"+2"], [b"-1"], [b"0x2"], [b" 2"], [b"2_0"], [b"\xb2"], [b"9" * 30]],
)
async def test_what_is_no_single_length_is_refused(upstream: RawUpstream, lengths: list[bytes]) -> None:
    headers = [KEY, *((b"content-length", value) for value in lengths)]
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1/x", headers), b"{}")
    assert (caller.status, upstream.requests) == (400, [])


@row("2.17")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("name", [b"accept", b"content-type", b"prefer", b"x-of-the-host"])
@pytest.mark.parametrize(
    "value", [b"a\r\nx-evil: 1", b"a\rb", b"a\nb", b"a\x00b", b"a\x0bb", b"a\x7f", b"\x1f", b"a\r\n b", b" a", b"a\t"]
)
async def test_a_value_that_could_end_its_line_is_refused(upstream: RawUpstream, name: bytes, value: bytes) -> None:
    app = proxy(upstream.url, options={"forward_headers": ["x-of-the-host"]})
    caller = await call(app, http_scope("POST", "/v1/x", [KEY, (name, value)]), b"{}")
    assert (caller.status, upstream.requests) == (400, [])


@row("2.17")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("value", [b"a\x01b", b"a\x00b", b"a\rset-cookie: x=1", b"a\x7f"])
async def test_a_value_of_an_answer_that_could_end_its_line_is_no_answer(upstream: RawUpstream, value: bytes) -> None:
    upstream.script = lambda connection: _answer(
        connection, b"content-length: 2\r\nx-request-id: " + value + b"\r\n\r\n{}"
    )
    caller = await call(proxy(upstream.url), http_scope())
    assert caller.status == 502
    assert caller.header(b"set-cookie") == []


@row("2.17")
@pytest.mark.usefixtures("either_transport")
async def test_trailers_of_an_answer_are_dropped(upstream: RawUpstream) -> None:
    trailers = b"x-request-id: of-the-trailer\r\nset-cookie: x=1\r\nlocation: https://evil.test\r\n"
    rest = b"transfer-encoding: chunked\r\ntrailer: x-request-id\r\n\r\n2\r\n{}\r\n0\r\n" + trailers + b"\r\n"
    upstream.script = lambda connection: _answer(connection, rest)
    caller = await call(proxy(upstream.url), http_scope())
    assert (caller.status, caller.content) == (200, b"{}")
    names = {name for name, _ in caller.headers}
    assert names.isdisjoint((b"x-request-id", b"set-cookie", b"location", b"trailer", b"transfer-encoding"))


def _answer(connection: Connection, rest: bytes) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + rest)
    connection.wait_closed()
