"""An upstream of plain sockets that fails in every way one can, and what a proxy has to make of each.

    with FaultServer() as upstream:
        config = ProxyConfig(upstream=upstream.url, read_timeout=0.5)
        app = ReplicateProxyMiddleware(host, key_resolver=..., config=config)
        upstream.fault("reset-in-head")
        ...  # a request to the app: the answer has to be FAULTS["reset-in-head"].expected
        assert len(upstream.requests) == 1
        assert upstream.settled() and upstream.open <= 1

Every fault can be met by name: see `FAULTS` and `FaultServer`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h11

Expected: TypeAlias = int | Literal["relayed", "cut"]
Origin: TypeAlias = Literal["http", "refused", "unknown", "backlog", "clear", "certificate"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, how it is played, and what a caller may get for it.

    - `expected`: the status of the proxy's own answer, for GET and POST alike, neither of which is sent again; or
      `relayed`: `status` and `content` to the byte; or `cut`: `status` and a beginning of `content`, without an end.
      Several where a proxy has the choice. They hold where no layer reads answers, and for a `connect_timeout`,
      `read_timeout` and `write_timeout` between 0.2 and 0.5 s.
    - `sent`: whether a byte of a request can arrive.
    - `status`, `content`: of an answer that is relayed.
    - `origin`: needs a port of its own, see `FaultServer.url_for`; `http` for those of `FaultServer.url`.
    - `reads`: how much of a request is read before the answer begins.
    - `answer`: its pieces, `pace` seconds apart; then `repeated` without end.
    - `then`: what becomes of the connection: it takes the next request, is closed, is reset, stays as it is until the
      proxy closes it, or takes nothing more for 0.6 s before that.
    """

    name: str
    expected: tuple[Expected, ...]
    sent: bool = True
    status: int = 200
    content: bytes = field(default=b"", repr=False)
    origin: Origin = "http"
    reads: Literal["nothing", "head", "part", "whole"] = "whole"
    answer: tuple[bytes, ...] = field(default=(), repr=False)
    repeated: bytes = field(default=b"", repr=False)
    pace: float = 0.0
    then: Literal["keep", "close", "reset", "hold", "stall"] = "hold"


def _fault(name: str, *expected: Expected, answer: bytes | Iterable[bytes] = (), **more: Any) -> Fault:
    pieces = (answer,) if isinstance(answer, bytes) else tuple(answer)
    return Fault(name=name, expected=expected, answer=pieces, **more)


