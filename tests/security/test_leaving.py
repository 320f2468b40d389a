"""What ends with a caller who leaves, or with the host: the connection to Replicate, and every task."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import get_running_tasks
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.raw_asgi import Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row
from tests.telemetry.scenarios import Recorded, of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]


def _in_upload(connection: Connection) -> None:
    connection.head()
    connection.upstream.ready.set()
    while connection._more():
        pass
    connection.upstream.closed.set()


def _silent(connection: Connection) -> None:
    connection.request()
    connection.upstream.ready.set()
    connection.wait_closed()


def _streaming(connection: Connection) -> None:
    connection.request()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    connection.send(head + b"9\r\ndata: 1\n\n\r\n")
    connection.upstream.ready.set()
    connection.wait_closed()


async def _leaves(app: Any, upstream: RawUpstream, caller: Caller, scope: dict[str, Any]) -> bool:
    """Whether upstream is closed soon after the caller has left."""
    with anyio.move_on_after(3):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, app, scope)
            assert await anyio.to_thread.run_sync(upstream.ready.wait, 3)
            if upstream.script is _streaming:
                await caller.got_chunk.wait()
            caller.left.set()
            return await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    return False


@row("3.left-uploading")
async def test_of_an_upload_that_ends_early_no_request_is_made(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    upstream.script = _in_upload
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    caller = Caller([b"abc", b"def"], hold_upload=anyio.Event())
    assert await _leaves(app, upstream, caller, http_scope("POST"))
    await app.aclose()
    assert upstream.requests == []
    # Neither the end of a chunked body, nor as many bytes as were announced.
    assert b"0\r\n\r\n" not in upstream.connections[0].buffer
    spans = Recorded(exporter)
    assert of(spans.request, "replicate_proxy.outcome", "error.type") == ["client_disconnected", None]
    assert spans.request.status.status_code is StatusCode.UNSET


@row("3.left-uploading")
async def test_who_leaves_before_the_body_has_sent_nothing(upstream: RawUpstream) -> None:
    caller = Caller()
    caller.left.set()
    await caller.call(proxy(upstream.url), http_scope("POST"))
    assert upstream.connections == []


@row("3.left-waiting")
@pytest.mark.parametrize("script", [_silent, _streaming])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_who_leaves_while_replicate_says_nothing_is_noticed(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    script: Any,
    method: str,
) -> None:
    upstream.script = script
    app = proxy(upstream.url, tracer_provider=tracer_provider)
    tasks = len(get_running_tasks())
    assert await _leaves(app, upstream, Caller(), http_scope(method, "/v1/predictions"))
    assert len(get_running_tasks()) == tasks
    await app.aclose()
    # It is not cancelled for the caller either.
    assert [received.line[:4].strip() for received in upstream.requests] == [method.encode()]
    spans = Recorded(exporter)
    assert of(spans.request, "replicate_proxy.outcome", "error.type") == ["client_disconnected", None]
    assert spans.request.status.status_code is StatusCode.UNSET


@row("3.shutdown")
@pytest.mark.parametrize("reading", [True, False])
async def test_a_stream_that_the_server_cancels_leaves_nothing(upstream: RawUpstream, reading: bool) -> None:
    class Slow(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if self.chunks and not reading:
                await anyio.sleep_forever()

    upstream.script = _streaming
    app, caller = proxy(upstream.url), Slow()
    before = len(get_running_tasks())
    with anyio.move_on_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, app, http_scope())
            await caller.got_chunk.wait()
            tasks.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)
    assert len(get_running_tasks()) == before
    assert not caller.complete
    await app.aclose()


@row("3.shutdown")
async def test_the_host_s_shutdown_closes_what_is_kept(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url)
    await Caller().call(app, http_scope())
    assert not upstream.closed.is_set()
    ends = ["lifespan.startup", "lifespan.shutdown"]
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": ends.pop(0)}

    async def send(message: dict[str, str]) -> None:
        # Before the server is told, which then stops the loop.
        if message["type"] == "lifespan.shutdown.complete":
            sent.append(f"closed: {await anyio.to_thread.run_sync(upstream.closed.wait, 1.5)}")

    await app({"type": "lifespan", "state": {}}, receive, send)
    assert sent == ["closed: True"]
