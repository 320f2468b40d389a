"""What is the fast transport's own; what it has in common with the default is in `test_transports.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw.upstream import fast
from replicate_proxy_mw.upstream.fast import FastConnection, FastTransport
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

TIMEOUT = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-a: 1\r\n\r\n"


class _Cut:
    """A stream that cuts what it gives where it is told to: a network cuts anywhere."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = [piece for piece in pieces if piece]
        self.written = b""

    async def read(self, max_bytes: int, seconds: float | None = None) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def write(self, buffer: bytes, seconds: float | None = None) -> None:
        self.written += buffer

    async def aclose(self) -> None:
        raise AssertionError

    def get_extra_info(self, info: str) -> Any:
        return {"is_readable": bool(self.pieces), "is_idle": not self.pieces}.get(info)


async def _get(*pieces: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes, bool]:
    connection = FastConnection(_Cut(*pieces))
    status, headers, body, whole = await connection.exchange("GET", b"/", [], b"", TIMEOUT)
    while not whole:
        piece, whole = await connection.more(5.0)
        body += piece
    return status, headers, body, connection.is_reusable()


async def test_where_an_answer_is_cut_does_not_matter() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"3\r\nabc\r\n2;x\r\nde\r\n0\r\nx-trailer: 1\r\n\r\n"
    expected = (200, [(b"transfer-encoding", b"chunked"), (b"x-a", b"1")], b"abcde", True)
    for cut in range(len(answer)):
        assert await _get(answer[:cut], answer[cut:]) == expected
    assert await _get(*(bytes([byte]) for byte in answer)) == expected


async def test_what_comes_along_with_an_error_is_given_first() -> None:
    connection = FastConnection(_Cut(HEAD + b"3\r\nabc\r\nx\r\n"))
    answered = await connection.exchange("GET", b"/", [], b"", TIMEOUT)
    assert (answered.body, answered.whole) == (b"abc", False)
    with pytest.raises(httpx.RemoteProtocolError):
        await connection.more(5.0)


@pytest.mark.parametrize("cut", [0, 100, 66_000])
async def test_a_head_may_be_so_long(cut: int) -> None:
    value = b"a" * (fast.MAX_HEAD - 200)
    fits = b"HTTP/1.1 200 OK\r\nx: %b\r\ncontent-length: 2\r\n\r\nok" % value
    too_long = fits.replace(b"x: ", b"x: " + b"a" * 200)
    assert (await _get(fits[:cut], fits[cut:]))[2:] == (b"ok", True)
    with pytest.raises(httpx.RemoteProtocolError):
        await _get(too_long[:cut], too_long[cut:])


async def test_a_body_may_be_longer_than_a_head() -> None:
    body = b"a" * (2 * fast.MAX_HEAD)
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    assert (await _get(answer))[2:] == (body, True)
    assert (await _get(*(answer[at : at + 1000] for at in range(0, len(answer), 1000))))[2:] == (body, True)


@pytest.mark.parametrize("ended", [b"", b"\r\n"])
async def test_a_version_before_chunks_has_none(ended: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await _get(HEAD.replace(b"1.1", b"1.0") + b"0\r\n" + ended)


async def test_a_coding_is_what_the_parser_takes_it_for() -> None:
    body = b"3\r\nabc\r\n0\r\n\r\n"
    assert (await _get(HEAD.replace(b"chunked", b"Chunked  ") + body))[2:] == (b"abc", True)
    connection = FastConnection(_Cut(HEAD.replace(b"chunked", b"chunked\t") + body))
    # Not first a head, and chunks as its body.
    with pytest.raises(httpx.RemoteProtocolError):
        await connection.exchange("GET", b"/", [], b"", TIMEOUT)


async def test_names_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_names", {b"host"})
    monkeypatch.setattr(fast, "MAX_NAMES", 2)
    for name in (b"host", b"a", b"b", b"b", b"a"):
        stream = _Cut(b"HTTP/1.1 204 x\r\n\r\n")
        await FastConnection(stream).exchange("GET", b"/", [(name, b"1")], b"", TIMEOUT)
        assert stream.written == b"GET / HTTP/1.1\r\n%b: 1\r\n\r\n" % name
    assert fast._names == {b"host", b"a"}
    with pytest.raises(httpx.LocalProtocolError):
        await FastConnection(_Cut()).exchange("GET", b"/", [(b"b c", b"1")], b"", TIMEOUT)


@pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed")
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_it_runs_on_uvloop(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b"x" * 1_000_000)

    upstream.script = script
    transport = FastTransport(origin=upstream.url, max_connections=2)

    async def get() -> None:
        received = await transport.exchange("GET", b"/", [], b"", TIMEOUT)
        assert not isinstance(received.body, bytes)
        assert sum([len(piece) async for piece in received.body]) == 1_000_000

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(get)
    await transport.aclose()
    assert len(upstream.connections) == 2
