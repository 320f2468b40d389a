from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from replicate_proxy_mw import Forward, ProxyRequest, ProxyResponse
from replicate_proxy_mw.errors import Overloaded, ProxyError, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from replicate_proxy_mw.layers import resend as module
from replicate_proxy_mw.layers.resend import resend
from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio


def _config(retry: str) -> tuple[bytes, bytes]:
    return (b"x-portkey-config", b'{"retry": %s}' % retry.encode())


def _answers(*statuses: bytes, headers: bytes = b"retry-after: 0\r\n") -> Callable[[Connection], None]:
    left = list(statuses)

    def script(connection: Connection) -> None:
        while connection.request():
            status = left.pop(0) if left else b"200 OK"
            connection.answer(status=status, headers=headers)

    return script


@pytest.mark.parametrize("status", [b"429 Too Many", b"502 Bad", b"503 Unavailable", b"504 Timeout"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_read_is_sent_again(upstream: RawUpstream, method: str, status: bytes) -> None:
    upstream.script = _answers(status, status)
    caller = await call(proxy(upstream.url), http_scope(method, headers=[KEY, _config('{"attempts": 3}')]))
    assert caller.status == 200
    assert caller.header(b"x-portkey-retry-attempt-count") == [b"2"]
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("status", [b"429 Too Many", b"500 Error", b"502 Bad", b"503 Unavailable", b"409 Conflict"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "QUERY"])
async def test_nothing_else_is(upstream: RawUpstream, method: str, status: bytes) -> None:
    upstream.script = _answers(status)
    headers = [KEY, _config('{"attempts": 5, "on_status_codes": [409, 429, 500, 502, 503]}')]
    caller = await call(proxy(upstream.url, options={"safe_retries": 5}), http_scope(method, headers=headers))
    assert caller.status == int(status[:3])
    assert caller.header(b"x-portkey-retry-attempt-count") == [b"0"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [b"500 Error", b"408 Timeout", b"404 Not Found"])
async def test_a_config_cannot_widen_the_rule(upstream: RawUpstream, status: bytes) -> None:
    upstream.script = _answers(status)
    headers = [KEY, _config('{"attempts": 5, "on_status_codes": [404, 408, 500]}')]
    assert (await call(proxy(upstream.url), http_scope(headers=headers))).status == int(status[:3])
    assert len(upstream.requests) == 1


async def test_a_config_can_narrow_it(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"429 Too Many")
    headers = [KEY, _config('{"attempts": 5, "on_status_codes": [503]}')]
    assert (await call(proxy(upstream.url), http_scope(headers=headers))).status == 429


async def test_by_default_nothing_is_sent_again(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"503 Unavailable")
    assert (await call(proxy(upstream.url), http_scope())).status == 503
    assert len(upstream.requests) == 1


async def test_the_house_s_own_number(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"503 Unavailable")
    assert (await call(proxy(upstream.url, options={"safe_retries": 1}), http_scope())).status == 200
    upstream.script = _answers(b"503 Unavailable")
    headers = [KEY, _config('{"attempts": 0}')]
    assert (await call(proxy(upstream.url, options={"safe_retries": 1}), http_scope(headers=headers))).status == 503


async def test_a_body_that_was_sent_is_gone(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"503 Unavailable")
    caller = await call(proxy(upstream.url, options={"safe_retries": 1}), http_scope("OPTIONS"), b"ab", b"c")
    assert (caller.status, len(upstream.requests)) == (503, 1)


async def test_when_all_attempts_are_used_up(upstream: RawUpstream) -> None:
    upstream.script = _answers(*[b"503 Unavailable"] * 9)
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, _config('{"attempts": 2}')]))
    assert (caller.status, caller.header(b"x-portkey-retry-attempt-count")) == (503, [b"-1"])
    assert len(upstream.requests) == 3


async def test_a_wait_that_is_too_long_is_the_caller_s(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"429 Too Many", headers=b"retry-after: 61\r\n")
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, _config('{"attempts": 2}')]))
    assert (caller.status, caller.header(b"retry-after")) == (429, [b"61"])
    assert caller.header(b"x-portkey-retry-attempt-count") == [b"0"]
    assert len(upstream.requests) == 1


async def test_retry_after_is_obeyed(upstream: RawUpstream) -> None:
    upstream.script = _answers(b"429 Too Many", headers=b"retry-after: 1\r\n")
    started = time.monotonic()
    headers = [KEY, _config('{"attempts": 1, "use_retry_after_headers": true}')]
    assert (await call(proxy(upstream.url), http_scope(headers=headers))).status == 200
    assert time.monotonic() - started >= 1


def _failing(*failures: type[ProxyError]) -> tuple[Forward, list[int]]:
    left, seen = list(failures), []

    async def forward(request: ProxyRequest) -> ProxyResponse:
        seen.append(request.resend_count)
        if left:
            raise left.pop(0)()
        return ProxyResponse.json(200, {})

    return forward, seen


async def _through(forward: Forward, method: str, attempts: int = 3) -> ProxyResponse:
    """One request of the middleware, as it reaches the layer."""
    answers: list[ProxyResponse] = []

    def host_s(_: Forward) -> Forward:
        async def resent(request: ProxyRequest) -> ProxyResponse:
            answers.append(await resend(attempts=attempts, first_wait=0.001)(forward)(request))
            return answers[0]

        return resent

    caller = await call(proxy("http://127.0.0.1:1", layers=[host_s]), http_scope(method), b"abc")
    if not answers:
        raise ProxyError(str(caller.status))
    return answers[0]


@pytest.mark.parametrize("failure", [UpstreamUnreachable, Overloaded])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_was_never_sent_is_sent_again(method: str, failure: type[ProxyError]) -> None:
    forward, seen = _failing(failure, failure)
    assert (await _through(forward, method)).status == 200
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "failure", "sent"),
    [
        ("GET", UpstreamFailed, 2),
        ("POST", UpstreamFailed, 1),
        ("GET", UpstreamTimeout, 1),
        ("POST", UpstreamTimeout, 1),
    ],
)
async def test_what_may_have_been_received(method: str, failure: type[ProxyError], sent: int) -> None:
    forward, seen = _failing(failure)
    if sent == 1:
        with pytest.raises(ProxyError):
            await _through(forward, method)
    else:
        assert (await _through(forward, method)).status == 200
    assert len(seen) == sent


async def test_a_failure_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = _failing(*[UpstreamUnreachable] * 9)
    with pytest.raises(ProxyError, match="502"):
        await _through(forward, "POST", attempts=2)
    assert len(seen) == 3
    monkeypatch.setattr(module, "TOTAL_WAIT", 0.0)
    with pytest.raises(ProxyError, match="502"):
        await _through(forward, "POST", attempts=2)
    assert len(seen) == 4


async def test_an_answer_that_is_not_used_gives_its_connection_back(upstream: RawUpstream) -> None:
    upstream.script = _answers(*[b"503 Unavailable"] * 3)
    app = proxy(upstream.url, options={"max_connections": 1, "connection_wait": 0.1, "safe_retries": 3})
    waited: Awaitable[Any] = call(app, http_scope())
    assert (await waited).status == 200
