"""A request that comes back to the proxy that has sent it is refused before it goes round again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from replicate_proxy_mw import ReplicateProxyMiddleware
from tests.raw_asgi import KEY, TOKEN, call, host, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = pytest.mark.anyio


@row("2.33")
@pytest.mark.parametrize("line", [b"%b", b"1.0 fred, %b", b"%b, 1.1 p.example.net", b"1.0 fred,%b"])
@pytest.mark.parametrize("count", [1, 2])
async def test_what_went_up_is_not_taken_again(upstream: RawUpstream, line: bytes, count: int) -> None:
    await call(proxy(upstream.url), http_scope())
    [via] = upstream.requests[0].header(b"via")
    # By another process of the deployment.
    lines = [(b"via", b"1.1 first")] * (count - 1) + [(b"via", line % via)]
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, *lines]))
    assert told(caller) == (508, "loop_detected")
    assert len(upstream.requests) == 1


@row("2.33")
async def test_a_proxy_in_front_of_another_is_no_loop(upstream: RawUpstream) -> None:
    await call(proxy(upstream.url, options={"prefix": "/r"}), http_scope(target="/r/x"))
    via = upstream.requests[0].header(b"via")
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, (b"via", via[0])]))
    assert caller.status == 200
    [last] = upstream.requests[1].header(b"via")
    assert last.startswith(via[0] + b", 1.1 replicate-proxy-mw-")


class _Round(httpx.AsyncBaseTransport):
    """An upstream that leads back to the proxy, five times at most."""

    app: Any
    times = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.times += 1
        if self.times > 5:
            return httpx.Response(200, stream=_Empty())
        scope = http_scope(headers=[(name.lower(), value) for name, value in request.headers.raw if name != b"Host"])
        caller = await call(self.app, scope)
        assert caller.status is not None
        return httpx.Response(caller.status, stream=_Empty())


class _Empty(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""


@row("2.33")
async def test_an_upstream_that_leads_back_here_is_asked_once() -> None:
    async def everybody(request: object) -> str:
        return TOKEN

    transport = _Round()
    transport.app = ReplicateProxyMiddleware(host, key_resolver=everybody, transport=transport)
    caller = await call(transport.app, http_scope())
    assert (caller.status, transport.times) == (508, 1)


@row("2.33")
async def test_the_refusal_says_why(upstream: RawUpstream) -> None:
    await call(proxy(upstream.url), http_scope())
    via = upstream.requests[0].header(b"via")
    caller = await call(proxy(upstream.url), http_scope("POST", headers=[KEY, (b"via", via[0])]))
    assert "upstream leads back" in json.loads(caller.content)["detail"]
    assert caller.header(b"x-should-retry") == [b"false"]
