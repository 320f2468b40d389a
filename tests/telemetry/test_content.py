from __future__ import annotations

import json
import logging
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.telemetry.content import MARKER, VARIABLE, Redact, mode, text
from replicate_proxy_mw.telemetry.scrub import BARE, Scrubber

MIB = 1 << 20


def _shown(value: object, redact: Redact | None = None) -> Any:
    return json.loads(text(value, redact=redact, scrub=BARE))


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        (None, None, "NO_CONTENT"),
        (None, "", "NO_CONTENT"),
        (None, "true", "SPAN_ONLY"),
        (None, "False", "NO_CONTENT"),
        (None, " span_and_event ", "SPAN_AND_EVENT"),
        (None, "NO_CONTENT", "NO_CONTENT"),
        (True, "NO_CONTENT", "SPAN_ONLY"),
        (False, "true", "NO_CONTENT"),
        ("event_only", "true", "EVENT_ONLY"),
        ("SPAN_ONLY", "maybe", "SPAN_ONLY"),
    ],
)
def test_the_option_goes_before_the_variable(option: Any, variable: str | None, expected: str) -> None:
    assert mode(option, {} if variable is None else {VARIABLE: variable}) == expected


@pytest.mark.parametrize("option", ["yes", "", "true", 1, ["SPAN_ONLY"]])
def test_an_option_that_is_none(option: Any) -> None:
    with pytest.raises(ValueError, match=r"^capture_content: .*SPAN_AND_EVENT"):
        mode(option, {})


def test_a_variable_that_nobody_understands_captures_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert mode(None, {VARIABLE: "hunter2"}) == "NO_CONTENT"
    [record] = caplog.record_tuples
    assert record[:2] == ("replicate_proxy_mw", logging.WARNING)
    assert VARIABLE in record[2]
    assert "hunter2" not in record[2]


def test_json_stays_what_it_is() -> None:
    value = {"prompt": 'Ein "Bär"\n', "n": [1, 2.5, True, False, None, -3], "e": [{}, [], ""], "d": {"a": {"b": [[0]]}}}
    assert text(value, redact=None, scrub=BARE) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("value", ["text", 1, None, [], {}])
def test_a_value_need_not_be_an_object(value: object) -> None:
    assert _shown(value) == value


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"data:image/png;base64,{b64encode(bytes(12345)).decode()}", "data:image/png (12345 bytes)"),
        (f"DATA:image/png;name=a.png;BASE64,{b64encode(bytes(7)).decode()}", "data:image/png (7 bytes)"),
        (f"data:;base64,{b64encode(bytes(8)).decode().replace('=', '%3D')}", "data:text/plain (8 bytes)"),
        ("data:a/b;base64,", "data:a/b (0 bytes)"),
        ("data:text/plain;charset=utf-8,a%20b ü", "data:text/plain (6 bytes)"),
        ("data:,", "data:text/plain (0 bytes)"),
        ("![a](data:a/b;base64,AAAA) and data:c/d,xyz end", "![a](data:a/b (3 bytes)) and data:c/d (3 bytes) end"),
        ('<img src="data:,"> data:a/b;base64,ü', '<img src="data:text/plain (0 bytes)"> data:a/b (0 bytes)ü'),
        ("my data: a, b; metadata:a/b,c", "my data: a, b; metadata:a/b,c"),
    ],
)
def test_files_become_type_and_size(given: str, shown: str) -> None:
    assert _shown([given]) == [shown]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://host/a/b.png?X-Amz-Signature=abc#frag", "https://host/a/b.png"),
        ("http://host#frag", "http://host"),
        ("HTTPS://user:pass@host:1/a@b", "HTTPS://host:1/a@b"),
        ("see (https://a/?b=c) and <http://d/e#f>, ok?", "see (https://a/ and <http://d/e>, ok?"),
        ("https://", "https://"),
        ("ftp://a/?b=c; Hydra, diver", "ftp://a/?b=c; Hydra, diver"),
    ],
)
def test_urls_lose_query_fragment_and_user(given: str, shown: str) -> None:
    assert _shown({"u": given}) == {"u": shown}


def test_what_stands_under_a_secret_s_name_is_replaced_whatever_it_is() -> None:
    value = {"api_key": "a", "hfToken": {"a": [1]}, "list": [{"PASSWORD": None}, "plain"], "cookie": 5, "max_tokens": 7}
    assert _shown(value) == {
        "api_key": "REDACTED",
        "hfToken": "REDACTED",
        "list": [{"PASSWORD": "REDACTED"}, "plain"],
        "cookie": "REDACTED",
        "max_tokens": 7,
    }


def test_every_string_and_key_and_number_is_scrubbed() -> None:
    scrub = Scrubber(["canary-0123", "4711471147"])
    value = {"a canary-0123": ["b canary-0123", 4711471147, 1], "https://u:p@host/?q": "r8_0123456789"}
    shown = json.loads(text(value, redact=None, scrub=scrub))
    assert shown == {"a REDACTED": ["b REDACTED", "REDACTED", 1], "https://host/": "REDACTED"}


