from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any

import anyio
import pytest

from replicate_proxy_mw import ProxyResponse
from replicate_proxy_mw.egress import ONE_MESSAGE, Reply, complete, render
from replicate_proxy_mw.errors import ClientDisconnected, GuardrailDenied, KeyMissing, RequestTimeout
from replicate_proxy_mw.exchange import Chunks, Forward, ProxyRequest
from replicate_proxy_mw.waiting import Waiting
from tests.raw_asgi import KEY, Arriving, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

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


class _Ready:
    """A body whose next chunk has always come when the loop looks at who waits."""

    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope
        self.read = 0

    def __aiter__(self) -> _Ready:
        return self

    async def __anext__(self) -> bytes:
        self.read += 1
        if self.read == 1000:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        come: asyncio.Future[None] = loop.create_future()
        loop.call_soon(come.set_result, None)
        if self.read == 10:
            loop.call_soon(self._scope.cancel)
        await come
        return b"a"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_leaves_ends_even_an_answer_that_never_waits(anyio_backend: str) -> None:
    caller = Caller()
    with anyio.CancelScope() as scope:
        body = _Ready(scope)
        await _reply(caller).relay(ProxyResponse(status=200, headers=(), body=body))
    assert body.read == 10
    assert not caller.complete


class _Endless:
    """A body that never waits for anything."""

    def __aiter__(self) -> _Endless:
        return self

    async def __anext__(self) -> bytes:
        return b"a"


async def test_timers_run_even_within_an_answer_that_never_waits() -> None:
    async def send(message: Any) -> None:
        pass

    with anyio.move_on_after(0.05) as scope:
        await Reply(send, method="GET").relay(ProxyResponse(status=200, headers=(), body=_Endless()))
    assert scope.cancelled_caught


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
        b"cache-control": b"private, no-store",
        b"x-content-type-options": b"nosniff",
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
        (304, [(b"content-type", b"")], None),
        (304, [(b"content-type", b"a/b")], b"a/b"),
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


# --- what a browser may make of an answer

HTML = b"<script>parent.postMessage(document.cookie, '*')</script>"
SANDBOX = b"sandbox; default-src 'none'"


@pytest.mark.parametrize("status", [200, 204, 206, 304, 404, 500])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_no_browser_guesses_and_no_cache_keeps(status: int, method: str) -> None:
    for headers in ([], [(b"content-type", b"image/png")], [(b"content-type", b"text/html")]):
        answer = _complete(status, *headers, method=method)
        assert (answer[b"x-content-type-options"], answer[b"cache-control"]) == (b"nosniff", b"private, no-store")


@pytest.mark.parametrize(
    "content_type",
    [
        b"text/html",
        b"Text/HTML ; charset=utf-8",
        b"text/html;charset=a,b",
        b"application/xhtml+xml",
        b"image/svg+xml",
        b"IMAGE/SVG+XML",
        b"application/atom+xml; type=entry",
        b"text/xml",
        b"application/xml",
        b"text/xsl",
        b"text/rdf",
        b"multipart/x-mixed-replace; boundary=a",
        b"multipart/mixed; boundary=a",
        b"message/rfc822",
        b"application/json, text/html",
        b"application/json,text/html;charset=utf-8",
        b"application/json; a=b, text/html",
        b"*/*",
        b"unknown/unknown",
        b"application/unknown",
        b"html",
        b"text/",
        b"text/ht ml",
        b"text/html/",
        b"",
    ],
)
@pytest.mark.parametrize("status", [200, 404, 500])
def test_what_a_browser_would_run_runs_in_no_origin(content_type: bytes, status: int) -> None:
    answer = _complete(status, (b"content-type", content_type))
    assert answer[b"content-security-policy"] == SANDBOX
    assert answer[b"content-type"] == (content_type or b"application/octet-stream")


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"application/json; charset=utf-8",
        b"application/problem+json",
        b"application/octet-stream",
        b"application/pdf",
        b"image/png",
        b"image/webp",
        b"audio/wav",
        b"video/mp4",
        b"text/plain;charset=UTF-8",
        b"text/javascript",
        b"text/event-stream",
        b"application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ],
)
def test_what_no_browser_runs_is_left_alone(content_type: bytes) -> None:
    assert b"content-security-policy" not in _complete(200, (b"content-type", content_type))
    own = (b"content-security-policy", b"frame-ancestors 'self'")
    assert _complete(200, (b"content-type", content_type), own)[own[0]] == own[1]


