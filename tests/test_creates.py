from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw.creates import (
    MAX_SIZE,
    canonical,
    content_of,
    created_id,
    digest,
    idempotency_key,
    is_unsent,
    watched,
)
from replicate_proxy_mw.errors import GuardrailFailed, RequestTimeout
from replicate_proxy_mw.exchange import Chunks, ProxyResponse
from tests.requests import request_of

JSON = ((b"content-type", b"application/json"),)

_NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _same(body: bytes) -> str:
    return canonical(content_of(JSON, body))


def _shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        pairs = [(name, _shuffled(inner, order)) for name, inner in value.items()]
        order.shuffle(pairs)
        return dict(pairs)
    return [_shuffled(inner, order) for inner in value] if isinstance(value, list) else value


@given(value=_VALUES, seed=st.integers(), indent=st.none() | st.integers(0, 3), ascii_only=st.booleans())
def test_order_space_and_escapes_make_no_difference(
    value: Any, seed: int, indent: int | None, ascii_only: bool
) -> None:
    shuffled = _shuffled(value, random.Random(seed))
    text = json.dumps(shuffled, indent=indent, ensure_ascii=ascii_only)
    assert _same(text.encode("utf-8", "surrogatepass")) == _same(json.dumps(value).encode())


def _told_apart(value: Any) -> Any:
    """Equal only for what is the same JSON: for Python, 1, 1.0 and True are equal."""
    if isinstance(value, dict):
        return "object", {name: _told_apart(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return "array", [_told_apart(inner) for inner in value]
    return type(value), repr(value)


@given(one=_VALUES, other=_VALUES)
def test_what_differs_is_told_apart(one: Any, other: Any) -> None:
    same = _same(json.dumps(one).encode()) == _same(json.dumps(other).encode())
    assert same == (_told_apart(one) == _told_apart(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(b"1", b"1.0"), (b"1", b"true"), (b"0", b"-0.0"), (b"[]", b"{}"), (b'"1"', b"1"), (b'"\xc3\xa9"', b'"e\xcc\x81"')],
)
def test_near_misses(one: bytes, other: bytes) -> None:
    assert _same(one) != _same(other)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "\\u0062": 2}}',
        b'{"a": NaN}',
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"1" * 5000,
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"[" * 100_000 + b"]" * 100_000,
        b'"' + b"x" * MAX_SIZE + b'"',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_readers_may_take_differently_has_no_canonical_form(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - some are of json and of int
        _same(body)


def test_what_can_be_read_and_not_written() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        canonical(deep)
    while deep:  # else its end would be a recursion, too
        deep = deep.pop()


@pytest.mark.parametrize(
    ("headers", "is_json"),
    [
        ((), False),
        (JSON, True),
        (((b"content-type", b"Application/JSON; charset=UTF-8"),), True),
        (((b"content-type", b'application/json;charset="utf-8"'),), True),
        (((b"content-type", b"application/json; charset=utf-16"),), False),
        (((b"content-type", b"application/jsonl"),), False),
        (((b"content-type", b"text/plain"),), False),
        ((*JSON, (b"content-encoding", b"gzip")), False),
        ((*JSON, *JSON), False),
    ],
)
def test_json_is_what_says_so(headers: Any, is_json: bool) -> None:
    if is_json:
        assert content_of(headers, b'{"a":1}') == {"a": 1}
    else:
        with pytest.raises(ValueError, match="not plain JSON"):
            content_of(headers, b'{"a":1}')


@given(one=st.lists(st.text() | st.binary(), max_size=4), other=st.lists(st.text() | st.binary(), max_size=4))
def test_a_digest_is_that_of_its_parts_and_of_where_they_end(one: list[str | bytes], other: list[str | bytes]) -> None:
    def bare(parts: list[str | bytes]) -> list[bytes]:
        return [part.encode() if isinstance(part, str) else part for part in parts]

    assert (digest(*one) == digest(*other)) == (bare(one) == bare(other))


@pytest.mark.parametrize(
    ("status", "body", "whole", "id"),
    [
        (201, b'{"id": "p1"}', True, "p1"),
        (202, b'{"urls": {"id": "x"}, "id": "p-_1"}', True, "p-_1"),
        (201, b'{"id": "p1", "output": "', False, "p1"),
        (201, b'{"id": "../account"}', True, None),
        (201, b'{"id": "%s"}' % (b"x" * 65), True, None),
        (201, b'{"id": ["p1"]}', True, None),
        (201, b"{}", True, None),
        (300, b'{"id": "p1"}', True, None),
        (422, b'{"id": "p1"}', True, None),
    ],
)
def test_the_id_of_what_was_created(status: int, body: bytes, whole: bool, id: str | None) -> None:
    response = ProxyResponse(status=status, headers=JSON, body=Chunks([body]))
    assert created_id(response, body, whole=whole) == id


_VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)


@given(key=_VISIBLE)
def test_a_key_is_the_same_in_quotes(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert idempotency_key([(b"x", b"y"), (b"idempotency-key", quoted.encode())]) == key
    if '"' not in key:
        assert idempotency_key([(b"idempotency-key", key.encode())]) == key


@pytest.mark.anyio
@pytest.mark.parametrize("changes", [{}, {"headers": JSON}, {"body": Chunks([b"another"])}])
async def test_what_was_never_asked_for_was_not_sent(changes: dict[str, Any]) -> None:
    request = watched(request_of("POST", "/predictions", body=Chunks([b"{}"]), content_length=2))
    assert watched(request) is request
    below = replace(request, **changes)
    assert isinstance(below.body, Chunks)
    assert below.body.at_hand == (b"another" if "body" in changes else b"{}")
    assert is_unsent(request, None)
    assert is_unsent(request, RequestTimeout(1))
    assert b"".join([chunk async for chunk in below.body]) == below.body.at_hand
    assert not is_unsent(request, None)
    assert not is_unsent(request, GuardrailFailed())


@pytest.mark.anyio
async def test_nobody_asks_for_an_empty_body() -> None:
    request = watched(request_of("POST", "/predictions"))
    assert not is_unsent(request, None)
    assert not is_unsent(request, RequestTimeout(1))
    assert is_unsent(request, GuardrailFailed())
    request.watch.opened = [ProxyResponse(status=201, headers=(), body=Chunks([]))]
    assert not is_unsent(request, GuardrailFailed())
