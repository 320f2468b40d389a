from __future__ import annotations

import json
from functools import partial

import anyio
import pytest

from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.layers import whole
from tests.raw_asgi import Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

CREATES = [
    "/v1/predictions",
    "/v1/models/a/b/predictions",
    "/v1/deployments/a/b/predictions",
    "/v1/models/a/b/versions/c/trainings",
    "/v1/files",
    "/v1/deployments",
    "/v1/models",
]


def _cut(connection: Connection, content_type: bytes = b"content-type: application/json\r\n") -> None:
    connection.request()
    head = b"HTTP/1.1 201 Created\r\n" + content_type + b"content-length: 100\r\n\r\n"
    connection.send(head + b'{"id": "p1"')


@pytest.mark.parametrize("content_type", [b"content-type: application/json\r\n", b"content-type: text/html\r\n", b""])
@pytest.mark.parametrize("target", CREATES)
async def test_a_create_s_answer_that_is_cut_becomes_a_502(
    upstream: RawUpstream, target: str, content_type: bytes
) -> None:
    upstream.script = partial(_cut, content_type=content_type)
    caller = await call(proxy(upstream.url), http_scope("POST", target))
    assert (caller.status, json.loads(caller.content)["error"]["code"]) == (502, "upstream_failed")
    assert caller.header(b"x-should-retry") == [b"false"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(("method", "target"), [("GET", "/v1/files/f/download"), ("POST", "/v1/nope")])
async def test_other_answers_are_streamed(upstream: RawUpstream, method: str, target: str) -> None:
    upstream.script = _cut
    app = proxy(upstream.url)
    caller = Caller()
    with pytest.raises(UpstreamAborted):
        await caller.call(app, http_scope(method, target))
    assert (caller.status, caller.complete) == (201, False)
    await app.aclose()


async def test_a_create_that_answers_with_a_stream_is_not_held(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        head = b"HTTP/1.1 201 Created\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.send(head + b"9\r\ndata: 1\n\n\r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app = proxy(upstream.url)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions"))
        with anyio.fail_after(2):
            await caller.got_chunk.wait()
        upstream.go_on.set()
    assert caller.complete
    await app.aclose()


async def test_a_long_answer_is_streamed_after_all(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MAX_SIZE", 1000)
    body = b'{"output":"' + b"x" * 300_000 + b'"}'

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(body, status=b"201 Created")

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1/predictions"))
    assert (caller.content, caller.complete) == (body, True)