@pytest.mark.parametrize(
    ("status", "headers", "sandboxed"),
    [
        (200, [], True),
        (200, [(b"content-length", b"5")], True),
        (200, [(b"content-length", b"0")], False),
        (204, [], False),
        (304, [], False),
        (304, [(b"content-type", b"text/html")], True),  # a copy takes it over
        (302, [(b"location", b"/")], True),
    ],
)
def test_a_body_without_a_type_is_nothing_to_show(
    status: int, headers: list[tuple[bytes, bytes]], sandboxed: bool
) -> None:
    assert (_complete(status, *headers).get(b"content-security-policy") == SANDBOX) is sandboxed


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([b"no-store"], b"no-store"),
        ([b"public, max-age=60"], b"private, no-store"),
        ([b"private, max-age=60"], b"private, no-store"),
        ([b"no-cache"], b"private, no-store"),
        ([b""], b"private, no-store"),
        ([b"No-Store,max-age=0"], b"No-Store,max-age=0"),
        ([b"no-cache , no-store , must-revalidate"], b"no-cache , no-store , must-revalidate"),
        ([b"no-storefront"], b"private, no-store"),
        ([b'public, x="a, no-store, b"'], b"private, no-store"),
        ([b"no-cache, no-transform"], b"private, no-store, no-transform"),
        ([b"public", b"max-age=60"], b"private, no-store"),
        ([b"public", b"no-transform"], b"private, no-store, no-transform"),
        ([b"no-store", b"must-revalidate"], b"no-store, must-revalidate"),
        ([b"max-age=0", b"no-store"], b"max-age=0, no-store"),
    ],
)
def test_no_cache_keeps_an_answer_whatever_was_said(said: list[bytes], told: bytes) -> None:
    headers = tuple((b"cache-control", value) for value in said)
    response = complete(ProxyResponse(status=200, headers=headers, body=Chunks([])), method="GET", trace_id="t")
    assert [value for name, value in response.headers if name == b"cache-control"] == [told]


def test_a_stream_is_collected_by_no_proxy_on_its_way() -> None:
    answer = _complete(200, (b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"yes"))
    assert answer[b"x-accel-buffering"] == b"no"
    assert answer[b"cache-control"] == b"private, no-store"
    assert b"x-accel-buffering" not in _complete(200, (b"content-type", b"text/plain"))


NAMES = [b"cache-control", b"content-security-policy", b"content-type", b"x-accel-buffering", b"x-content-type-options"]


async def test_neither_replicate_nor_a_layer_adds_to_what_is_said(upstream: RawUpstream) -> None:
    said = (
        *((b"content-security-policy", b"script-src *"), (b"x-content-type-options", b"none")),
        *((b"cache-control", b"public"), (b"content-type", b"text/html"), (b"x-accel-buffering", b"yes")),
    )

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(HTML))
            connection.send(b"".join(b"%s: %s\r\n" % pair for pair in said * 2) + b"\r\n" + HTML)

    def layer(forward: Forward) -> Forward:
        async def adding(request: ProxyRequest) -> ProxyResponse:
            response = await forward(request)
            return replace(response, headers=(*response.headers, *said))

        return adding

    upstream.script = script
    options = {"return_headers": [name.decode() for name in NAMES]}
    for layers in ([], [layer]):
        caller = await call(proxy(upstream.url, options=options, layers=layers), http_scope())
        assert caller.content == HTML
        assert {name: caller.header(name) for name in NAMES if name != b"x-accel-buffering"} == {
            b"cache-control": [b"private, no-store"],
            b"content-security-policy": [SANDBOX],
            b"content-type": [b"text/html"],
            b"x-content-type-options": [b"nosniff"],
        }


@pytest.mark.parametrize(
    ("method", "target", "headers", "status"),
    [
        ("GET", "/v1/account", [KEY], 200),
        ("HEAD", "/v1/account", [KEY], 200),
        ("GET", "/v1/account", [], 401),
        ("GET", "/v1/-/streams/x", [], 404),
        ("POST", "/v1/-/webhooks", [], 400),
    ],
)
async def test_every_answer_says_so(
    upstream: RawUpstream, method: str, target: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    secret = "whsec_" + base64.b64encode(bytes(24)).decode()
    options = {"proxy_streams": True, "stream_key": "k" * 32, "webhook_secrets": [secret]}
    caller = await call(proxy(upstream.url, options=options), http_scope(method, target, headers))
    assert caller.status == status
    assert caller.header(b"cache-control") == [b"private, no-store"]
    assert caller.header(b"x-content-type-options") == [b"nosniff"]
    assert caller.header(b"content-security-policy") == []


async def test_a_stream_is_said_to_be_one_and_nothing_else(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while received := connection.request():
            event_stream = received.header(b"accept") == [b"text/event-stream"]
            kind = b"text/event-stream; charset=utf-8" if event_stream else b"text/html"
            head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncache-control: public\r\ncontent-length: 9\r\n\r\n"
            connection.send(head % kind + b"data: 1\n\n")

    upstream.script = script
    host = f"127.0.0.1:{upstream.port}"
    app = proxy(upstream.url, options={"proxy_streams": True, "stream_key": "k" * 32, "stream_hosts": [host]})
    path = app._streams.path_for(f"http://{host}/files/a", "p1")
    stream = await call(app, http_scope("GET", "/v1" + path, []))
    page = await call(app, http_scope("GET", "/v1" + path, [(b"accept", b"text/html")]))
    assert [received.header(b"via") for received in upstream.requests] == [[], []]  # no host of the API
    assert stream.content == page.content == b"data: 1\n\n"
    assert [stream.header(name) for name in NAMES] == [
        *([b"private, no-store"], [], [b"text/event-stream"], [b"no"], [b"nosniff"])
    ]
    assert [page.header(name) for name in NAMES] == [
        *([b"private, no-store"], [SANDBOX], [b"text/html"], [], [b"nosniff"])
    ]


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
