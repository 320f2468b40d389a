"""Rows 1, 2 and 4: nothing that a caller or an answer says chooses where a token goes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

import httpx
import pytest

from replicate_proxy_mw.testing import serve
from replicate_proxy_mw.upstream import PooledTransport
from tests.raw_asgi import KEY, TOKEN, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio


@pytest.fixture
def elsewhere() -> Iterator[RawUpstream]:
    """Where an attacker wants the token to go."""
    with RawUpstream() as raw:
        yield raw


def _named(text: str, elsewhere: RawUpstream) -> str:
    return text.replace("ELSEWHERE", f"127.0.0.1:{elsewhere.port}")


@row("2.1")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-portkey-custom-host", "http://ELSEWHERE/v1"),
        ("x-portkey-config", '{"custom_host": "http://ELSEWHERE/v1"}'),
        (
            "x-portkey-config",
            '{"provider": "replicate", "custom_host": "http://ELSEWHERE/v1", "retry": {"attempts": 1}}',
        ),
    ],
)
async def test_who_asks_for_a_host_of_its_own_is_refused(
    upstream: RawUpstream, elsewhere: RawUpstream, name: str, value: str
) -> None:
    header = (name.encode(), _named(value, elsewhere).encode())
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, header]))
    assert caller.status == 400
    assert upstream.connections == elsewhere.connections == []


@row("2.1")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(
    "header",
    [
        "x-portkey-base-url: http://ELSEWHERE/v1",
        "x-portkey-config: pc-ELSEWHERE",
        'x-portkey-config: {"base_url": "http://ELSEWHERE/v1", "targets": [{"custom_host": "http://ELSEWHERE"}]}',
        "x-portkey-provider: @http://ELSEWHERE",
        "x-portkey-azure-resource-name: ELSEWHERE",
        "x-forwarded-host: ELSEWHERE",
        "forwarded: host=ELSEWHERE",
        "x-original-url: http://ELSEWHERE/",
        "api-base: http://ELSEWHERE/v1",
    ],
)
async def test_no_header_no_query_and_no_body_chooses_a_host(
    upstream: RawUpstream, elsewhere: RawUpstream, header: str
) -> None:
    name, _, value = _named(header, elsewhere).partition(": ")
    body = json.dumps({"api_base": f"http://127.0.0.1:{elsewhere.port}", "base_url": "x", "input": {}}).encode()
    target = f"/v1/predictions?api_base=http://127.0.0.1:{elsewhere.port}"
    scope = http_scope("POST", target, [KEY, (name.encode(), value.encode())])
    caller = await call(proxy(upstream.url), scope, body)
    assert (caller.status, elsewhere.connections) == (200, [])
    [sent] = upstream.requests
    assert sent.line == f"POST {target} HTTP/1.1".encode()
    assert sent.body == body
    assert str(elsewhere.port).encode() not in sent.head.partition(b"\r\n")[2]


TARGETS = [
    "/v1//ELSEWHERE/x",
    "/v1/@ELSEWHERE/x",
    "/v1@ELSEWHERE/x",
    "/v1:80@ELSEWHERE/x",
    "/v1.ELSEWHERE/x",
    "/v1/http://ELSEWHERE/x",
    "/v1http://ELSEWHERE/x",
    "//ELSEWHERE/v1/x",
    "http://ELSEWHERE/v1/x",
]


@row("2.2")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("target", TARGETS)
async def test_no_target_leads_to_another_host(
    upstream: RawUpstream, elsewhere: RawUpstream, target: str, given: bool
) -> None:
    transport = PooledTransport(max_connections=1) if given else None
    # Below an origin without a path, what follows the prefix could become user, port or domain.
    app = proxy(f"http://127.0.0.1:{upstream.port}", transport=transport)
    scope = http_scope(target=_named(target, elsewhere), headers=[KEY, (b"x-portkey-provider", b"replicate")])
    caller = await call(app, scope)
    if transport is not None:
        await transport.aclose()
    assert caller.content == b"host" or caller.status in (200, 400)
    assert elsewhere.connections == []
    for sent in upstream.requests:
        assert sent.line == f"GET {_named(target, elsewhere)[3:]} HTTP/1.1".encode()
        assert sent.header(b"host") == [f"127.0.0.1:{upstream.port}".encode()]


@row("2.2")
@pytest.mark.usefixtures("either_transport")
async def test_the_caller_s_host_stays_here(upstream: RawUpstream, elsewhere: RawUpstream) -> None:
    scope = http_scope()
    scope["headers"][0] = (b"host", f"127.0.0.1:{elsewhere.port}".encode())
    assert (await call(proxy(upstream.url), scope)).status == 200
    [sent] = upstream.requests
    assert sent.header(b"host") == [f"127.0.0.1:{upstream.port}".encode()]
    assert sent.header(b"authorization") == [b"Bearer " + TOKEN.encode()]
    assert elsewhere.connections == []


@row("2.2")
@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("target", ["http://ELSEWHERE/v1/x", "//ELSEWHERE/v1/x", "/v1//ELSEWHERE/x", "/v1@ELSEWHERE/x"])
def test_no_request_line_leads_to_another_host(
    upstream: RawUpstream, elsewhere: RawUpstream, target: str, http: Literal["h11", "httptools"]
) -> None:
    line = f"GET {_named(target, elsewhere)} HTTP/1.1\r\nhost: {_named('ELSEWHERE', elsewhere)}\r\n".encode()
    with (
        serve(proxy(upstream.url), http=http) as served,
        socket.create_connection(("127.0.0.1", urlsplit(served.url).port or 0), timeout=5) as caller,
    ):
        caller.sendall(line + b"x-portkey-api-key: pk-team-a\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: caller.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 ")
    assert elsewhere.connections == []
    for sent in upstream.requests:
        # httptools takes the origin off, as RFC 9112 (3.2.2) has it.
        path = _named(target, elsewhere).removeprefix(_named("http://ELSEWHERE", elsewhere))
        assert sent.line == f"GET {path} HTTP/1.1".encode()
        assert sent.header(b"host") == [f"127.0.0.1:{upstream.port}".encode()]


@row("2.4")
@pytest.mark.parametrize("transport", ["default", "fast", "given"])
@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"])
async def test_a_redirect_is_relayed_and_not_followed(
    upstream: RawUpstream, elsewhere: RawUpstream, status: bytes, transport: str
) -> None:
    location = f"http://127.0.0.1:{elsewhere.port}/v1/files?token=1".encode()

    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b"", status=status, headers=b"location: " + location + b"\r\n")

    upstream.script = script
    given = httpx.AsyncHTTPTransport() if transport == "given" else None
    app = proxy(upstream.url, transport=given, options={"fast": transport == "fast"})
    caller = await call(app, http_scope("POST", "/v1/files"), b"{}")
    if given is not None:
        await given.aclose()
    assert caller.status == int(status[:3])
    assert caller.header(b"location") == [location]
    assert len(upstream.requests) == 1
    assert elsewhere.connections == []


@row("2.4")
async def test_a_redirect_within_replicate_leads_back_through_the_proxy(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b"", status=b"302 Found", headers=f"location: {upstream.url}/files/2\r\n".encode())

    upstream.script = script
    app = proxy(upstream.url, options={"public_url": "https://app.example/v1"})
    caller = await call(app, http_scope(target="/v1/files/1"))
    assert caller.header(b"location") == [b"https://app.example/v1/files/2"]
    assert len(upstream.requests) == 1
