from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import ProxyConfig, ProxyRequest, ReplicateKey
from replicate_proxy_mw.errors import (
    BadRequest,
    ClientDisconnected,
    Overloaded,
    ProxyError,
    UpstreamAborted,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import UNKNOWN
from replicate_proxy_mw.upstream import Upstream
from replicate_proxy_mw.upstream.forward import _AS_IT_IS
from tests.raw_asgi import TOKEN, Arriving
from tests.raw_upstream import Connection, RawUpstream
from tests.tracebacks import locals_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]


def _request(method: str = "GET", target: str = "/x", body: Any = None, **more: Any) -> ProxyRequest:
    defaults: dict[str, Any] = {
        "route": UNKNOWN,
        "headers": ((b"accept", b"*/*"),),
        "body": Chunks([]) if body is None else body,
        "content_length": 0,
        "key": ReplicateKey(TOKEN),
        "portkey": PortkeyContext(),
        "scope": {},
    }
    return ProxyRequest(method=method, target=target, **(defaults | more))


async def _exchange(upstream: Upstream, request: ProxyRequest) -> bytes:
    response = await upstream.forward(request)
    try:
        return b"".join([chunk async for chunk in response.body])
    finally:
        await response.aclose()
        await upstream.aclose()


def _to(upstream: RawUpstream, **options: Any) -> Upstream:
    return Upstream(ProxyConfig(upstream=upstream.url, **options), None)


async def test_two_in_one_event_loop_have_connections_of_their_own(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b"ok")

    upstream.script = script
    both = [_to(upstream), _to(upstream)]
    for one in both:
        response = await one.forward(_request())
        assert b"".join([chunk async for chunk in response.body]) == b"ok"
        await response.aclose()
    assert len(upstream.connections) == 2
    for one in both:
        await one.aclose()


async def test_the_wire(upstream: RawUpstream) -> None:
    via = ((b"via", b"1.1 a"),)
    assert await _exchange(_to(upstream), _request(target="/a%2Fb//c?x=%20&x=|", via=via)) == b"{}"
    [received] = upstream.requests
    assert received.line == b"GET /v1/a%2Fb//c?x=%20&x=| HTTP/1.1"
    assert received.headers == [
        (b"host", f"127.0.0.1:{upstream.port}".encode()),
        (b"via", b"1.1 a"),
        (b"accept", b"*/*"),
        (b"authorization", b"Bearer " + TOKEN.encode()),
    ]


@pytest.mark.parametrize(
    ("method", "body", "content_length", "framing", "sent"),
    [
        ("GET", [], 0, [], b""),
        ("DELETE", [], 0, [], b""),
        ("POST", [], 0, [(b"content-length", b"0")], b""),
        ("PATCH", [b"ab", b"c"], 3, [(b"content-length", b"3")], b"abc"),
        ("QUERY", [b"llama"], 5, [(b"content-length", b"5")], b"llama"),
        ("POST", [b"ab", b"c"], None, [(b"transfer-encoding", b"chunked")], b"3\r\nabc\r\n0\r\n\r\n"),
    ],
)
async def test_a_body_is_framed_by_us(
    upstream: RawUpstream, method: str, body: list[bytes], content_length: int | None, framing: Any, sent: bytes
) -> None:
    await _exchange(_to(upstream), _request(method, body=Chunks(body), content_length=content_length))
    [received] = upstream.requests
    assert [pair for pair in received.headers if pair[0] in (b"content-length", b"transfer-encoding")] == framing
    assert received.body == sent


async def test_an_upstream_without_a_path(upstream: RawUpstream) -> None:
    await _exchange(Upstream(ProxyConfig(upstream=f"http://127.0.0.1:{upstream.port}"), None), _request(target="?a=b"))
    assert upstream.requests[0].line == b"GET /?a=b HTTP/1.1"


@given(st.from_regex(_AS_IT_IS, fullmatch=True))
def test_what_needs_no_encoding_is_what_httpx_leaves(target: str) -> None:
    assert httpx.URL("https://api.replicate.com/v1" + target).raw_path == b"/v1" + target.encode()


