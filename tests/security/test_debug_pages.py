"""What a host shows of an exception that leaves the middleware: its locals too, in debug pages and error trackers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from traceback import TracebackException
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateKey, ReplicateProxyMiddleware
from replicate_proxy_mw.errors import UpstreamAborted
from tests.raw_asgi import KEY, Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row
from tests.tenants import sends

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]

# No piece of it is like another.
TOKEN = "r8_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
KEYS = MappingKeyResolver({"pk-team-a": ReplicateKey(TOKEN, tenant="team-a")})


def _locals(error: TracebackException | None) -> Iterator[str]:
    """Those of the package's own frames, in all of a chain."""
    if error is None:
        return
    for frame in error.stack:
        if "/replicate_proxy_mw/" in frame.filename:
            yield from (frame.locals or {}).values()
    yield from _locals(error.__cause__)
    yield from _locals(error.__context__)


def _seen(error: BaseException) -> str:
    return "\n".join(_locals(TracebackException.from_exception(error, capture_locals=True)))


def _pieces(text: str) -> list[str]:
    """Of the token, or of its base64, in `text`."""
    secrets = (TOKEN, base64.b64encode(TOKEN.encode()).decode())
    return [secret[i : i + 12] for secret in secrets for i in range(len(secret) - 11) if secret[i : i + 12] in text]


@row("2.32")
async def test_an_exception_that_cuts_an_answer_shows_no_token(upstream: RawUpstream) -> None:
    upstream.script = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    app = proxy(upstream.url, key_resolver=KEYS)
    with pytest.raises(UpstreamAborted) as raised:
        await Caller().call(app, http_scope())
    await app.aclose()
    seen = _seen(raised.value)
    assert "ProxyRequest(" in seen
    assert _pieces(seen) == []


@row("2.32")
async def test_a_debug_page_shows_no_token(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.head()
        connection.upstream.ready.set()
        connection.wait_closed()

    class Failing(Caller):
        async def receive(self) -> dict[str, Any]:
            if self.received == 1:
                assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
                raise RuntimeError("what the server's receive raises is the host's")
            return await super().receive()

    upstream.script = script
    proxied = Middleware(ReplicateProxyMiddleware, key_resolver=KEYS, config=ProxyConfig(upstream=upstream.url))
    caller = Failing([b"abc", b"def"])
    with pytest.raises(RuntimeError, match="is the host's") as raised:
        await caller.call(Starlette(debug=True, middleware=[proxied]), http_scope("POST", headers=[KEY]))
    assert (caller.status, b"RuntimeError" in caller.content) == (500, True)
    assert _pieces(caller.content.decode()) == []
    seen = _seen(raised.value)
    assert "RequestBody" in seen
    assert _pieces(seen) == []
