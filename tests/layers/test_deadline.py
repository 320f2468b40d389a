from __future__ import annotations

import json

import pytest

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio


def _slow(connection: Connection) -> None:
    connection.request()
    connection.wait_closed()


@pytest.mark.parametrize(
    "limit", [(b"x-portkey-request-timeout", b"3000"), (b"x-portkey-config", b'{"request_timeout": 3000}')]
)
async def test_the_caller_s_own_limit(upstream: RawUpstream, limit: tuple[bytes, bytes]) -> None:
    upstream.script = _slow
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1/predictions", [KEY, limit]))
    assert caller.status == 408
    assert json.loads(caller.content)["error"] == {
        "message": "Request exceeded the timeout sent in the request: 3000ms",
        "type": "timeout_error",
        "param": None,
        "code": "request_timeout",
    }
    assert caller.header(b"x-should-retry") == [b"false"]
    assert len(upstream.requests) == 1
    assert upstream.closed.wait(2)


async def test_it_ends_no_sooner_than_what_the_caller_sees(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        connection.wait_closed()

    upstream.script = script
    headers = [KEY, (b"x-portkey-request-timeout", b"1200")]
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1/predictions", headers))
    assert caller.status == 408
    assert upstream.closed.wait(2)


async def test_it_ends_with_the_head_of_the_answer(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        connection.upstream.go_on.wait(1.5)
        connection.send(b"ok")

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, (b"x-portkey-request-timeout", b"1200")]))
    assert (caller.status, caller.content) == (200, b"ok")
