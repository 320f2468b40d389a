from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from urllib.parse import urlsplit

import pytest

from replicate_proxy_mw.testing import FAULTS, FaultServer

POST = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n%b\r\nbody"
GOOD = b"GET /v1/good HTTP/1.1\r\nhost: x\r\n\r\n"
TOLD = b'{"method": "GET", "target": "/v1/good", "size": 0}'


@pytest.fixture
def upstream() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


def _connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=3)


def _ask(connection: socket.socket, request: bytes) -> bytes:
    """What comes at once."""
    connection.sendall(request)
    return connection.recv(65536)


def _played(connection: socket.socket, at_least: int, pace: float) -> tuple[bytes, str]:
    """What comes until the end, and which end that is, or until it is enough and no end."""
    received = b""
    try:
        while len(received) < at_least:
            piece = connection.recv(65536)
            if not piece:
                return received, "close"
            received += piece
        connection.settimeout(0.15 if pace else 0.03)
        if not (piece := connection.recv(65536)):
            return received, "close"
        return received + piece, "more"
    except TimeoutError:
        return received, "open"
    except ConnectionResetError:
        return received, "reset"


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 35
    for name, fault in FAULTS.items():
        assert name == fault.name
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert fault.expected
        assert {*fault.expected} <= {"relayed", "cut", 502, 504}
        assert fault.sent == (fault.origin == "http")


def test_without_a_fault_requests_are_answered(upstream: FaultServer) -> None:
    with _connect(upstream.url) as connection:
        answer = _ask(connection, POST % (b"/v1/x?a=b", b"authorization: Bearer t\r\n"))
        assert answer.endswith(b'\r\n\r\n{"method": "POST", "target": "/v1/x?a=b", "size": 4}')
        assert _ask(connection, GOOD).endswith(TOLD)
        head = _ask(connection, GOOD.replace(b"GET", b"HEAD"))
        assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 51\r\n")
        assert head.endswith(b"\r\n\r\n")
        assert upstream.settled()
        assert (upstream.opened, upstream.open) == (1, 1)
    assert upstream.all_closed()
    assert (upstream.opened, upstream.open) == (1, 0)
    assert [(request.method, request.size, request.whole, request.fault) for request in upstream.requests] == [
        ("POST", 4, True, None),
        ("GET", 0, True, None),
        ("HEAD", 0, True, None),
    ]
    assert (b"authorization", b"Bearer t") in upstream.requests[0].headers
    assert "Bearer" not in repr(upstream.requests)


def test_requests_may_come_together_and_in_chunks(upstream: FaultServer) -> None:
    chunked = b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    with _connect(upstream.url) as connection:
        connection.sendall(chunked + GOOD)
        received = b""
        while not received.endswith(TOLD):
            received += connection.recv(65536)
        assert b'"size": 7' in received
    assert [request.whole for request in upstream.requests] == [True, True]


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.sent and fault.reads != "nothing"])
def test_a_fault_is_played(upstream: FaultServer, name: str) -> None:
    fault = FAULTS[name]
    upstream.fault(name)
    wire = b"".join(fault.answer)
    with _connect(upstream.url) as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(POST % (b"/v1/x", b""))
        received, end = _played(connection, len(wire), fault.pace)
        assert received.startswith(wire)
        assert received[len(wire) :] == b"" or received[len(wire) :][:20] in fault.repeated * 30
        if fault.repeated:
            assert end == "more"
        else:
            assert end == {"keep": "open", "hold": "open", "stall": "open"}.get(fault.then, fault.then)
        if fault.then == "keep":
            upstream.fault(None)
        elif end in ("open", "more"):
            assert not upstream.settled(0)
            assert upstream.open == 1
    assert upstream.all_closed()
    [request] = upstream.requests
    assert request.whole or fault.then == "reset"
    assert request.fault == name


def test_at_the_door_there_is_nothing_to_get(upstream: FaultServer) -> None:
    upstream.fault("close-on-accept")
    with _connect(upstream.url) as connection:
        assert connection.recv(1) == b""
        connection.sendall(GOOD)
    upstream.fault("reset-on-accept")
    # It may be there before the connection is.
    with pytest.raises(ConnectionResetError), _connect(upstream.url) as connection:
        connection.recv(1)
    assert upstream.all_closed()
    assert [request.target for request in upstream.requests] == ["/v1/good"]
    # By its path it is known too late, but not ignored.
    upstream.fault(None)
    with _connect(upstream.url) as connection:
        assert _ask(connection, POST % (b"/v1/close-on-accept", b"")) == b""


def test_a_fault_that_keeps_its_connection_takes_the_next_request(upstream: FaultServer) -> None:
    with _connect(upstream.url) as connection:
        assert _ask(connection, POST % (b"/v1/x/trailers", b"")).endswith(b"etag: 1\r\n\r\n")
        assert _ask(connection, GOOD).endswith(TOLD)
    assert upstream.opened == 1


def test_the_closest_name_counts(upstream: FaultServer) -> None:
    def asked(path: bytes, header: bytes = b"") -> str | None:
        with _connect(upstream.url) as connection:
            _ask(connection, POST % (path, header))
        return upstream.requests[-1].fault

    assert asked(b"/v1/x") is None
    assert asked(b"/v1/redirect?garbage") == "redirect"
    assert asked(b"/v1/redirect/x") is None
    upstream.fault("trailers")
    assert asked(b"/v1/x") == "trailers"
    assert asked(b"/v1/redirect") == "redirect"
    assert asked(b"/v1/redirect", b"x-fault: untyped\r\n") == "untyped"
    # Nobody can be refused who is there already.
    assert asked(b"/v1/refused", b"x-fault: nothing\r\n") == "trailers"
    upstream.fault(None)
    assert asked(b"/v1/refused") is None