def _single(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def _lines(count: int, size: int) -> bytes:
    return b"".join(b"x-%d: %b\r\n" % (number, b"a" * size) for number in range(count))


_OK = b"HTTP/1.1 200 OK\r\n"
_TYPE = b"content-type: text/plain\r\n"
_TEN = b"0123456789"
_LENGTH = _OK + _TYPE + b"content-length: 10\r\n\r\n"
_CHUNKED = _OK + _TYPE + b"transfer-encoding: chunked\r\n\r\n"
_CHUNKS = b"4\r\n0123\r\n6\r\n456789\r\n"
_LAST = b"0\r\n\r\n"
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_HTML = b"<!doctype html><script>alert(1)</script>"
_ZIPPED = gzip.compress(_TEN * 100, mtime=0)
_BOMB = gzip.compress(bytes(1 << 20), mtime=0) * 64
_POISON = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nPOISON"
_HOSTILE = (
    b"set-cookie: sid=1; path=/\r\nclear-site-data: *\r\nstrict-transport-security: max-age=1; includeSubDomains\r\n"
    b"service-worker-allowed: /\r\naccess-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n"
    b'refresh: 0; url=https://elsewhere.invalid/\r\nnel: {}\r\nreport-to: {}\r\nalt-svc: h2="elsewhere.invalid:443"\r\n'
    b"public-key-pins: max-age=1\r\nproxy-authenticate: Basic\r\nwww-authenticate: Basic\r\nkeep-alive: timeout=9\r\n"
    b"upgrade: h2c\r\nserver: x\r\nconnection: etag\r\netag: 1\r\n"
)


def _framed(content: bytes, *lines: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"".join(line + b"\r\n" for line in (b"HTTP/1.1 " + status, *lines, b"content-length: %d" % len(content)))
    return head + b"\r\n" + content


def _length(*lines: bytes) -> bytes:
    return _OK + _TYPE + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + _TEN


_TABLE = (
    # No connection, and so nothing is sent.
    _fault("refused", 502, origin="refused", sent=False),
    _fault("name-unknown", 502, origin="unknown", sent=False),
    _fault("connect-silent", 504, origin="backlog", sent=False),
    _fault("tls-refused", 502, origin="clear", sent=False, reads="nothing", answer=b"\x15\3\1\0\2\2\x28", then="close"),
    _fault("tls-plain-text", 502, origin="clear", sent=False, reads="nothing", answer=_LENGTH + _TEN, then="close"),
    _fault("tls-closed", 502, origin="clear", sent=False, reads="nothing", then="close"),
    _fault("tls-reset", 502, origin="clear", sent=False, reads="nothing", then="reset"),
    _fault("tls-silent", 504, origin="clear", sent=False, reads="nothing"),
    _fault("tls-wrong-certificate", 502, origin="certificate", sent=False, then="keep"),
    # A connection, and no answer.
    _fault("reset-on-accept", 502, reads="nothing", then="reset"),
    _fault("close-on-accept", 502, reads="nothing", then="close"),
    _fault("reset-after-head", 502, reads="head", then="reset"),
    _fault("close-after-head", 502, reads="head", then="close"),
    _fault("reset-in-upload", 502, reads="part", then="reset"),
    _fault("close-in-upload", 502, reads="part", then="close"),
    _fault("silence-in-upload", 504, reads="part", then="stall"),
    _fault("reset-before-head", 502, then="reset"),
    _fault("close-before-head", 502, then="close"),
    _fault("silence-before-head", 504),
    # Before the end of an upload there is an answer, which counts.
    _fault(
        "early-answer",
        "relayed",
        reads="head",
        answer=_framed(_TEN, status=b"413 x"),
        status=413,
        then="close",
        content=_TEN,
    ),
    _fault(
        "early-answer-reset",
        "relayed",
        502,
        reads="head",
        answer=_framed(_TEN, status=b"413 x"),
        status=413,
        then="reset",
        content=_TEN,
    ),
    # A head that is cut, slow or none.
    _fault("reset-in-head", 502, answer=_OK + b"content-le", then="reset"),
    _fault("close-in-head", 502, answer=_OK + b"content-le", then="close"),
    _fault("silence-in-head", 504, answer=_OK + b"content-le"),
    _fault("head-trickled", 504, answer=_OK + b"x: ", repeated=b"y", pace=0.1),
    _fault("head-by-bytes", "relayed", answer=_single(_LENGTH + _TEN), pace=0.0005, then="keep", content=_TEN),
    _fault("garbage", 502, answer=bytes(range(256)) * 4),
    _fault("another-protocol", 502, answer=b"SSH-2.0-OpenSSH_9.9\r\n"),
    _fault("http-0.9", 502, answer=b"<html>hello</html>\n", then="close"),
    _fault("bad-status-line", 502, answer=b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\nok"),
    _fault("bad-version", 502, answer=b"HTTP/9.7 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    _fault("status-099", 502, answer=b"HTTP/1.1 099 x\r\ncontent-length: 2\r\n\r\nok"),
    _fault("status-101", 502, answer=b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nok"),
    _fault("status-999", 502, answer=b"HTTP/1.1 999 x\r\ncontent-length: 2\r\n\r\nok", then="keep"),
    _fault("head-too-large", 502, answer=_length(b"x: " + b"a" * (1 << 20), b"content-length: 10")),
    _fault("head-just-too-large", 502, answer=_length(b"x: " + b"a" * (103 << 10), b"content-length: 10"), then="keep"),
    _fault("head-too-many-lines", 502, answer=_OK + _lines(20_000, 10) + b"\r\n"),
    _fault("head-without-end", 502, answer=_OK, repeated=_lines(100, 1000)),
    # 1xx are no answers.
    _fault("continue-first", "relayed", answer=_INTERIM + _LENGTH + _TEN, then="keep", content=_TEN),
    _fault(
        "early-hints-first",
        "relayed",
        answer=(b"HTTP/1.1 103 x\r\nlink: </a>\r\nset-cookie: a=b\r\n\r\n", _LENGTH + _TEN),
        pace=0.02,
        then="keep",
        content=_TEN,
    ),
    _fault("interim-flood", 502, answer=(), repeated=_INTERIM * 20),
    _fault("interim-trickled", 504, answer=(), repeated=_INTERIM, pace=0.1),
    # Where the body ends is not said, or twice.
    _fault("two-lengths", 502, answer=_length(b"content-length: 10", b"content-length: 5")),
    _fault(
        "one-length-twice",
        502,
        "relayed",
        answer=_length(b"content-length: 10", b"content-length: 10"),
        then="keep",
        content=_TEN,
    ),
    _fault("list-of-lengths", 502, answer=_length(b"content-length: 10, 5")),
    _fault("length-negative", 502, answer=_length(b"content-length: -10")),
    _fault("length-signed", 502, answer=_length(b"content-length: +10")),
    _fault("length-not-a-number", 502, answer=_length(b"content-length: ten")),
    _fault("length-too-large", 502, answer=_length(b"content-length: " + b"9" * 40)),
    _fault(
        "length-and-chunks",
        502,
        "relayed",
        answer=_OK + b"content-length: 3\r\n" + _CHUNKED[len(_OK) :] + _CHUNKS + _LAST,
        then="keep",
        content=_TEN,
    ),
    _fault("unknown-coding", 502, answer=_OK + b"transfer-encoding: zebra\r\n\r\n" + _TEN),
    _fault("coding-not-asked-for", 502, answer=_OK + b"transfer-encoding: gzip, chunked\r\n\r\n" + _CHUNKS + _LAST),
    _fault("http-1.0", "relayed", answer=b"HTTP/1.0 200 OK\r\n" + _TYPE + b"\r\n" + _TEN, then="close", content=_TEN),
    _fault(
        "http-1.0-chunks",
        502,
        "relayed",
        answer=b"HTTP/1.0" + _CHUNKED[8:] + _CHUNKS + _LAST,
        then="close",
        content=_TEN,
    ),
    _fault("no-length", "relayed", answer=_OK + _TYPE + b"\r\n" + _TEN, then="close", content=_TEN),
    _fault("no-length-reset", "cut", answer=_OK + _TYPE + b"\r\n" + _TEN, then="reset", content=_TEN),
    # Headers that are none.
    _fault("nul-in-value", 502, answer=_length(b"etag: a\0b", b"content-length: 10")),
    _fault("cr-in-value", 502, answer=_length(b"etag: a\rset-cookie: a=b", b"content-length: 10")),
    _fault(
        "lf-in-value",
        502,
        "relayed",
        answer=_length(b"etag: a\nset-cookie: a=b", b"content-length: 10"),
        then="keep",
        content=_TEN,
    ),
    _fault(
        "folded-value",
        502,
        "relayed",
        answer=_length(b"etag: a\r\n b", b"content-length: 10"),
        then="keep",
        content=_TEN,
    ),
    _fault("space-before-colon", 502, answer=_length(b"content-length : 10")),
    _fault("no-colon", 502, answer=_length(b"etag", b"content-length: 10")),
    _fault("no-name", 502, answer=_length(b": a", b"content-length: 10")),
    # A body that is cut, slow or none. Its status is out, so only the cut can tell.
    _fault("reset-before-body", "cut", answer=_LENGTH, then="reset", content=_TEN),
    _fault("close-before-body", "cut", answer=_LENGTH, then="close", content=_TEN),
    _fault("silence-before-body", "cut", answer=_LENGTH, content=_TEN),
    _fault("reset-in-body", "cut", answer=_LENGTH + _TEN[:5], then="reset", content=_TEN),
    _fault("length-cut", "cut", answer=_LENGTH + _TEN[:5], then="close", content=_TEN),
    _fault("silence-in-body", "cut", answer=_LENGTH + _TEN[:5], content=_TEN),
    _fault("chunk-cut", "cut", answer=_CHUNKED + _CHUNKS[:7] + b"4\r\n45", then="close", content=_TEN),
    _fault("last-chunk-missing", "cut", answer=_CHUNKED + _CHUNKS, then="close", content=_TEN),
    _fault("last-chunk-half", "cut", answer=_CHUNKED + _CHUNKS + b"0\r\n", then="close", content=_TEN),
    _fault("silence-in-chunks", "cut", answer=_CHUNKED + _CHUNKS, content=_TEN),
    _fault("bad-chunk-size", "cut", answer=_CHUNKED + _CHUNKS + b"zz\r\n", content=_TEN),
    _fault("negative-chunk-size", "cut", answer=_CHUNKED + _CHUNKS + b"-1\r\n", content=_TEN),
    _fault("huge-chunk-size", "cut", answer=_CHUNKED + _CHUNKS + b"f" * 30 + b"\r\n", content=_TEN),
    _fault("chunk-too-long", "cut", answer=_CHUNKED + _CHUNKS + b"2\r\n0123\r\n" + _LAST, content=_TEN + b"01"),
    _fault(
        "chunk-extension",
        "relayed",
        answer=_CHUNKED + b'a;x="y"\r\n' + _TEN + b"\r\n" + _LAST,
        then="keep",
        content=_TEN,
    ),
    _fault(
        "chunk-extension-too-large",
        "cut",
        answer=_CHUNKED + _CHUNKS + b"1;x=" + b"y" * (1 << 20) + b"\r\n0\r\n" + _LAST,
        content=_TEN + b"0",
    ),
    _fault(
        "trailers",
        "relayed",
        answer=_CHUNKED + _CHUNKS + b"0\r\nset-cookie: a=b\r\netag: 1\r\n\r\n",
        then="keep",
        content=_TEN,
    ),
    _fault(
        "trailers-without-end", "cut", answer=_CHUNKED + _CHUNKS + b"0\r\n", repeated=_lines(100, 1000), content=_TEN
    ),
    _fault("body-by-bytes", "relayed", answer=[_LENGTH, *_single(_TEN)], pace=0.0005, then="keep", content=_TEN),
    _fault(
        "body-trickled",
        "relayed",
        answer=(_LENGTH, b"01", b"23", b"45", b"67", b"89"),
        pace=0.1,
        then="keep",
        content=_TEN,
    ),
    _fault(
        "chunks-by-bytes",
        "relayed",
        answer=[_CHUNKED, *_single(_CHUNKS + _LAST)],
        pace=0.0005,
        then="keep",
        content=_TEN,
    ),
    # More than an answer: what is left over must not answer the next request.
    _fault("surplus", "relayed", answer=_LENGTH + _TEN + b"more", content=_TEN),
    _fault("second-answer", "relayed", answer=_LENGTH + _TEN + _POISON, then="keep", content=_TEN),
    _fault("second-answer-late", "relayed", answer=(_LENGTH + _TEN, _POISON), pace=0.02, then="keep", content=_TEN),
    _fault(
        "second-answer-after-chunks", "relayed", answer=_CHUNKED + _CHUNKS + _LAST + _POISON, then="keep", content=_TEN
    ),
    _fault("body-with-204", "relayed", status=204, answer=b"HTTP/1.1 204 x\r\n\r\nmore"),
    _fault("length-with-204", "relayed", status=204, answer=_framed(_TEN, status=b"204 x"), then="keep"),
    _fault("body-with-304", "relayed", status=304, answer=_framed(_TEN, b"etag: 1", status=b"304 x"), then="keep"),
    _fault("body-with-head", "relayed", answer=_LENGTH + _TEN, then="keep", content=_TEN),
    _fault("connection-close", "relayed", answer=_framed(_TEN, b"connection: close"), then="close", content=_TEN),
    _fault("connection-close-unkept", "relayed", answer=_framed(_TEN, b"connection: close"), content=_TEN),
    # What is whole but not as it should be passes, but for headers that are not for callers.
    _fault(
        "gzip-corrupt",
        "relayed",
        answer=_framed(b"\x1f\x8b" + _TEN, b"content-encoding: gzip"),
        then="keep",
        content=b"\x1f\x8b" + _TEN,
    ),
    _fault(
        "gzip-truncated",
        "relayed",
        answer=_framed(_ZIPPED[:-9], b"content-encoding: gzip"),
        then="keep",
        content=_ZIPPED[:-9],
    ),
    _fault("gzip-bomb", "relayed", answer=_framed(_BOMB, b"content-encoding: gzip"), then="keep", content=_BOMB),
    _fault(
        "redirect",
        "relayed",
        status=302,
        answer=_framed(b"", b"location: https://elsewhere.invalid/v1/x", status=b"302 x"),
        then="keep",
    ),
    _fault(
        "hostile-headers",
        "relayed",
        answer=_OK + _HOSTILE + b"content-length: 10\r\n\r\n" + _TEN,
        then="keep",
        content=_TEN,
    ),
    _fault(
        "error-with-html",
        "relayed",
        status=500,
        answer=_framed(_HTML, b"content-type: text/html", status=b"500 x"),
        then="keep",
        content=_HTML,
    ),
    _fault("untyped", "relayed", answer=_framed(_HTML), then="keep", content=_HTML),
    _fault(
        "too-many-requests",
        "relayed",
        status=429,
        answer=_framed(_TEN, b"retry-after: 1", status=b"429 x"),
        then="keep",
        content=_TEN,
    ),
    _fault(
        "unavailable",
        "relayed",
        status=503,
        answer=_framed(_TEN, b"retry-after: 1", status=b"503 x"),
        then="keep",
        content=_TEN,
    ),
)

FAULTS: Mapping[str, Fault] = {fault.name: fault for fault in _TABLE}
"""All of them, by name."""


# A certificate of nobody.invalid, signed by itself, and its key, which is no secret: DER in base64.
_CERTIFICATE = """
MIIBpDCCAUqgAwIBAgIUZjjgZIG9HGgxGfKNsqF/SeU6OmgwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwObm9ib2R5LmludmFsaWQwIBcNMjYxMTIyMTMyMDI2WhgPMjEy
NjEwMjkxMzIwMjZaMBkxFzAVBgNVBAMMDm5vYm9keS5pbnZhbGlkMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAE+TNKOG9nYJLHfJkLYDjOtjwG7mk0+cp8EKiWJfYO
POmVP3rmLJ/y7lwaIvGCZQTFkyFGkUNwDXcrkyUe6uOJEqNuMGwwHQYDVR0OBBYE
FPUk7aGVLCAlLKJgadNd0qG50XJBMB8GA1UdIwQYMBaAFPUk7aGVLCAlLKJgadNd
0qG50XJBMA8GA1UdEwEB/wQFMAMBAf8wGQYDVR0RBBIwEIIObm9ib2R5LmludmFs
aWQwCgYIKoZIzj0EAwIDSAAwRQIhANwfrLvXOMuLeRvGhbXX0amQXqmUAme8pGgl
8voe3xDxAiBa0YZ64nsFEFQiC8T6Gc155VnDpA2ECrUD+bh+rrGxSw==
"""
_KEY = """
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgxNm5g5Jam0EUffJo
1V/8kVudBdGEGkC83NIu1a78ZSuhRANCAAT5M0o4b2dgksd8mQtgOM62PAbuaTT5
ynwQqJYl9g486ZU/euYsn/LuXBoi8YJlBMWTIUaRQ3ANdyuTJR7q44kS
"""


@dataclass(eq=False)
class FaultedRequest:
    """A request as far as it has arrived.

    - `method`, `target`, `headers`: of its head, names in lower case.
    - `fault`: the name of what was played, None for an answer without fault.
    - `size`: bytes of its body so far; `whole`: its end has come.
    """

    method: str
    target: str
    headers: list[tuple[bytes, bytes]] = field(repr=False)  # they hold tokens
    fault: str | None = None
    size: int = 0
    whole: bool = False


class FaultServer:
    """An upstream that plays `FAULTS` over real sockets, and answers well when none is asked for.

    What is played is named, in this order, by the request's header `x-fault` (which a proxy has to be told to pass on),
    by the last segment of its path, or by `fault` for all that come. A good answer is 200 with the request's method,
    target and size of body as JSON.

    Attributes:
        requests: what has arrived, in the order of its heads, from all connections.
        opened: connections accepted so far.
    """

    def __init__(self) -> None:
        self.requests: list[FaultedRequest] = []
        self.opened = 0
        self._fault: Fault | None = None
        self._connections: dict[_Connection, threading.Thread] = {}
        self._ports: dict[str, int] = {}
        self._listeners: dict[socket.socket, threading.Thread | None] = {}
        self._fillers: list[socket.socket] = []
        self._stopped = threading.Event()

    def __enter__(self) -> FaultServer:
        self._listen("http", None)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for listener, thread in self._listeners.items():
            if thread is not None:
                socket.create_connection(listener.getsockname()).close()
                thread.join()
            listener.close()
        for connection, thread in list(self._connections.items()):
            connection.end(socket.SHUT_RDWR)
            thread.join()
        for filler in self._fillers:
            filler.close()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>/v1`, for a proxy's `upstream`."""
        return f"http://127.0.0.1:{self._ports['http']}/v1"

    def url_for(self, name: str) -> str:
        """Where fault `name` can be met: at `url`, or at an origin where nothing else happens.

        Raises:
            KeyError: there is no such fault.
        """
        fault = FAULTS[name]
        if fault.origin == "http":
            return self.url
        if fault.origin == "unknown":
            return "https://nobody.invalid/v1"  # never a name (RFC 6761, section 6.4)
        if name not in self._ports:
            self._listen(name, fault)
        scheme = "http" if fault.origin in ("refused", "backlog") else "https"
        return f"{scheme}://127.0.0.1:{self._ports[name]}/v1"

    def fault(self, name: str | None) -> None:
        """Play `name` for all that comes from now on, None for good answers. Closes idle connections, so that a proxy
        has to open another one, and may meet the fault there.

        Raises:
            KeyError: there is no such fault.
            ValueError: it has an origin of its own, see `url_for`.
        """
        fault = None if name is None else FAULTS[name]
        if fault is not None and fault.origin != "http":
            raise ValueError(f"{name}: only at url_for({name!r})")
        self._fault = fault
        for connection in list(self._connections):
            if connection.idle:
                connection.end(socket.SHUT_WR)

    @property
    def open(self) -> int:
        """Connections that neither the other side has closed nor this one reset."""
        return len(self._connections)

    def settled(self, seconds: float = 2.0) -> bool:
        """Whether within so many seconds each connection is closed, or idle and able to take a request."""
        return _within(seconds, lambda: all(connection.idle for connection in list(self._connections)))

    def all_closed(self, seconds: float = 2.0) -> bool:
        """Whether within so many seconds each connection is closed."""
        return _within(seconds, lambda: not self._connections)

    def _listen(self, name: str, fault: Fault | None) -> None:
        listener = socket.socket()
        self._listeners[listener] = None
        # One that is bound and does not listen refuses.
        listener.bind(("127.0.0.1", 0))
        self._ports[name] = listener.getsockname()[1]
        if fault is not None and fault.origin == "backlog":
            # Linux drops what exceeds it, and the other side waits.
            listener.listen(0)
            for _ in range(3):
                filler = socket.socket()
                self._fillers.append(filler)
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
        elif fault is None or fault.origin != "refused":
            listener.listen(512)
            thread = threading.Thread(target=self._accept, args=(listener, fault), name=__name__)
            self._listeners[listener] = thread
            thread.start()

    def _accept(self, listener: socket.socket, fault: Fault | None) -> None:
        while True:
            accepted, _ = listener.accept()
            if self._stopped.is_set():
                accepted.close()
                return
            connection = _Connection(accepted, self, fault or self._fault)
            thread = threading.Thread(target=self._play, args=(connection,), name=__name__)
            self._connections[connection] = thread
            self.opened += 1
            thread.start()

    def _play(self, connection: _Connection) -> None:
        # Whoever is gone, or sends no HTTP, gets no more.
        with contextlib.suppress(OSError, h11.RemoteProtocolError):
            connection.play()
        connection.socket.close()
        del self._connections[connection]

    def _named(self, request: FaultedRequest) -> Fault | None:
        """What `request` asks for, else what is played for all."""
        header = dict(request.headers).get(b"x-fault", b"").decode("latin-1")
        segment = request.target.partition("?")[0].rpartition("/")[2]
        found = FAULTS.get(header) or FAULTS.get(segment)
        return found if found is not None and found.origin == "http" else self._fault

    def _paused(self, seconds: float) -> bool:
        """Wait; False if the server is to stop."""
        return not self._stopped.wait(seconds)


class _Connection:
    """The upstream's end of one connection; `idle` while it waits for a request."""

    def __init__(self, accepted: socket.socket, server: FaultServer, fault: Fault | None) -> None:
        self.socket = accepted
        self.idle = False
        self._server = server
        self._fault = fault
        self._h11 = h11.Connection(h11.SERVER)
        self._request: FaultedRequest | None = None

    def play(self) -> None:
        # A byte goes out when it is sent.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fault = self._fault
        if fault is not None and fault.origin == "certificate":
            self._secure()
        if fault is not None and fault.origin == "clear":
            self.socket.recv(65536)
        if fault is not None and fault.reads == "nothing":
            self._answer(fault)
            self._leave(fault)
            return
        while (request := self._next()) is not None:
            fault = self._server._named(request)
            request.fault = None if fault is None else fault.name
            if not self._read(request, "whole" if fault is None else fault.reads):
                return
            if fault is None:
                self.socket.sendall(_good(request))
                continue
            self._answer(fault)
            if fault.then != "keep":
                self._leave(fault)
                return

    def end(self, direction: int) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(direction)

    def _secure(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "certificate.pem")
            path.write_text(_pem("CERTIFICATE", _CERTIFICATE) + _pem("PRIVATE KEY", _KEY))
            context.load_cert_chain(path)
        self.socket = secured = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        try:
            secured.do_handshake()
        except OSError:
            # It is refused, and then to be closed by who refused it.
            self.socket = socket.socket(fileno=secured.detach())
            self._drain()
            raise

    def _next(self) -> FaultedRequest | None:
        """The head of the next request, None when the other side has closed."""
        self.idle = True
        self._event()
        self.idle = False
        return self._request

    def _read(self, request: FaultedRequest, reads: str) -> bool:
        """Read so much of the rest; False if it does not come."""
        while not request.whole and (reads == "whole" or (reads == "part" and not request.size)):
            if not self._event():
                return False
        return True

    def _event(self) -> bool:
        """Note what comes next; False at the end."""
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            data = self.socket.recv(65536)
            if not data:
                return False
            self._h11.receive_data(data)
        if isinstance(event, h11.Request):
            self._request = FaultedRequest(event.method.decode(), event.target.decode("latin-1"), list(event.headers))
            self._server.requests.append(self._request)
            return True
        assert self._request is not None
        if isinstance(event, h11.Data):
            self._request.size += len(event.data)
        else:
            # The end of a message. What follows is another request, whatever was answered to this one.
            self._request.whole = True
            rest, _ = self._h11.trailing_data
            self._request, self._h11 = None, h11.Connection(h11.SERVER)
            if rest:
                self._h11.receive_data(rest)
        return True

    def _answer(self, fault: Fault) -> None:
        for number, piece in enumerate(fault.answer):
            if number and not self._server._paused(fault.pace):
                return
            self.socket.sendall(piece)
        while fault.repeated and self._server._paused(fault.pace):
            self.socket.sendall(fault.repeated)

    def _leave(self, fault: Fault) -> None:
        if fault.then == "reset":
            # After what was sent has been read.
            self._server._paused(0.02 if fault.answer else 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if fault.then == "stall":
            self._server._paused(0.6)
        elif fault.then == "close":
            self.end(socket.SHUT_WR)
        self._drain()

    def _drain(self) -> None:
        """Take what comes until the other side closes."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while self._event():
                pass
        while self.socket.recv(65536):
            pass


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _good(request: FaultedRequest) -> bytes:
    told = json.dumps({"method": request.method, "target": request.target, "size": request.size}).encode()
    answer = _framed(told, b"content-type: application/json")
    return answer[: -len(told)] if request.method == "HEAD" else answer


def _pem(kind: str, data: str) -> str:
    return f"-----BEGIN {kind}-----{data}-----END {kind}-----\n"
