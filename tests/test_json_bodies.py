from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import ProxyRequest, ProxyResponse, ReplicateKey, json_bodies, portkey, routing
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.headers import HeaderList
from replicate_proxy_mw.json_bodies import MAX_SIZE, elements, held, id_of, is_readable, is_rest, members, plain_of
from tests.raw_asgi import KEY, TOKEN, http_scope

JSON = (b"content-type", b"application/json")


def _response(*headers: tuple[bytes, bytes], status: int = 200) -> ProxyResponse:
    return ProxyResponse(status=status, headers=headers, body=Chunks([b"{}"]))


def test_asking_for_a_whole_plain_answer() -> None:
    request = ProxyRequest(
        method="GET",
        target="/account",
        route=routing.match("GET", "/account"),
        headers=(
            (b"accept", b"*/*"),
            (b"accept-encoding", b"br"),
            (b"if-none-match", b'"x"'),
            (b"if-modified-since", b"x"),
        ),
        body=Chunks([]),
        content_length=0,
        key=ReplicateKey(TOKEN),
        portkey=portkey.read([KEY]),
        scope=http_scope(),
    )
    assert json_bodies.asking_for_plain(request).headers == ((b"accept", b"*/*"), (b"accept-encoding", b"identity"))


@pytest.mark.parametrize(
    ("headers", "status", "readable"),
    [
        ((JSON,), 200, True),
        ((JSON,), 299, True),
        ((JSON,), 206, False),
        ((JSON,), 199, False),
        ((JSON,), 300, False),
        ((), 200, False),
        (((b"content-type", b"Application/Problem+JSON ; charset=utf-8"),), 200, True),
        (((b"content-type", b"text/plain"),), 200, False),
        (((b"content-type", b"application/jsonp"),), 200, False),
        ((JSON, JSON), 200, False),
        *(
            ((JSON, (b"content-encoding", coding)), 200, True)
            for coding in (b"gzip", b"X-GZIP", b"deflate", b"identity")
        ),
        *(((JSON, (b"content-encoding", coding)), 200, False) for coding in (b"br", b"gzip, gzip", b"zstd")),
        ((JSON, (b"content-encoding", b"gzip"), (b"content-encoding", b"gzip")), 200, False),
        ((JSON, (b"content-length", str(MAX_SIZE).encode())), 200, True),
        ((JSON, (b"content-length", str(MAX_SIZE + 1).encode())), 200, False),
        ((JSON, (b"content-length", b"9" * 5000)), 200, False),
        ((JSON, (b"content-length", b"x")), 200, True),
    ],
)
def test_which_answers_are_read(headers: HeaderList, status: int, readable: bool) -> None:
    assert is_readable(_response(*headers, status=status)) is readable


def test_a_bound_of_one_s_own() -> None:
    assert not is_readable(_response(JSON, (b"content-length", b"11")), max_size=10)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("chunks", "whole", "left"),
    [
        ([], b"", None),
        ([b"123", b"45"], b"12345", None),
        ([b"123", b"45", b""], b"12345", None),
        ([b"123", b"456", b"7", b"8"], b"123456", [b"7", b"8"]),
        ([b"123456"], b"123456", []),
    ],
)
async def test_a_body_is_held_up_to_a_bound(chunks: list[bytes], whole: bytes, left: list[bytes] | None) -> None:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    response, came, all_of_it = await held(replace(_response(), body=body()), max_size=5)
    assert (came, all_of_it) == (whole, left is None)
    assert [chunk async for chunk in response.body] == [whole, *(left or [])]


@pytest.mark.anyio
async def test_a_body_at_hand_is_looked_at_and_stays() -> None:
    response = replace(_response(), body=Chunks([b"12", b"34"]))
    assert await held(response, max_size=4) == (response, b"1234", True)
    assert await held(response, max_size=3) == (response, b"1234", False)
    assert [chunk async for chunk in response.body] == [b"12", b"34"]


TEXT = b'{"a": "' + b"b" * 100 + b'"}'


@pytest.mark.parametrize(
    ("coding", "body", "plain"),
    [
        (b"", TEXT, TEXT),
        (b"identity", TEXT, TEXT),
        (b"gzip", gzip.compress(TEXT, mtime=0), TEXT),
        (b"X-Gzip", gzip.compress(TEXT, mtime=0), TEXT),
        (b"deflate", zlib.compress(TEXT), TEXT),
        (b"gzip", TEXT, None),
        (b"gzip", gzip.compress(TEXT, mtime=0)[:-1], None),
        (b"gzip", gzip.compress(TEXT, mtime=0) + b"x", None),
        (b"gzip", gzip.compress(b"x" * 1001, mtime=0), None),
        (b"gzip", gzip.compress(b"x" * 1000, mtime=0), b"x" * 1000),
        (b"gzip", b"", None),
    ],
)
def test_an_encoding_is_undone(coding: bytes, body: bytes, plain: bytes | None) -> None:
    response = _response(JSON, *([(b"content-encoding", coding)] if coding else []))
    assert plain_of(response, body, max_size=1000) == plain