def test_who_is_idle_meets_the_next_fault(upstream: FaultServer) -> None:
    with _connect(upstream.url) as connection:
        assert _ask(connection, GOOD).endswith(TOLD)
        assert upstream.settled()
        upstream.fault("garbage")
        assert connection.recv(1) == b""
    with _connect(upstream.url) as connection:
        assert _ask(connection, GOOD).startswith(b"\0\1\2")


def test_who_is_busy_meets_its_own_fault(upstream: FaultServer) -> None:
    assert upstream.url_for("silence-in-body") == upstream.url
    with _connect(upstream.url) as connection:
        assert _ask(connection, POST % (b"/v1/silence-in-body", b"")).endswith(b"01234")
        upstream.fault("reset-on-accept")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_a_fault_by_a_wrong_name(upstream: FaultServer) -> None:
    with pytest.raises(KeyError):
        upstream.fault("nothing")
    with pytest.raises(KeyError):
        upstream.url_for("nothing")
    with pytest.raises(ValueError, match="only at url_for"):
        upstream.fault("refused")


def test_a_body_counts_as_far_as_it_comes(upstream: FaultServer) -> None:
    head = b"POST /v1/%b HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
    for name in (b"x", b"early-answer", b"reset-in-upload", b"close-in-upload"):
        with _connect(upstream.url) as connection:
            connection.sendall(head % name)
            connection.sendall(b"abc")
            if name != b"x":
                with suppress(ConnectionResetError):
                    connection.recv(65536)
        assert upstream.all_closed()
    assert [(request.size, request.whole) for request in upstream.requests] == [(3, False)] * 4


def test_what_comes_after_an_early_answer_counts_too(upstream: FaultServer) -> None:
    with _connect(upstream.url) as connection:
        connection.sendall(b"POST /v1/early-answer HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        connection.sendall(b"abc" + GOOD)
    assert upstream.all_closed()
    first, second = upstream.requests
    assert (first.size, first.whole) == (3, True)
    assert (second.target, second.fault) == ("/v1/good", None)


def test_what_is_no_request(upstream: FaultServer) -> None:
    with _connect(upstream.url) as connection:
        assert _ask(connection, b"\x16\3\1 hello\r\n\r\n") == b""
    with _connect(upstream.url) as connection:
        assert _ask(connection, POST % (b"/v1/garbage", b"") + b"\x16\3\1\r\n\r\n").startswith(b"\0\1\2")
        connection.sendall(b"more of it")
        connection.shutdown(socket.SHUT_WR)
        assert upstream.all_closed()
    assert len(upstream.requests) == 1


def test_nobody_listens(upstream: FaultServer) -> None:
    url = upstream.url_for("refused")
    assert url == upstream.url_for("refused") != upstream.url
    with pytest.raises(ConnectionRefusedError):
        _connect(url)


def test_nobody_has_that_name(upstream: FaultServer) -> None:
    host = urlsplit(upstream.url_for("name-unknown")).hostname
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(host, 443)


def test_a_connection_that_never_comes_about(upstream: FaultServer) -> None:
    port = urlsplit(upstream.url_for("connect-silent")).port
    with closing(socket.socket()) as connection:
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.connect(("127.0.0.1", port))


def _handshake(connection: socket.socket) -> None:
    """Leaves the connection open, unlike the one of a socket."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            if not incoming.write(connection.recv(65536)):
                incoming.write_eof()
        except ssl.SSLError:
            connection.sendall(outgoing.read())
            raise


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tls-refused", ssl.SSLError),
        ("tls-plain-text", ssl.SSLError),
        ("tls-closed", ssl.SSLEOFError),
        ("tls-reset", ConnectionError),
        ("tls-silent", TimeoutError),
        ("tls-wrong-certificate", ssl.SSLCertVerificationError),
    ],
)
def test_a_handshake_fails(upstream: FaultServer, name: str, error: type[OSError]) -> None:
    url = upstream.url_for(name)
    assert url.startswith("https://")
    with _connect(url) as connection:
        connection.settimeout(0.5)
        with pytest.raises(error):
            _handshake(connection)
        # The other side has to close what it does not want.
        assert upstream.all_closed(0.1) == (name == "tls-reset")
    assert upstream.all_closed()
    assert not upstream.requests


def test_who_does_not_look_at_certificates_is_answered(upstream: FaultServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(_connect(upstream.url_for("tls-wrong-certificate"))) as connection:
        assert _ask(connection, GOOD).endswith(TOLD)
    assert [request.target for request in upstream.requests] == ["/v1/good"]


@pytest.mark.parametrize(
    "name", ["head-trickled", "interim-flood", "silence-in-body", "body-trickled", "silence-in-upload"]
)
def test_it_ends_in_the_midst_of_it(name: str) -> None:
    with FaultServer() as upstream:
        connection = _connect(upstream.url)
        connection.sendall(POST % (f"/v1/{name}".encode(), b""))
        connection.settimeout(0.2)
        with suppress(TimeoutError):
            connection.recv(1)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    with connection, suppress(ConnectionResetError):
        while connection.recv(1 << 20):
            pass
