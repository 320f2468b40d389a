from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import portkey
from replicate_proxy_mw.errors import BadRequest


@pytest.mark.parametrize(
    ("headers", "api_key"),
    [
        ([(b"x-portkey-api-key", b"pk-1")], "pk-1"),
        ([(b"authorization", b"Bearer pk-1")], "pk-1"),
        ([(b"authorization", b"token  pk-1 ")], "pk-1"),
        ([(b"authorization", b"Bearer REPLICATE_API_KEY"), (b"x-portkey-api-key", b"pk-1")], "pk-1"),
        ([(b"x-portkey-api-key", b""), (b"authorization", b"Bearer pk-1")], "pk-1"),
        ([(b"authorization", b"Basic cGs6MQ==")], None),
        ([(b"authorization", b"pk-1")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([], None),
    ],
)
def test_who_is_calling(headers: list[tuple[bytes, bytes]], api_key: str | None) -> None:
    assert portkey.read(headers).api_key == api_key


@pytest.mark.parametrize("name", [b"x-portkey-api-key", b"authorization"])
def test_two_of_one_credential_are_refused(name: bytes) -> None:
    with pytest.raises(BadRequest, match="more than one"):
        portkey.read([(name, b"Bearer a"), (name, b"Bearer a")])


def test_what_the_caller_says() -> None:
    context = portkey.read(
        [
            (b"x-portkey-provider", b"@team-account"),
            (b"x-portkey-virtual-key", b"replicate-abc"),
            (b"x-portkey-config", b"pc-1"),
            (b"x-portkey-trace-id", b"order-42"),
            (b"x-portkey-span-id", b"s"),
            (b"x-portkey-parent-span-id", b"p"),
            (b"x-portkey-span-name", "n\u00e4me".encode("latin-1")),
            (b"x-portkey-metadata", b'{"_user": "u1", "env": "test"}'),
            (b"x-portkey-some-future-option", b"v"),
        ]
    )
    assert context == portkey.PortkeyContext(
        present=True,
        provider="@team-account",
        virtual_key="replicate-abc",
        config="pc-1",
        trace_id="order-42",
        span_id="s",
        parent_span_id="p",
        span_name="näme",
        metadata={"_user": "u1", "env": "test"},
    )


@pytest.mark.parametrize(
    ("authorization", "config", "token"),
    [
        (b"Bearer r8_own", None, "r8_own"),
        (b"Token r8_own", None, "r8_own"),
        (b"r8_own", None, "r8_own"),
        (b"r8_own", b'{"api_key": "r8_other"}', "r8_own"),
        (b"Bearer DUMMY-KEY", b'{"api_key": "r8_other"}', "r8_other"),
        (None, b'{"api_key": "r8_other"}', "r8_other"),
        (b"Bearer OPENAI_API_KEY", None, None),
        (b"Bearer pk-1", None, None),
        (b"pk-1", None, None),
        (b"", None, None),
        (b"Bearer ", None, None),
        (b"token", None, None),
        (b"Basic cGs6MQ==", None, None),
        (None, b"pc-slug", None),
        (None, b'{"api_key": "pk-1"}', None),
    ],
)
def test_a_token_that_the_caller_brings(authorization: bytes | None, config: bytes | None, token: str | None) -> None:
    headers = [(b"x-portkey-api-key", b"pk-1")]
    headers += [(b"authorization", authorization)] if authorization is not None else []
    headers += [(b"x-portkey-config", config)] if config else []
    context = portkey.read(headers)
    assert (context.api_key, context.caller_token) == ("pk-1", token)


@pytest.mark.parametrize(
    ("headers", "provider"),
    [
        ([(b"x-portkey-mode", b"proxy replicate")], "replicate"),
        ([(b"x-portkey-mode", b"proxy replicate"), (b"x-portkey-provider", b"@team")], "@team"),
        ([(b"x-portkey-mode", b"proxy")], None),
        ([(b"x-portkey-mode", b"single replicate")], None),
        ([(b"x-portkey-provider", b"")], None),
    ],
)
def test_the_provider(headers: list[tuple[bytes, bytes]], provider: str | None) -> None:
    assert portkey.read(headers).provider == provider


def test_a_key_in_authorization_is_no_token() -> None:
    context = portkey.read([(b"authorization", b"Bearer pk-1"), (b"x-portkey-provider", b"replicate")])
    assert (context.api_key, context.caller_token) == ("pk-1", None)


@pytest.mark.parametrize(
    ("config", "timeout", "retry"),
    [
        (b"pc-slug", None, None),
        (b"{}", None, None),
        (b'{"cache": {"mode": "simple"}, "strategy": {"mode": "single"}, "what": 1}', None, None),
        (b'{"request_timeout": 300}', 0.3, None),
        (b'{"retry": {"attempts": 3}}', None, portkey.Retry(attempts=3)),
        (
            b'{"retry": {"attempts": 0, "on_status_codes": [503], "use_retry_after_header": true}}',
            None,
            portkey.Retry(attempts=0, status_codes=frozenset([503])),
        ),
        (b'{"retry": {"attempts": 5, "use_retry_after_headers": false}}', None, portkey.Retry(attempts=5)),
    ],
)
def test_what_a_config_asks_for(config: bytes, timeout: float | None, retry: portkey.Retry | None) -> None:
    context = portkey.read([(b"x-portkey-config", config)])
    assert (context.config, context.request_timeout, context.retry) == (config.decode(), timeout, retry)


def test_the_header_beats_the_config() -> None:
    headers = [(b"x-portkey-config", b'{"request_timeout": 300}'), (b"x-portkey-request-timeout", b"5000")]
    assert portkey.read(headers).request_timeout == 5


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (b"{", "not valid JSON"),
        (b'{"a":' + b"[" * 5000, "not valid JSON"),
        (b'{"custom_host": "http://evil.test"}', "custom_host"),
        (b'{"api_key": 1}', "api_key"),
        (b'{"request_timeout": "soon"}', "request_timeout"),
        (b'{"request_timeout": []}', "request_timeout"),
        (b'{"request_timeout": 0}', "request_timeout"),
        (b'{"request_timeout": true}', "request_timeout"),
        (b'{"request_timeout": 1' + b"0" * 400 + b"}", "request_timeout"),
        (b'{"retry": 3}', "retry is"),
        (b'{"retry": {}}', "retry.attempts"),
        (b'{"retry": {"attempts": true}}', "retry.attempts"),
        (b'{"retry": {"attempts": 6}}', "retry.attempts"),
        (b'{"retry": {"attempts": 1, "on_status_codes": 503}}', "retry.on_status_codes"),
        (b'{"retry": {"attempts": 1, "on_status_codes": ["503"]}}', "retry.on_status_codes"),
        (b'{"retry": {"attempts": 1, "on_status_codes": [true]}}', "retry.on_status_codes"),
        (b'{"retry": {"attempts": 1, "use_retry_after_headers": 1}}', "retry.use_retry_after_headers"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(config: bytes, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        portkey.read([(b"x-portkey-config", config)])


@pytest.mark.parametrize("timeout", [b"soon", b"0", b"-1", b"nan", b"inf", b"1e99"])
def test_a_time_limit_that_is_none(timeout: bytes) -> None:
    with pytest.raises(BadRequest, match="x-portkey-request-timeout"):
        portkey.read([(b"x-portkey-request-timeout", timeout)])


def test_no_caller_chooses_the_destination() -> None:
    with pytest.raises(BadRequest, match="x-portkey-custom-host"):
        portkey.read([(b"x-portkey-custom-host", b"https://evil.test")])


def test_printing_a_context_shows_no_secret() -> None:
    headers = [(b"x-portkey-" + name, b"secret") for name in (b"api-key", b"virtual-key", b"config")]
    headers.append((b"authorization", b"Bearer secret-token"))
    assert "secret" not in repr(portkey.read(headers))


@pytest.mark.parametrize("trace_id", [b"a" * 255 + b" " + b"b", b"a\x01b\x7f", b" \t", b"\x01"])
def test_no_trace_id_makes_a_header_that_a_server_refuses(trace_id: bytes) -> None:
    context = portkey.read([(b"x-portkey-trace-id", trace_id)])
    echoed = dict(portkey.answer(trace_id=context.trace_id or "new", sent=()))[b"x-portkey-trace-id"]
    assert echoed == echoed.strip()
    assert echoed.decode().isprintable()
    assert echoed


def test_texts_are_cut() -> None:
    assert portkey.read([(b"x-portkey-trace-id", b"x" * 1000)]).trace_id == "x" * 256


@pytest.mark.parametrize(
    ("text", "metadata", "invalid"),
    [
        (b"", None, False),
        (b"{}", {}, False),
        (b'{"a": 1, "b": {"c": [null]}, "d": "\\u00e4"}', {"a": "1", "b": '{"c":[null]}', "d": "ä"}, False),
        (b'{"a": "\\ud800"}', {"a": "?"}, False),
        (b'{"a": NaN}', {"a": "NaN"}, False),
        (b'{"a": "%s"}' % (b"x" * 300), {"a": "x" * 256}, False),
        (b"[1]", None, True),
        (b"{", None, True),
        (b"[" * 4000, None, True),
        (b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}", None, True),
        (b'{"a": ' + b"9" * 4080 + b"}", {"a": "9" * 256}, False),
        (b'{"a": "' + b"x" * 5000 + b'"}', None, True),
    ],
)
def test_metadata_is_read_or_reported(text: bytes, metadata: dict[str, str] | None, invalid: bool) -> None:
    context = portkey.read([(b"x-portkey-metadata", text)])
    assert (context.metadata, context.metadata_invalid) == (metadata, invalid)


def test_metadata_keeps_its_first_32_keys() -> None:
    content = {str(i): "v" for i in range(40)}
    metadata = portkey.read([(b"x-portkey-metadata", json.dumps(content).encode())]).metadata
    assert metadata == {str(i): "v" for i in range(32)}


@pytest.mark.parametrize("depth", range(900, 1000))
def test_metadata_that_is_just_too_deep_fails_no_request(depth: int) -> None:
    portkey.read([(b"x-portkey-metadata", b'{"a":' + b"[" * depth + b"]" * depth + b"}")])


@given(st.binary(max_size=200))
def test_no_metadata_fails_a_request(text: bytes) -> None:
    portkey.read([(b"x-portkey-metadata", text)])


@pytest.mark.parametrize(
    ("text", "debug"),
    [
        (b"false", False),
        (b"False", False),
        (b" FALSE ", False),
        (b"true", True),
        (b"TRUE", True),
        (b"", None),
        (b"0", None),
        (b"no", None),
        (b"falsey", None),
    ],
)
def test_whether_content_may_be_logged(text: bytes, debug: bool | None) -> None:
    context = portkey.read([(b"x-portkey-debug", text)])
    assert context == portkey.PortkeyContext(present=True, debug=debug)


def test_nobody_forbids_it_by_default() -> None:
    assert portkey.read([(b"x-portkey-trace-id", b"t")]).debug is None
    assert portkey.read([]).debug is None


@pytest.mark.parametrize(
    ("config", "headers", "asked"),
    [
        (None, [], {}),
        ("pc-team", [(b"x-portkey-api-key", b"pk")], {}),
        ('{"retry": {"attempts": 1}}', [], {}),
        ('{"cache": true}', [], {}),
        ('{"cache": {"mode": "semantic", "max_age": 60}}', [], {"max_age": 60}),
        ('{"cache": {"mode": "simple"}}', [], {"results": True}),
        ('{"cache": {"mode": "simple", "max_age": 0.5}}', [], {"results": True, "max_age": 0.5}),
        (None, [(b"x-portkey-cache-force-refresh", b"True")], {"force_refresh": True}),
        (None, [(b"x-portkey-cache-force-refresh", b"false")], {}),
        (None, [(b"x-portkey-cache-namespace", b" design ")], {"namespace": "design"}),
    ],
)
def test_what_a_caller_asks_of_caches(
    config: str | None, headers: list[tuple[bytes, bytes]], asked: dict[str, Any]
) -> None:
    assert portkey.caching(config, headers) == portkey.Caching(**asked)


@pytest.mark.parametrize("max_age", ['"600"', "0", "-1", "true", "1e999", "NaN", "[]"])
def test_an_age_that_is_none(max_age: str) -> None:
    with pytest.raises(BadRequest, match=r"cache\.max_age"):
        portkey.caching('{"cache": {"mode": "simple", "max_age": ' + max_age + "}}", [])