@pytest.mark.parametrize(
    "target", ["/a", "/a/b.c~d_e-f", "/a?b=c&d", "/a%2Fb", "/a/", "/a/../b", "", "?a", '/"a"', "/a?"]
)
async def test_targets_go_up_as_httpx_would_send_them(upstream: RawUpstream, target: str) -> None:
    await _exchange(_to(upstream), _request(target=target))
    async with httpx.AsyncHTTPTransport() as transport_of_httpx:
        await _exchange(Upstream(ProxyConfig(upstream=upstream.url), transport_of_httpx), _request(target=target))
    ours, httpx_s = upstream.requests
    assert ours.line == httpx_s.line


async def test_no_target_leads_to_another_host(upstream: RawUpstream) -> None:
    for target in ("@evil.test/", ".evil.test/x", ":1234/"):
        with pytest.raises(UpstreamFailed):
            await Upstream(ProxyConfig(upstream="https://api.replicate.com"), None).forward(_request(target=target))


async def test_long_targets_and_queries_are_not_remembered(upstream: RawUpstream) -> None:
    async with httpx.AsyncHTTPTransport() as transport_of_httpx:
        transport = Upstream(ProxyConfig(upstream=upstream.url), transport_of_httpx)
        for target in ("/x", "/x", "/x?signature=s", "/" + "x" * 200):
            await _exchange(transport, _request(target=target))
    assert transport._cached_url.cache_info()[:2] == (1, 1)
    assert [received.line.split()[1] for received in upstream.requests][2:] == [
        b"/v1/x?signature=s",
        b"/v1/" + b"x" * 200,
    ]


async def test_a_layer_that_forgets_the_length_is_told_so(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ProxyError) as raised:
        await _exchange(_to(upstream), _request("POST", body=Chunks([b"abc"]), content_length=2))
    assert raised.value.code == "internal_error"
    assert "content_length" in caplog.text


async def test_a_target_that_no_url_can_hold_is_the_caller_s_mistake(upstream: RawUpstream) -> None:
    with pytest.raises(BadRequest):
        await _to(upstream).forward(_request(target="/" + "a" * 70000))


async def test_refused_means_nothing_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    with RawUpstream() as gone:
        url = gone.url
    with pytest.raises(UpstreamUnreachable):
        await _exchange(Upstream(ProxyConfig(upstream=url), None), _request())
    assert caplog.messages == ["Replicate could not be reached: ConnectionRefusedError"]


async def test_the_log_tells_dns_from_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UpstreamUnreachable):
        await _exchange(Upstream(ProxyConfig(upstream="https://nobody.invalid/v1"), None), _request())
    assert caplog.messages == ["Replicate could not be reached: gaierror"]


