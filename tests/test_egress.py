from __future__ import annotations

import json
from typing import Any

import pytest

from replicate_proxy_mw import ProxyResponse
from replicate_proxy_mw.egress import Reply, render
from replicate_proxy_mw.errors import ClientDisconnected, KeyMissing, ProxyError, UpstreamFailed
from replicate_proxy_mw.exchange import Chunks
from tests.raw_asgi import Caller

pytestmark = pytest.mark.anyio


def _reply(caller: Caller, method: str = "GET") -> Reply:
    send: Any = caller.send
    return Reply(send, method=method)


def _response(*chunks: bytes, status: int = 200) -> ProxyResponse:
    return ProxyResponse(status=status, headers=((b"etag", b"1"),), body=Chunks(chunks))


async def test_chunks_leave_one_by_one() -> None:
    caller = Caller()
    reply = _reply(caller)
    await reply.relay(_response(b"a", b"bc"))
    assert (caller.status, caller.headers, caller.chunks) == (200, [(b"etag", b"1")], [b"a", b"bc"])
    assert (reply.status, reply.size, reply.complete, caller.complete) == (200, 3, True, True)


async def test_a_middleware_around_us_may_add_headers() -> None:
    messages = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append((b"x-frame-options", b"DENY"))
        messages.append(message)

    await Reply(send, method="GET").relay(_response(b"a"))
    assert messages[0]["headers"] == [(b"etag", b"1"), (b"x-frame-options", b"DENY")]


async def test_an_answer_to_head_has_no_body() -> None:
    caller = Caller()
    await _reply(caller, "HEAD").relay(_response(b"a"))
    assert caller.content == b""
    assert caller.complete


async def test_a_server_that_says_the_caller_left() -> None:
    async def send(message: Any) -> None:
        raise BrokenPipeError

    reply = Reply(send, method="GET")
    with pytest.raises(ClientDisconnected):
        await reply.relay(_response(b"a"))
    assert not reply.complete


async def test_an_error_of_the_body_is_not_the_caller_s_leaving() -> None:
    class Failing(Chunks):
        async def __anext__(self) -> bytes:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        await _reply(Caller()).relay(ProxyResponse(status=200, headers=(), body=Failing([])))


async def test_a_body_that_is_cut_is_not_ended() -> None:
    class Cut(Chunks):
        async def __anext__(self) -> bytes:
            raise ZeroDivisionError

    caller = Caller()
    reply = _reply(caller)
    with pytest.raises(ZeroDivisionError):
        await reply.relay(ProxyResponse(status=200, headers=(), body=Cut([])))
    assert not caller.complete
    assert not reply.complete


def _rendered(error: ProxyError, method: str = "POST", trace_id: str | None = None) -> tuple[dict[bytes, bytes], Any]:
    response = render(error, method=method, request_id="req-1", trace_id=trace_id)
    assert response.status == error.status
    return dict(response.headers), response


async def test_our_own_answer_in_every_sdk_s_words() -> None:
    headers, response = _rendered(KeyMissing(), trace_id="order-42")
    body = b"".join([chunk async for chunk in response.body])
    assert json.loads(body) == {
        "title": "Key missing",
        "detail": KeyMissing.message,
        "status": 401,
        "type": "key_missing",
        "instance": "req-1",
        "message": KeyMissing.message,
        "error": {"message": KeyMissing.message, "type": "auth_missing", "param": None, "code": "key_missing"},
        "request_id": "req-1",
    }
    assert headers == {
        b"content-type": b"application/json",
        b"content-length": str(len(body)).encode(),
        b"cache-control": b"no-store",
        b"x-request-id": b"req-1",
        b"x-portkey-trace-id": b"order-42",
        b"x-portkey-gateway-exception": b"true",
        b"www-authenticate": b"Bearer",
    }


def test_a_trace_id_is_never_empty_and_never_breaks_the_header() -> None:
    assert _rendered(KeyMissing())[0][b"x-portkey-trace-id"] == b"req-1"
    assert _rendered(KeyMissing(), trace_id="ü")[0][b"x-portkey-trace-id"] == b"?"


@pytest.mark.parametrize(("method", "told"), [("POST", True), ("DELETE", True), ("GET", False), ("HEAD", False)])
def test_sdks_are_told_not_to_pay_twice(method: str, told: bool) -> None:
    assert (b"x-should-retry" in _rendered(UpstreamFailed(), method)[0]) is told
    assert b"x-should-retry" not in _rendered(KeyMissing(), method)[0]
