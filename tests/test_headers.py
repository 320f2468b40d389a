from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import headers
from replicate_proxy_mw.errors import BadRequest, UpstreamFailed
from replicate_proxy_mw.keys import ReplicateKey


def test_what_goes_up() -> None:
    sent = [
        (b"host", b"proxy.test"),
        (b"accept", b"a/b"),
        (b"accept", b"c/d"),
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
        (b"authorization", b"Bearer pk"),
        (b"cookie", b"sid=1"),
        (b"x-portkey-api-key", b"pk"),
        (b"x-portkey-some-future-option", b"v"),
        (b"x-forwarded-for", b"192.0.2.1"),
        (b"x-stainless-lang", b"python"),
        (b"sec-fetch-mode", b"cors"),
        (b"traceparent", b"00-1-1-01"),
        (b"baggage", b"a=b"),
        (b"x_real_ip", b"192.0.2.1"),
        (b"prefer", b"wait=5"),
        (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"x-mine", b"hello"),
    ]
    assert headers.up(sent, {b"x-mine"}) == (
        (b"accept", b"a/b"),
        (b"accept", b"c/d"),
        (b"content-type", b"application/json"),
        (b"prefer", b"wait=5"),
        (b"x-mine", b"hello"),
    )


def test_what_connection_names_stays_here() -> None:
    sent = [(b"connection", b""), (b"connection", b"close, Prefer"), (b"prefer", b"wait"), (b"accept", b"*/*")]
    assert headers.up(sent) == ((b"accept", b"*/*"),)


@pytest.mark.parametrize("name", sorted(headers.SINGLE))
def test_single_headers_that_come_twice_are_refused(name: bytes) -> None:
    with pytest.raises(BadRequest, match=name.decode()):
        headers.up([(name, b"1"), (name, b"1")])


@pytest.mark.parametrize("name", [b"x_portkey_api_key", b"content_length", b"x-portkey_api-key", b"transfer_encoding"])
def test_names_that_pose_as_others_are_refused(name: bytes) -> None:
    with pytest.raises(BadRequest, match="_"):
        headers.up([(name, b"1")])


@pytest.mark.parametrize("value", [b"a\rb", b"a\nb", b"a\0b", b"a\x01b", b"a\x7fb", b"a ", b"\ta", b"a\n"])
def test_values_that_are_none_are_refused(value: bytes) -> None:
    with pytest.raises(BadRequest):
        headers.up([(b"accept", value)])
    with pytest.raises(UpstreamFailed):
        headers.down([(b"link", value)], 200)
    assert headers.up([(b"x-not-sent", value)]) == ()


@pytest.mark.parametrize("value", [b"", b"a\tb", b"a b", "ü".encode()])
def test_values_that_are_odd_pass(value: bytes) -> None:
    assert headers.up([(b"accept", value)]) == ((b"accept", value),)
    assert headers.down([(b"etag", value)], 200) == ((b"etag", value),)


def test_the_token_is_put_in_last() -> None:
    key = ReplicateKey("r8_token_of_the_test")
    assert headers.with_token(((b"accept", b"*/*"),), key) == [
        (b"accept", b"*/*"),
        (b"authorization", b"Bearer r8_token_of_the_test"),
    ]


def test_what_comes_back() -> None:
    answered = [
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"2"),
        (b"Set-Cookie", b"a=b"),
        (b"Strict-Transport-Security", b"max-age=1"),
        (b"Access-Control-Allow-Origin", b"*"),
        (b"Server", b"cloudflare"),
        (b"Date", b"today"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Connection", b"keep-alive, ETag"),
        (b"ETag", b'"1"'),
        (b"RateLimit-Remaining", b"10"),
        (b"X-RateLimit-Limit", b"20"),
        (b"Replicate-Edge-Cluster", b"us"),
        (b"Link", b"</a>"),
        (b"Link", b"</b>"),
        (b"X-Mine", b"hello"),
    ]
    assert headers.down(answered, 200, {b"x-mine"}) == (
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
        (b"ratelimit-remaining", b"10"),
        (b"x-ratelimit-limit", b"20"),
        (b"replicate-edge-cluster", b"us"),
        (b"link", b"</a>"),
        (b"link", b"</b>"),
        (b"x-mine", b"hello"),
    )


@pytest.mark.parametrize("status", [204, 304])
def test_no_length_where_there_is_no_body(status: int) -> None:
    assert headers.down([(b"content-length", b"5"), (b"etag", b"1")], status) == ((b"etag", b"1"),)


def test_chunks_have_no_length_whatever_is_said() -> None:
    answered = [(b"content-length", b"100"), (b"Transfer-Encoding", b"chunked"), (b"etag", b"1")]
    assert headers.down(answered, 200) == ((b"etag", b"1"),)


def test_the_length_of_a_body() -> None:
    assert headers.length([(b"content-length", b"12")]) == 12
    assert headers.length([]) is None
    for odd in (b"-1", b"", b"1e3", b"9" * 5000):
        with pytest.raises(BadRequest):
            headers.length([(b"content-length", odd)])


_NAMES = st.sampled_from(sorted(headers.UP | headers.NEVER | {b"x-portkey-config", b"x-other", b"x_mine"}))


@given(st.lists(st.tuples(_NAMES, st.binary(max_size=12))))
def test_nothing_else_goes_up(sent: list[tuple[bytes, bytes]]) -> None:
    try:
        kept = headers.up(sent)
    except BadRequest:
        return
    assert {name for name, _ in kept} <= headers.UP
    assert list(kept) == [pair for pair in sent if pair in kept]


def test_more_names_than_are_remembered_change_nothing() -> None:
    many = [(b"X-RateLimit-%d" % i, b"1") for i in range(headers.MAX_NAMES + 1)]
    for _ in range(2):
        assert headers.down(many, 200) == tuple((name.lower(), value) for name, value in many)
        assert headers.down([(b"X-Other", b"1"), (b"ETag", b"1")], 200) == ((b"etag", b"1"),)
    assert headers.down([(b"X-Other", b"1")], 200, {b"x-other"}) == ((b"x-other", b"1"),)


@given(st.binary(max_size=3), st.binary(max_size=3))
def test_a_value_is_refused_for_what_it_is_wherever_it_stands(one: bytes, other: bytes) -> None:
    def illegal(value: bytes) -> bool:
        return value.strip(b" \t") != value or any(byte == 127 or (byte < 32 and byte != 9) for byte in value)

    sent = [(b"accept", one), (b"prefer", other)]
    if illegal(one) or illegal(other):
        with pytest.raises(BadRequest):
            headers.up(sent)
        with pytest.raises(UpstreamFailed):
            headers.down([(b"etag", one), (b"link", other)], 200)
    else:
        assert headers.up(sent) == tuple(sent)