async def test_of_another_transport_s_error_the_log_has_its_class_alone(caplog: pytest.LogCaptureFixture) -> None:
    class TalkativeError(httpx.ConnectError):
        because = ""

    class Unreachable(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            error = TalkativeError(f"no way to send {request.headers['authorization']}")
            error.because = str(error)
            raise error

    with pytest.raises(UpstreamUnreachable):
        await _exchange(Upstream(ProxyConfig(), Unreachable()), _request())
    assert caplog.messages == ["Replicate could not be reached: TalkativeError"]


def _silent(connection: Connection) -> None:
    connection.request()
    connection.wait_closed()


def _drops(connection: Connection) -> None:
    connection.request()


def _resets(connection: Connection) -> None:
    connection.request()
    connection.reset()


def _garbage(connection: Connection) -> None:
    connection.request()
    connection.send(b"SSH-2.0-OpenSSH\r\n\r\n")


def _switches(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
    connection.wait_closed()


@pytest.mark.parametrize("theirs", [True, False])
async def test_what_the_body_refuses_is_what_is_answered(upstream: RawUpstream, theirs: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        raise BadRequest("Not as long as it was said to be.")

    def script(connection: Connection) -> None:
        assert connection.request() is None

    upstream.script = script
    async with httpx.AsyncHTTPTransport() as transport_of_httpx:
        to = Upstream(ProxyConfig(upstream=upstream.url), transport_of_httpx if theirs else None)
        with pytest.raises(BadRequest, match="as long"):
            await _exchange(to, _request("POST", body=body(), content_length=3))
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (_silent, UpstreamTimeout),
        (_drops, UpstreamFailed),
        (_resets, UpstreamFailed),
        (_garbage, UpstreamFailed),
        (_switches, UpstreamFailed),
    ],
)
async def test_a_failure_before_the_answer(upstream: RawUpstream, script: Any, error: type[ProxyError]) -> None:
    upstream.script = script
    with pytest.raises(error) as raised:
        await _exchange(_to(upstream, read_timeout=0.2), _request("POST"))
    assert len(upstream.requests) == 1
    # The transport's own exception may hold headers, so it is not even the context of ours.
    assert raised.value.__context__ is None


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")


def _bad_chunk(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")


def _stalls(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    connection.wait_closed()


@pytest.mark.parametrize("script", [_cut, _bad_chunk, _stalls])
async def test_a_failure_within_the_answer(upstream: RawUpstream, script: Any) -> None:
    upstream.script = script
    transport = _to(upstream, read_timeout=0.2)
    response = await transport.forward(_request())
    with pytest.raises(UpstreamAborted) as raised:
        async for _ in response.body:
            pass
    assert raised.value.__context__ is None
    await response.aclose()
    await transport.aclose()


async def test_the_wait_for_a_connection(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\no")
        connection.wait_closed()

    upstream.script = script
    transport = _to(upstream, max_connections=1, connection_wait=0.05)
    held = await transport.forward(_request())
    with pytest.raises(Overloaded) as raised:
        await transport.forward(_request())
    assert raised.value.headers == ((b"retry-after", b"1"),)
    await held.aclose()
    await transport.aclose()


async def test_an_answer_that_nobody_reads_to_its_end(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        connection.wait_closed()

    upstream.script = script
    transport = _to(upstream)
    response = await transport.forward(_request())
    body = aiter(response.body)
    assert await anext(body) == b"abc"
    await response.aclose()
    assert await anyio.to_thread.run_sync(upstream.closed.wait, 2)
    await transport.aclose()


@pytest.mark.parametrize(
    ("status", "headers"), [(200, [(b"link", b"a\r\nset-cookie: b")]), (101, [(b"upgrade", b"h2c")]), (999, [])]
)
async def test_an_answer_that_a_transport_should_not_have_given(status: int, headers: Any) -> None:
    closed = []

    class Stream(httpx.AsyncByteStream):
        def __aiter__(self) -> AsyncIterator[bytes]:
            return Arriving([])

        async def aclose(self) -> None:
            closed.append(True)
            raise ZeroDivisionError

    class Odd(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(status, headers=headers, stream=Stream())

    with pytest.raises(UpstreamFailed):
        await Upstream(ProxyConfig(), Odd()).forward(_request())
    assert closed


async def test_a_caller_who_leaves_within_the_upload_is_no_failure_of_upstream(upstream: RawUpstream) -> None:
    class Leaves(Arriving):
        async def __anext__(self) -> bytes:
            raise ClientDisconnected()

    with pytest.raises(ClientDisconnected):
        await _exchange(_to(upstream), _request("POST", body=Leaves([]), content_length=None))


class Given(httpx.AsyncBaseTransport):
    """A host's own transport around a real one."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.requests = 0
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        self.closed = True
        await self.inner.aclose()


async def test_a_given_transport_is_used_and_never_closed(upstream: RawUpstream) -> None:
    own = Given()
    transport = Upstream(ProxyConfig(upstream=upstream.url), own)
    assert await _exchange(transport, _request()) == b"{}"
    assert (own.requests, own.closed) == (1, False)
    await own.aclose()


async def test_a_transport_of_its_own_is_opened_again_after_closing(upstream: RawUpstream) -> None:
    transport = _to(upstream)
    for _ in range(2):
        assert await _exchange(transport, _request()) == b"{}"
    assert len(upstream.connections) == 2


@pytest.mark.parametrize("own", [True, False])
async def test_who_cancels_does_not_find_the_token(upstream: RawUpstream, own: bool) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    async with httpx.AsyncHTTPTransport() as transport_of_httpx:
        to = _to(upstream) if own else Upstream(ProxyConfig(upstream=upstream.url), transport_of_httpx)
        found: list[str] = []

        async def forward() -> None:
            try:
                await to.forward(_request())
            except anyio.get_cancelled_exc_class() as cancelled:
                found.append(locals_of(cancelled))
                raise

        with anyio.move_on_after(0.1):
            await forward()
        await to.aclose()
    [shown] = found
    assert "Upstream" in shown
    assert TOKEN not in shown


async def test_a_transport_of_the_host_s_that_fails() -> None:
    class Failing(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert [chunk async for chunk in request.stream] == []  # type: ignore[union-attr]
            raise httpx.ReadTimeout("late")

    with pytest.raises(UpstreamTimeout):
        await Upstream(ProxyConfig(), Failing()).forward(_request())
