"""The wall clock may jump: limits and kept connections go by another."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from tests.raw_asgi import Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the wall clock so many seconds off."""
    wall = time.time

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: wall() + seconds)

    return by


@row("3.clock")
@pytest.mark.parametrize("seconds", [86_400.0, -86_400.0])
async def test_a_kept_connection_is_as_old_as_it_is(upstream: RawUpstream, jump: Any, seconds: float) -> None:
    app = proxy(upstream.url)
    await Caller().call(app, http_scope())
    jump(seconds)
    await Caller().call(app, http_scope())
    await app.aclose()
    assert len(upstream.connections) == 1


@row("3.clock")
async def test_a_limit_lasts_as_long_as_it_is(upstream: RawUpstream, jump: Any) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n")
        jump(86_400.0)
        connection.send(b"x: y\r\n")
        connection.upstream.go_on.wait(0.05)
        connection.send(b"content-length: 2\r\n\r\n{}")
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\n")
        jump(-86_400.0)
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url, options={"read_timeout": 0.8})
    whole, late = Caller(), Caller()
    await whole.call(app, http_scope())
    with anyio.move_on_after(3):
        await late.call(app, http_scope())
    await app.aclose()
    assert whole.status == 200
    assert told(late) == (504, "upstream_timeout")
