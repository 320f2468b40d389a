"""A smoke over raw sockets on every server: nothing but the server stands between the socket and the proxy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.raw_asgi import TOKEN
from tests.raw_upstream import Connection, RawUpstream
from tests.servers.running import SERVERS, running

HEAD = b"%s HTTP/1.1\r\nhost: proxy.test\r\nx-portkey-api-key: pk-team-a\r\n"


def _play(connection: Connection) -> None:
    while (request := connection.request()) is not None:
        path = request.line.split()[1]
        if path == b"/v1/silent":
            connection.wait_closed()
        elif path == b"/v1/stream":
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.send(head + b"9\r\ndata: 1\n\n\r\n")
            connection.wait_closed()
        elif path == b"/v1/cut":
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
            connection.reset()
        elif path == b"/v1/empty":
            connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif path == b"/v1/unchanged":
            connection.send(b"HTTP/1.1 304 Not Modified\r\netag: 1\r\ncontent-length: 5\r\n\r\n")
        elif request.line.startswith(b"HEAD"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        else:
            connection.answer(request.body or b"{}", headers=b"set-cookie: a=b\r\n")


@dataclass
class Running:
    name: str
    port: int
    upstream: RawUpstream

    def send(self, head: bytes, body: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(HEAD % head + body)
        return connection

    def ask(self, head: bytes, more: bytes = b"\r\n") -> bytes:
        """One exchange, until the server closes the connection."""
        with self.send(head, b"connection: close\r\n" + more) as connection:
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def upstream_closes(self) -> float:
        """Seconds until upstream sees its connection closed."""
        started = time.monotonic()
        assert self.upstream.closed.wait(5)
        self.upstream.closed.clear()
        return time.monotonic() - started


@pytest.fixture(scope="module", params=[(name, kind) for name in sorted(SERVERS) for kind in ("default", "fast")])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    name, transport = request.param
    with RawUpstream(_play) as upstream, running(name, upstream.url, transport) as port:
        yield Running(name, port, upstream)


@pytest.fixture(autouse=True)
def _fresh(server: Running) -> None:
    server.upstream.requests.clear()


def test_a_create(server: Running) -> None:
    answer = server.ask(b"POST /v1/predictions", b"content-length: 2\r\ncookie: sid=1\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n{}")
    assert b"set-cookie" not in answer
    [received] = server.upstream.requests
    assert received.header(b"authorization") == [b"Bearer " + TOKEN.encode()]
    assert received.header(b"content-length") == [b"2"]
    assert received.header(b"cookie") == received.header(b"x-portkey-api-key") == []


def test_targets_pass_byte_for_byte(server: Running) -> None:
    server.ask(b"GET /v1/models/a%2Fb//c;d,e?x=%20&y=%zz&z=a+b")
    assert server.upstream.requests[0].line == b"GET /v1/models/a%2Fb//c;d,e?x=%20&y=%zz&z=a+b HTTP/1.1"


def test_a_path_of_the_host(server: Running) -> None:
    for path in (b"/", b"/v1beta", b"/v1evil/x"):
        assert b"host" in server.ask(b"GET " + path).partition(b"\r\n\r\n")[2]
    assert not server.upstream.requests


def test_no_key(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\nhost: proxy.test\r\ncontent-length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
    assert not server.upstream.requests


def test_a_method_in_small_letters_is_not_sent_in_capitals(server: Running) -> None:
    for method in (b"trace", b"post"):
        answer = server.ask(method + b" /v1/predictions", b"content-length: 0\r\n\r\n")
        if server.name.startswith("hypercorn") and method == b"post":  # hypercorn itself writes methods in capitals
            assert answer.startswith(b"HTTP/1.1 200 ")
        else:
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 405 "))
    assert not [received for received in server.upstream.requests if received.line.startswith(b"TRACE")]


def test_search(server: Running) -> None:
    answer = server.ask(b"QUERY /v1/models", b"content-length: 5\r\ncontent-type: text/plain\r\n\r\nllama")
    assert answer.endswith(b"llama")
    assert server.upstream.requests[0].line.startswith(b"QUERY /v1/models ")


def test_answers_without_a_body(server: Running) -> None:
    assert server.ask(b"GET /v1/empty").startswith(b"HTTP/1.1 204 ")
    assert server.ask(b"GET /v1/unchanged").startswith(b"HTTP/1.1 304 ")
    head = server.ask(b"HEAD /v1/x")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: 1000" in head.lower()
    assert head.endswith(b"\r\n\r\n")


def test_a_chunked_upload(server: Running) -> None:
    with server.send(b"POST /v1/files", b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n") as connection:
        time.sleep(0.1)  # so that no server takes the whole body for one message
        connection.sendall(b"3\r\ndef\r\n0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    [received] = server.upstream.requests
    assert received.header(b"transfer-encoding") == [b"chunked"]
    assert b"".join(received.body.split(b"\r\n")[1::2]) == b"abcdef"


def test_an_event_leaves_as_it_arrives(server: Running) -> None:
    with server.send(b"GET /v1/stream", b"\r\n") as connection:
        received = b""
        while b"data: 1" not in received:
            received += connection.recv(65536)
    assert b"text/event-stream" in received
    assert server.upstream_closes() < 1.5


def test_a_caller_who_leaves_before_the_first_byte(server: Running) -> None:
    with server.send(b"GET /v1/silent", b"\r\n"):
        while not server.upstream.requests:
            time.sleep(0.01)
    assert server.upstream_closes() < 1.5


def test_a_cut_answer_is_not_ended(server: Running) -> None:
    with server.send(b"GET /v1/cut", b"\r\n") as connection:
        try:
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionResetError:
            return
    assert b"abc" in received
    assert not received.endswith(b"0\r\n\r\n")
