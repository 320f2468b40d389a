from __future__ import annotations

import json
from typing import Any

import pytest

from replicate_proxy_mw import ProxyResponse
from replicate_proxy_mw.egress import ONE_MESSAGE, Reply, complete, render
from replicate_proxy_mw.errors import ClientDisconnected, GuardrailDenied, KeyMissing, RequestTimeout
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.waiting import Waiting
from tests.raw_asgi import Arriving, Caller

pytestmark = pytest.mark.anyio


def _reply(caller: Caller, method: str = "GET") -> Reply:
    send: Any = caller.send
    return Reply(send, method=method)


def _response(*chunks: bytes, status: int = 200) -> ProxyResponse:
    return ProxyResponse(status=status, headers=((b"etag", b"1"),), body=Chunks(chunks))


async def test_chunks_leave_one_by_one() -> None:
    caller = Caller()
    reply = _reply(caller)
    response = ProxyResponse(status=200, headers=((b"etag", b"1"),), body=Arriving([b"a", b"bc"]))
    await reply.relay(response)
    assert (caller.status, caller.headers, caller.chunks) == (200, [(b"etag", b"1")], [b"a", b"bc"])
    assert (reply.status, reply.size, reply.complete, caller.complete) == (200, 3, True, True)


@pytest.mark.parametrize(("size", "messages"), [(0, 1), (1, 1), (ONE_MESSAGE, 1), (ONE_MESSAGE + 1, 2)])
async def test_a_short_body_at_hand_leaves_in_the_last_message(size: int, messages: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    reply = Reply(send, method="GET")
    await reply.relay(_response(b"a" * size))
    bodies = sent[1:]
    assert [len(message["body"]) for message in bodies] == [size, 0][:messages]
    assert [message["more_body"] for message in bodies] == [True, False][2 - messages :]
    assert (reply.size, reply.is_ending(), reply.complete) == (size, True, True)


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
    class Failing(Arriving):
        async def __anext__(self) -> bytes:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        await _reply(Caller()).relay(ProxyResponse(status=200, headers=(), body=Failing([])))


async def test_a_body_that_is_cut_is_not_ended() -> None:
    class Cut(Arriving):
        async def __anext__(self) -> bytes:
            raise ZeroDivisionError

    caller = Caller()
    reply = _reply(caller)
    with pytest.raises(ZeroDivisionError):
        await reply.relay(ProxyResponse(status=200, headers=(), body=Cut([])))
    assert not caller.complete
    assert not reply.complete


async def test_our_own_answer_in_every_sdk_s_words() -> None:
    response = render(KeyMissing(), request_id="req-1")
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
    assert dict(response.headers) == {
        b"content-type": b"application/json",
        b"content-length": str(len(body)).encode(),
        b"cache-control": b"no-store",
        b"x-request-id": b"req-1",
        b"x-portkey-gateway-exception": b"true",
        b"www-authenticate": b"Bearer",
    }


async def test_the_word_of_portkey_s_gateway_for_a_timeout() -> None:
    response = render(RequestTimeout(0.3), request_id="req-1")
    error = json.loads(b"".join([chunk async for chunk in response.body]))["error"]
    assert error["message"] == "Request exceeded the timeout sent in the request: 300ms"
    assert error["type"] == "timeout_error"


def _complete(status: int = 200, *headers: tuple[bytes, bytes], method: str = "POST") -> dict[bytes, bytes]:
    response = ProxyResponse(status=status, headers=headers, body=Chunks([]))
    return dict(complete(response, method=method, trace_id="order-42").headers)


async def test_what_an_error_has_to_say_beside() -> None:
    response = render(GuardrailDenied(hook_results={"before_request_hooks": []}), request_id="r-1")
    assert response.status == 446
    content = json.loads(b"".join([chunk async for chunk in response.body]))
    assert (content["error"]["type"], content["error"]["code"]) == ("hooks_failed", "hooks_failed")
    assert content["hook_results"] == {"before_request_hooks": []}


def test_what_portkey_s_sdks_look_for() -> None:
    assert _complete(200, (b"content-type", b"a/b")) == {
        b"content-type": b"a/b",
        b"x-portkey-trace-id": b"order-42",
        b"x-portkey-provider": b"replicate",
        b"x-portkey-last-used-option-index": b"config",
        b"x-portkey-cache-status": b"DISABLED",
        b"x-portkey-retry-attempt-count": b"0",
    }
    assert _complete(200, (b"x-portkey-retry-attempt-count", b"2"))[b"x-portkey-retry-attempt-count"] == b"2"


def test_a_trace_id_never_breaks_the_header() -> None:
    response = ProxyResponse(status=200, headers=(), body=Chunks([]))
    assert dict(complete(response, method="GET", trace_id="ü").headers)[b"x-portkey-trace-id"] == b"?"


@pytest.mark.parametrize(
    ("status", "headers", "content_type"),
    [
        (204, [], b"text/plain"),
        (202, [(b"content-length", b"0")], b"text/plain"),
        (200, [(b"content-length", b"5")], b"application/octet-stream"),
        (304, [], None),
        (200, [(b"content-type", b"text/event-stream; charset=utf-8")], b"text/event-stream"),
        (200, [(b"content-type", b"text/event-stream")], b"text/event-stream"),
        (200, [(b"content-type", b"Text/Event-Stream ;x=1")], b"text/event-stream"),
        (200, [(b"content-type", b"")], b"application/octet-stream"),
        (200, [(b"content-type", b"a/b"), (b"content-type", b"c/d")], b"a/b"),
        (200, [(b"content-type", b"text/plain; charset=utf-8")], b"text/plain; charset=utf-8"),
    ],
)
def test_every_answer_has_a_content_type(
    status: int, headers: list[tuple[bytes, bytes]], content_type: bytes | None
) -> None:
    assert _complete(status, *headers).get(b"content-type") == content_type


def test_what_is_told_is_told_once() -> None:
    sent = ((b"x-should-retry", b"true"), (b"content-type", b"a/b"), (b"content-type", b"c/d"))
    response = complete(ProxyResponse(status=500, headers=sent, body=Chunks([])), method="POST", trace_id="t")
    assert [value for name, value in response.headers if name == b"x-should-retry"] == [b"false"]
    assert [value for name, value in response.headers if name == b"content-type"] == [b"a/b"]


@pytest.mark.parametrize(("method", "told"), [("POST", True), ("PATCH", True), ("GET", False), ("DELETE", False)])
@pytest.mark.parametrize("status", [408, 409, 500, 502, 503])
def test_sdks_are_told_not_to_pay_twice(method: str, told: bool, status: int) -> None:
    assert (b"x-should-retry" in _complete(status, method=method)) is told
    assert b"x-should-retry" not in _complete(404, method=method)


class Watched(Waiting):
    """Tells whether somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0

    def __enter__(self) -> None:
        super().__enter__()
        self.now += 1

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.now -= 1


async def test_waiting_for_the_server_is_counted_and_waiting_for_the_body_is_not() -> None:
    watched, within, between = Watched(), [], []

    async def send(message: Any) -> None:
        within.append(watched.now)

    class Body(Arriving):
        async def __anext__(self) -> bytes:
            between.append(watched.now)
            return await super().__anext__()

    reply = Reply(send, method="GET")
    reply.waiting = watched
    await reply.relay(ProxyResponse(status=200, headers=(), body=Body([b"a", b"b"])))
    assert (within, between, watched.now) == ([1, 1, 1, 1], [0, 0, 0], 0)


async def test_a_server_that_fails_ends_the_waiting() -> None:
    async def send(message: Any) -> None:
        raise BrokenPipeError

    reply = Reply(send, method="GET")
    reply.waiting = watched = Watched()
    with pytest.raises(ClientDisconnected):
        await reply.relay(_response(b"a"))
    assert watched.now == 0
