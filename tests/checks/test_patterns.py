from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.checks import ALLOW, Verdict, patterns
from replicate_proxy_mw.checks.patterns import TooLong, matches
from tests.checks.asking import checked

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say SECRET"}], "n": 1}


async def _field(value: Any, *patterns: str, **options: Any) -> str | None:
    verdict = await matches(*patterns, **options)(checked(value))
    if verdict is ALLOW:
        return None
    assert verdict.word == options.get("then", "deny")
    field, _, rest = verdict.reason.partition(" ")
    assert rest == "has what may not be there"
    return field


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"prompt": "a secret"}, "input.prompt"),
        ({"prompt": "fine", "more": {"x": ["fine", "a secret"]}}, "input.more.x.1"),
        (["fine", "secret", "secret"], "input.1"),
        ("secret", "input"),
        ({"x": {"secret": 1}}, "input.x"),
        ({"x": ["sec", "ret"]}, "input.x"),
        ({"x": ["sec", 1, "ret"]}, None),
        ({"x": ["secre", {"y": "t"}]}, None),
        ({"prompt": "fine", "n": 1, "b": True, "none": None}, None),
        (None, None),
        ({"x": "se\ud800cret", "y": "secret\ud800"}, "input.y"),
    ],
)
async def test_all_texts_are_searched_where_no_field_is_named(value: Any, field: str | None) -> None:
    assert await _field(value, "nothing", "secret") == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (["messages.*.content"], "input.messages.1.content"),
        (["messages.1"], "input.messages.1.content"),
        (["messages.0", "messages.*.role"], None),
        (["messages.content"], None),
        (["n", "nothing", "n.x", "messages.1.content.x"], None),
        (["messages"], "input.messages.1.content"),
        (["*"], "input.messages.1.content"),
        (["*.1.*"], "input.messages.1.content"),
    ],
)
async def test_only_the_fields_that_are_named_are_searched(fields: list[str], field: str | None) -> None:
    assert await _field(CHAT, "SECRET", fields=fields) == field


async def test_case_is_told_apart_unless_a_pattern_says_otherwise() -> None:
    assert await _field({"x": "SECRET"}, "secret") is None
    assert await _field({"x": "ÄRGER"}, "(?i)ärger") == "input.x"


async def test_it_flags_where_it_is_told_to_and_names_an_output() -> None:
    check = matches("secret", then="flag")
    verdict = await check(checked(["a secret"], kind="output"))
    assert verdict == Verdict.flag("output.0 has what may not be there")


async def test_the_reason_has_nothing_of_the_text() -> None:
    verdict = await matches(r"\d{16}")(checked({"x": "card 4111111111111111"}))
    assert "4111" not in verdict.reason


async def test_a_long_path_is_told_in_part() -> None:
    assert await _field({"x" * 494: "secret"}, "secret") == f"input.{'x' * 494}"
    assert await _field({"x" * 494: ["secret"]}, "secret") == f"input.{'x' * 494}…"


async def test_more_text_than_is_searched_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SIZE", 10)
    assert await matches("no", fields=["x"])(checked({"x": "1234567890", "y": "1234567890"})) is ALLOW
    assert await matches("no")(checked(["12345", "67890"])) is ALLOW
    with pytest.raises(TooLong):
        await matches("no")(checked(["12345", "678901"]))
    monkeypatch.setattr(patterns, "MAX_TEXTS", 3)
    with pytest.raises(TooLong):
        await matches("no")(checked(["", 1, "", 1, "", 1, ""]))
    assert await matches("no")(checked(["", 1, "", 1, "", 1])) is ALLOW


async def test_a_pattern_that_hangs_others_takes_no_time() -> None:
    with anyio.fail_after(5):
        assert await _field("a" * (1 << 20), "(a|aa)+b", "(.*)(.*)(.*)(.*)[^a]$", "^(a+)+b$", "(x+x+)+y") is None
        assert await _field("a" * (1 << 20), "^(a+)+$") == "input"


async def test_deep_and_wide_values_are_searched() -> None:
    deep: Any = "secret"
    for _ in range(900):
        deep = [deep]
    assert await _field({"deep": deep, "wide": [{}] * 100_000}, "secret") == f"input.deep{'.0' * 245}…"


@pytest.mark.parametrize(
    ("patterns", "options", "named"),
    [
        ((), {}, "patterns: "),
        ((1,), {}, "patterns: "),
        (("(",), {}, "patterns: "),
        ((r"(?=x)",), {}, "patterns: "),
        (("\ud800",), {}, "patterns: "),
        (("x",), {"fields": "prompt"}, "fields: "),
        (("x",), {"fields": ["a..b"]}, "fields: "),
        (("x",), {"fields": [1]}, "fields: "),
        (("x",), {"then": "allow"}, "then: "),
    ],
)
def test_an_option_that_is_wrong_is_named(patterns: tuple[Any, ...], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        matches(*patterns, **options)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abx", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abx.*", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(_values)
@settings(max_examples=100, deadline=None)
def test_whatever_has_the_text_is_found(value: Any) -> None:
    async def found() -> bool:
        return await matches("x")(checked(value)) is not ALLOW

    assert anyio.run(found) == ("x" in json.dumps(value))
