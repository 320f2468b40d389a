"""The tables of docs/headers.md are those of the code, and its exchange goes over real sockets as it stands there."""

from __future__ import annotations

import re
import socket

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware, headers
from replicate_proxy_mw.testing import serve
from replicate_proxy_mw.via import Via
from tests.docs.reference import reference, written
from tests.docs.reference_of_headers import CHANGED, UP_FOR
from tests.documents import Page
from tests.raw_upstream import Connection, RawUpstream

PAGE = Page("docs/headers.md")
KEY, TOKEN = "pk-for-the-designers", "r8_of_the_designers"


def test_the_reference_is_what_the_generator_writes() -> None:
    assert written("headers.md", PAGE.text) == PAGE.text, "stale: python -m tests.docs.reference --write"


def test_each_header_that_passes_has_a_row() -> None:
    up, down = re.findall(r"\| --- \| --- \|\n(.*?)\n\n", reference("headers.md"), re.DOTALL)
    assert re.findall(r"^\| `(.+?)`", up, re.MULTILINE) == sorted(name.decode() for name in headers.UP)
    rows = re.findall(r"^\| `(.+?)`", down, re.MULTILINE)
    assert rows[: len(headers.DOWN)] == sorted(name.decode() for name in headers.DOWN)
    assert rows[len(headers.DOWN) :] == [prefix.decode() + "*" for prefix in headers.DOWN_PREFIXES]
    assert UP_FOR.keys() == headers.UP
    assert CHANGED.keys() < headers.DOWN


def test_the_exchange_is_as_the_page_has_it() -> None:
    asked, went_up, answered, came_back = (_wire(code) for language, code in PAGE.code if language == "http")
    with RawUpstream(lambda connection: _play(connection, answered)) as upstream:
        url, port = upstream.url, upstream.port
        app = ReplicateProxyMiddleware(
            _host, key_resolver=MappingKeyResolver({KEY: TOKEN}), config=ProxyConfig(upstream=url)
        )
        with serve(app, lifespan="off") as served:
            answer = _exchanged(served.url, asked)
    [request] = upstream.requests
    # On the page it is Replicate that is asked, and not a free port of this machine.
    shown = {
        _via(url): _via(ProxyConfig().upstream),
        b"127.0.0.1:%d" % port: b"api.replicate.com",
        TOKEN.encode(): "r8_…".encode(),
    }
    sent = request.head + b"\r\n\r\n" + request.body
    for here, there in shown.items():
        assert here in sent
        sent = sent.replace(here, there)
    assert sent.decode() == went_up.decode()
    assert re.sub(rb"date: .*?\r\n", b"", answer).decode() == came_back.decode()


def test_every_block_is_sent_and_every_link_leads_somewhere() -> None:
    assert PAGE.count("http") == len(PAGE.code) == 4
    assert PAGE.missing_links() == []


def _via(upstream: str) -> bytes:
    return Via(upstream=upstream, prefix="/v1").up({"headers": []})[1]


def _wire(code: str) -> bytes:
    head, _, body = code.rstrip("\n").partition("\n\n")
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body.encode()


def _play(connection: Connection, answer: bytes) -> None:
    if connection.request():
        connection.send(answer)


def _exchanged(url: str, request: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while not re.search(rb"\r\n\r\n.+\}$", received, re.DOTALL) and (more := connection.recv(65536)):
            received += more
    return received


async def _host(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not called")
