"""Rows 5, 7 to 11 and 13: what a caller's key becomes, what a resolver may do, and that no other credential passes."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from typing import Any

import anyio
import pytest

from replicate_proxy_mw import KeyRequest, MappingKeyResolver, ProxyConfig, ReplicateKey, StaticKeyResolver
from tests.raw_asgi import KEY, TOKEN, call, http_scope, proxy
from tests.raw_upstream import RawUpstream, Received
from tests.security.rows import row

pytestmark = pytest.mark.anyio

Pair = tuple[bytes, bytes]


async def _sent(upstream: RawUpstream, headers: Iterable[Pair], *body: bytes, method: str = "POST") -> Received:
    caller = await call(proxy(upstream.url), http_scope(method, "/v1/x", headers), *body)
    assert caller.status == 200
    [sent] = upstream.requests
    return sent


def _expected(upstream: RawUpstream, *more: Pair) -> list[Pair]:
    host, token = f"127.0.0.1:{upstream.port}".encode(), b"Bearer " + TOKEN.encode()
    return sorted([(b"host", host), (b"content-length", b"2"), *more, (b"authorization", token)])


def _without_via(sent: Received) -> list[Pair]:
    return sorted(pair for pair in sent.headers if pair[0] != b"via")


@row("2.5")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(
    "connection",
    [
        [b"authorization"],
        [b"close, Authorization, host, content-length"],
        [b"", b"AUTHORIZATION"],
        [b"keep-alive", b"x-portkey-api-key,authorization , transfer-encoding"],
    ],
)
async def test_connection_takes_nothing_away_that_we_put_in(upstream: RawUpstream, connection: list[bytes]) -> None:
    sent = await _sent(upstream, [KEY, *((b"connection", value) for value in connection)], b"{}")
    assert _without_via(sent) == _expected(upstream)
    assert sent.body == b"{}"


@row("2.5")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(
    "connection", [[b"Accept-Language"], [b"", b"accept-language"], [b"close", b"x,accept-language"]]
)
async def test_what_connection_names_goes_no_further(upstream: RawUpstream, connection: list[bytes]) -> None:
    headers = [(b"accept-language", b"de"), *((b"connection", value) for value in connection)]
    sent = await _sent(upstream, [KEY, *headers], b"{}")
    assert _without_via(sent) == _expected(upstream)


@row("2.7")
@pytest.mark.parametrize(
    "token",
    [
        "r8_aaaaaaaaaaaa\nx-evil: 1",
        "r8_aaaaaaaaaaaa\r\nhost: evil",
        "r8_aaaaaaaaaaaa\n",
        "r8_aaaaaaaaaaaa\x00",
        "r8_aaaaaaa aaaaa",
        "r8_aaaaaaaaaaaé",
        "r8_aaaaaaaaaaaß",
        "r8_aaa",
        "",
        "r8_" + "a" * 300,
    ],
)
async def test_a_token_that_could_end_its_line_is_none_and_is_told_to_nobody(
    upstream: RawUpstream, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def resolver(request: KeyRequest) -> str:
        return token

    caller = await call(proxy(upstream.url, key_resolver=resolver), http_scope())
    assert (caller.status, upstream.connections) == (503, [])
    assert caplog.messages == ["key resolver failed: ValueError"]
    assert b"r8_" not in caller.content
    with pytest.raises(ValueError, match="not a Replicate API token") as raised:
        ReplicateKey(token)
    assert "r8_" not in str(raised.value)


@row("2.8")
@pytest.mark.parametrize(
    "name", ["x-portkey-api-key", "api_key", "apiKey", "key", "token", "access_token", "authorization"]
)
async def test_a_key_in_the_query_is_no_key(upstream: RawUpstream, name: str) -> None:
    for value in ("pk-team-a", "Bearer%20pk-team-a"):
        caller = await call(proxy(upstream.url), http_scope(target=f"/v1/x?{name}={value}", headers=[]))
        assert caller.status == 401
        assert json.loads(caller.content)["error"]["code"] == "key_missing"
    assert upstream.connections == []


@row("2.9")
@pytest.mark.parametrize(
    "guess", ["", "pk-team-", "pk-team-aa", "pk-team-a.", "PK-TEAM-A", "pk-team-\xe1", "pk-team-a,pk-team-a", "*", "pk"]
)
async def test_only_the_whole_key_is_the_key(upstream: RawUpstream, guess: str) -> None:
    for resolver in (
        MappingKeyResolver({"pk-team-a": TOKEN, "pk-team-b-of-the-same-beginning": TOKEN}),
        StaticKeyResolver(TOKEN, api_keys=["pk-team-a", "pk-team-b-of-the-same-beginning"]),
    ):
        for header in (guess.encode(), b"pk-team-b-of-the-same-beginning"[:-1]):
            app = proxy(upstream.url, key_resolver=resolver)
            caller = await call(app, http_scope(headers=[(b"x-portkey-api-key", header)]))
            assert caller.status == 401
    assert upstream.connections == []


@row("2.9")
async def test_the_time_taken_does_not_tell_how_close_a_guess_was(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    resolver = StaticKeyResolver(TOKEN, api_keys=["pk-1", "pk-2-longer", "pk-3"])
    for guess, status in (("pk-1", 200), ("pk-3", 200), ("p", 401), ("pk-2-longed", 401)):
        compared.clear()
        app = proxy(upstream.url, key_resolver=resolver)
        assert (await call(app, http_scope(headers=[(b"x-portkey-api-key", guess.encode())]))).status == status
        assert compared == [(32, 32)] * 3


@row("2.9")
def test_a_resolver_holds_digests_and_no_keys() -> None:
    for resolver in (
        StaticKeyResolver(TOKEN, api_keys=["pk-of-the-caller"]),
        MappingKeyResolver({"pk-of-the-caller": TOKEN}),
    ):
        assert "pk-of-the-caller" not in repr(vars(resolver))


class Leaky(Exception):
    pass


@row("2.10")
@pytest.mark.parametrize("error", [Leaky, OSError, KeyError, UnicodeError, RecursionError, ExceptionGroup])
async def test_a_resolver_that_fails_lets_nobody_in_and_tells_its_class_alone(
    upstream: RawUpstream, error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"postgres://user:hunter2@db {TOKEN}"

    async def resolver(request: KeyRequest) -> str:
        raise error(text, [OSError(text)]) if error is ExceptionGroup else error(text)

    caller = await call(proxy(upstream.url, key_resolver=resolver), http_scope())
    assert (caller.status, caller.header(b"retry-after"), upstream.connections) == (503, [b"1"], [])
    assert json.loads(caller.content)["error"]["code"] == "resolver_failed"
    assert caplog.messages == [f"key resolver failed: {error.__name__}"]
    assert all(record.exc_info is None for record in caplog.records)
    for secret in ("hunter2", TOKEN, error.__name__):
        assert secret.encode() not in caller.content


@row("2.10")
@pytest.mark.parametrize("answer", [42, b"r8_aaaaaaaaaaaaaaaa", True, object(), ["r8_aaaaaaaaaaaaaaaa"], ""])
async def test_what_is_no_key_lets_nobody_in(upstream: RawUpstream, answer: Any) -> None:
    async def resolver(request: KeyRequest) -> Any:
        return answer

    caller = await call(proxy(upstream.url, key_resolver=resolver), http_scope())
    assert (caller.status, upstream.connections) == (503, [])


@row("2.11")
async def test_a_resolver_that_hangs_is_left(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    assert ProxyConfig().resolver_timeout == 2
    left = anyio.Event()

    async def resolver(request: KeyRequest) -> str:
        try:
            await anyio.sleep(1)
        except anyio.get_cancelled_exc_class():
            left.set()
            raise
        return TOKEN

    app = proxy(upstream.url, key_resolver=resolver, options={"resolver_timeout": 0.05})
    caller = await call(app, http_scope())
    assert (caller.status, caller.header(b"retry-after"), upstream.connections) == (503, [b"1"], [])
    assert left.is_set()
    assert caplog.messages == ["key resolver failed: TimeoutError"]


@row("2.13")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("authorization", [b"Bearer sk-own", b"Basic dXNlcjpwdw==", b"Token sk-own", b"sk-own", b""])
async def test_of_what_a_caller_says_only_what_is_listed_goes_up(upstream: RawUpstream, authorization: bytes) -> None:
    stays = b"""cookie set-cookie api-key x-api-key x-auth-token x-access-token x-csrf-token x-amz-security-token
        x-goog-api-key proxy-authorization proxy-connection keep-alive te trailer upgrade http2-settings expect
        x-portkey-virtual-key x-portkey-config x-portkey-provider x-portkey-metadata x-portkey-trace-id x-portkey-other
        forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip x-client-ip cf-connecting-ip
        x-forwarded-client-cert x-http-method-override x-original-url traceparent tracestate baggage
        x-request-id origin referer dnt sec-fetch-site access-control-request-method openai-organization
        x-stainless-os cache-control pragma if-range if-unmodified-since max-forwards x-unknown""".split()
    listed = [(b"accept", b"a"), (b"content-type", b"b"), (b"prefer", b"wait"), (b"user-agent", b"c")]
    secrets = [(name, b"%d" % (0x5EC0 + i)) for i, name in enumerate(stays)]
    sent = await _sent(upstream, [KEY, (b"authorization", authorization), *secrets, *listed], b"{}")
    assert _without_via(sent) == _expected(upstream, *listed)


@row("2.13")
@pytest.mark.parametrize(
    "name", ["Cookie", "authorization", "x-api-key", "proxy-authorization", "x-portkey-api-key", "host"]
)
def test_a_host_cannot_have_a_credential_go_up(name: str) -> None:
    with pytest.raises(ValueError, match="never passed on"):
        ProxyConfig(forward_headers=["x-fine", name])


@row("2.13")
async def test_a_token_of_the_caller_s_own_is_not_used_in_place_of_the_house_s(upstream: RawUpstream) -> None:
    own = (b"authorization", b"Bearer r8_2222222222222222222222222222")
    provider = (b"x-portkey-provider", b"replicate")
    assert _without_via(await _sent(upstream, [KEY, own, provider], b"{}")) == _expected(upstream)
