from __future__ import annotations

import json

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
        provider="@team-account",
        virtual_key="replicate-abc",
        config="pc-1",
        trace_id="order-42",
        span_id="s",
        parent_span_id="p",
        span_name="näme",
        metadata={"_user": "u1", "env": "test"},
    )


def test_printing_a_context_shows_no_secret() -> None:
    headers = [(b"x-portkey-" + name, b"secret") for name in (b"api-key", b"virtual-key", b"config")]
    assert "secret" not in repr(portkey.read(headers))


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