OF_THE_BYTES = tuple(
    (name, b"x")
    for name in (b"content-length", b"content-encoding", b"etag", b"last-modified", b"accept-ranges", b"repr-digest")
)


@pytest.mark.anyio
async def test_another_body() -> None:
    response = json_bodies.with_body(_response(JSON, *OF_THE_BYTES, status=201), b"[1]")
    assert (response.status, response.headers) == (201, (JSON, (b"content-length", b"3")))
    assert [chunk async for chunk in response.body] == [b"[1]"]


def test_no_length() -> None:
    assert json_bodies.without_length(_response(JSON, *OF_THE_BYTES)).headers == (JSON,)


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (b'{"id": "p1", "a": 1}', "p1"),
        (b' { "id" : "p1"}', "p1"),
        (b'{"id":"p1","output":"cut', "p1"),
        (b'{"id": "a/b"}', "a/b"),
        (b'{"a": {"id": "no"}, "id": "\\u0070\\u0031", "b": ', "p1"),
        (b'{"a": "\xff", "id": "p1"}', "p1"),
        (b'{"id": "p1', None),
        (b'{"id": [5], "id": "p1"}', None),
        (b'{"a": {"id": "no"}}', None),
        (b'{"a": ' + b"[" * 100_000, None),
        (b"[]", None),
        (b"", None),
        (None, None),
    ],
)
def test_the_id_of_an_object(body: bytes | None, id: str | None) -> None:
    assert id_of(body) == id


# --- where the parts of a text stand

_blank = st.text(" \t\n\r", max_size=2)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just({"a": [{}]}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
).map(json.dumps)


@given(st.lists(st.tuples(st.text(max_size=4), _values, _blank)), _blank)
def test_the_members_of_an_object(pairs: list[tuple[str, str, str]], blank: str) -> None:
    inside = ",".join(f"{b}{json.dumps(name)}{b}:{b}{value}{b}" for name, value, b in pairs)
    text = f"{blank}{{{blank}{inside}}}{blank}"
    found = list(members(text))
    assert [(name, text[start:end]) for name, _, start, end in found] == [(name, value) for name, value, _ in pairs]
    expected = [json.loads(value, parse_int=str, parse_float=str) for _, value, _ in pairs]
    assert [value for _, value, _, _ in found] == expected


@given(st.lists(st.tuples(_values, _blank)), _blank)
def test_the_elements_of_an_array(items: list[tuple[str, str]], blank: str) -> None:
    text = f"{blank}[{blank}{','.join(b + value + b for value, b in items)}]{blank}"
    found = list(elements(text))
    assert [text[start:end] for _, start, end in found] == [value for value, _ in items]
    expected = [json.loads(value, parse_int=str, parse_float=str) for value, _ in items]
    assert [value for value, _, _ in found] == expected


@pytest.mark.parametrize("read", [members, elements])
@pytest.mark.parametrize(
    "text", ["", " ", "x", "1", '"[]"', "\ufeff{}", "\ufeff[]", "\u00a0[]", "{}{}", "[][]", "{]", "[}"]
)
def test_what_is_neither_object_nor_array(read: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(read(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"a"}',
        '{"a": 1',
        '{"a": 1,',
        '{"a": 1,}',
        '{"a": 1]',
        '{"a": 1}}',
        '{"a": 1} {}',
        '{"a": 1 "b": 2}',
        "{a: 1}",
        "{'a': 1}",
        '{"a": }',
        '{"\\x": 1}',
        '{"a\n": 1}',
        '{"a\\\n": 1}',
        '{"a": "\t"}',
        '{"a": 1 /**/}',
        '{"a": 01}',
    ],
)
def test_what_is_not_the_text_of_an_object(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(members(text))
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)


@pytest.mark.parametrize(
    "text", ["{}", "[1", "[1,", "[1,]", "[,1]", "[1}", "[1]]", "[1] []", "[1 2]", "[01]", "[a]", "["]
)
def test_what_is_not_the_text_of_an_array(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(elements(text))


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        *((text, True) for text in ("}", " }\n", ', "a": 1}', ' ,"a":{"b":[NaN, "}"]} } ', f', "a": {"7" * 5000}}}')),
        *(
            (text, False)
            for text in ("", " ", "]", "}}", "}]", "} {}", ",}", "a}", "1}", ", 1}", ', "a": 1', ', "a": 1]')
        ),
        (', "a": ' + "[" * 100_000, False),
    ],
)
def test_the_rest_of_an_object(text: str, rest: bool) -> None:
    assert is_rest(text) is rest


def test_what_is_too_deep() -> None:
    for read, text in ((members, '{"a":' + "[" * 100_000), (elements, "[" * 100_000)):
        with pytest.raises(RecursionError):
            list(read(text))


def test_numbers_stay_text() -> None:
    digits = "7" * 5000
    assert [value for _, value, _, _ in members(f'{{"a": {digits}, "b": 1.50, "a": 1e999}}')] == [
        digits,
        "1.50",
        "1e999",
    ]


def test_what_comes_before_an_error_is_told() -> None:
    found = members('{"id": "p1", "output": "cut')
    assert next(found)[:2] == ("id", "p1")
    with pytest.raises(ValueError, match="Unterminated string"):
        next(found)