def test_the_host_s_rule_sees_every_leaf_with_its_path() -> None:
    seen: dict[tuple[str | int, ...], object] = {}

    def redact(path: tuple[str | int, ...], value: object) -> object:
        seen[path] = value
        return value

    value = {"a": [1, {"b": None}], "u": "https://h/?q", "token": "t", "e": {}}
    assert _shown(value, redact) == value | {"u": "https://h/", "token": "REDACTED"}
    assert seen == {("a", 0): 1, ("a", 1, "b"): None, ("u",): "https://h/"}


def test_the_host_s_rule_sees_all_of_a_long_string() -> None:
    assert _shown(["x" * 20_000], lambda path, value: len(str(value))) == [20_000]
    assert _shown(["x" * 20_000], lambda path, value: "short") == ["short"]


def test_what_the_host_s_rule_returns_is_shown_but_for_secrets() -> None:
    assert _shown(["name"], lambda path, value: "https://h/?q r8_0123456789") == ["https://h/?q REDACTED"]
    assert _shown(["name", 2], lambda path, value: {"key": [value, ()]}) == [{"key": ["name", []]}, {"key": [2, []]}]


class Secretive(Exception):
    pass


def test_a_leaf_whose_rule_fails_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def redact(path: tuple[str | int, ...], value: object) -> object:
        if value == "open":
            return value
        raise Secretive("hunter2")

    assert _shown({"a": "hunter2", "b": "open", "c": [1]}, redact) == {"a": "REDACTED", "b": "open", "c": ["REDACTED"]}
    assert caplog.record_tuples == [("replicate_proxy_mw", logging.WARNING, "redact failed: Secretive")]


def test_a_rule_that_returns_what_json_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    assert _shown(["hunter2"], lambda path, value: b"hunter2") == ["REDACTED"]
    assert caplog.record_tuples == [("replicate_proxy_mw", logging.WARNING, "redact failed: bytes")]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**5000], ids=["nan", "inf", "long"])
def test_a_number_that_json_does_not_have_is_null(number: float) -> None:
    assert _shown([number, 1]) == [None, 1]


@pytest.mark.parametrize("size", range(20, 45))
def test_a_text_has_as_many_bytes_as_it_may(size: int) -> None:
    value = ["äöü", {"käse": "ß€😀"}, 12345]
    whole = text(value, redact=None, scrub=BARE)
    shown = text(value, redact=None, scrub=BARE, limit=size)
    assert len(shown.encode()) <= size
    if len(whole.encode()) <= size:
        assert shown == whole
    else:
        assert shown.endswith(MARKER)
        assert whole.startswith(shown.removesuffix(MARKER))
        assert len(shown.encode()) > size - 4


@pytest.mark.parametrize(
    "value",
    [
        "x" * MIB,
        "data:a/b;base64,AAAA " * 50_000,
        "http://a?b#c " * 80_000,
        {"x" * MIB: 1},
        {"token" * 200_000: 1},
        {str(number): number for number in range(100_000)},
        list(range(300_000)),
        [[]] * 300_000,
    ],
    ids=["string", "files", "urls", "key", "secret key", "object", "array", "empty arrays"],
)
def test_a_large_value_is_cut(value: object) -> None:
    shown = text(value, redact=None, scrub=BARE)
    assert shown.endswith(MARKER)
    assert len(shown.encode()) == 8192


def test_of_a_large_value_no_more_is_read_than_is_shown() -> None:
    seen: list[object] = []

    def redact(path: tuple[str | int, ...], value: object) -> object:
        seen.append(value)
        return value

    text(["x"] * 300_000, redact=redact, scrub=BARE, limit=100)
    assert len(seen) < 100


def test_a_large_file_is_no_large_value() -> None:
    assert _shown({"image": f"data:image/png;base64,{'A' * MIB}", "n": 1}) == {
        "image": f"data:image/png ({MIB * 3 // 4} bytes)",
        "n": 1,
    }


@pytest.mark.parametrize("redact", [None, lambda path, value: value])
def test_a_deep_value_is_no_problem(redact: Redact | None) -> None:
    deep: object = "leaf"
    for _ in range(2000):
        deep = [{"a": deep}]
    shown = text(deep, redact=redact, scrub=BARE, limit=20_000)
    assert shown == '[{"a":' * 2000 + '"leaf"' + "}]" * 2000
    for _ in range(100_000):
        deep = [deep]
    assert text(deep, redact=redact, scrub=BARE, limit=100) == "[" * 86 + MARKER


def test_a_secret_on_the_cut_is_not_shown_in_part() -> None:
    scrub = Scrubber(["canary-0123456789"])
    for size in range(20, 60):
        shown = text("-" * 30 + "canary-0123456789" + "-" * 30, redact=None, scrub=scrub, limit=size)
        assert "canary-0" not in shown
    # What was replaced makes room, and then ends where the string was cut.
    shown = text("canary-0123456789 " * 1000, redact=None, scrub=scrub, limit=200)
    assert shown.endswith(MARKER)
    assert "canary-0" not in shown


def test_lone_surrogates_can_be_encoded() -> None:
    assert text(["\ud800"], redact=None, scrub=BARE) == '["?"]'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@settings(deadline=None)
@given(JSON, st.integers(14, 200))
def test_any_value_is_json_or_cut(value: object, limit: int) -> None:
    shown = text(value, redact=None, scrub=BARE, limit=limit)
    assert len(shown.encode()) <= limit
    if not shown.endswith(MARKER):
        json.loads(shown)
