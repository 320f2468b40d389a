"""Methods that would give a token away, headers that change a method, and what is no HTTP request."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = pytest.mark.anyio


@row("2.20")
@pytest.mark.parametrize("method", ["TRACE", "TRACK", "CONNECT"])
async def test_methods_that_echo_or_tunnel_are_refused(upstream: RawUpstream, method: str) -> None:
    caller = await call(proxy(upstream.url), http_scope(method))
    assert told(caller) == (405, "method_not_allowed")
    assert upstream.requests == []


@row("2.20")
@pytest.mark.parametrize("name", [b"x-http-method-override", b"x-http-method", b"x-method-override"])
async def test_no_header_changes_the_method(upstream: RawUpstream, name: bytes) -> None:
    await call(proxy(upstream.url), http_scope("POST", headers=[KEY, (name, b"DELETE")]))
    [received] = upstream.requests
    assert received.line == b"POST /v1/x HTTP/1.1"
    assert received.header(name) == []


@row("2.20")
async def test_a_websocket_is_the_host_s(upstream: RawUpstream) -> None:
    seen = []

    async def host(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {**http_scope(), "type": "websocket", "scheme": "ws"}
    # Whatever else becomes of it.
    with suppress(Exception):
        await call(proxy(upstream.url, app=host), scope)
    assert seen == [scope]
    assert upstream.requests == []
