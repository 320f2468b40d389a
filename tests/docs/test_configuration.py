"""docs/configuration.md has every option, error and environment variable of the source."""

from __future__ import annotations

import dataclasses
import re

import pytest

from replicate_proxy_mw import ProxyConfig
from tests.docs.reference import BEGIN, END, reference, written
from tests.docs.reference_of_config import GROUPS, REFUSED, docstrings, refusal, templates, type_of, unit_of
from tests.documents import ROOT, Page, execute

PAGE = Page("docs/configuration.md")
FIELDS = {field.name: field for field in dataclasses.fields(ProxyConfig)}


def test_the_reference_is_what_the_generator_writes() -> None:
    assert written("configuration.md", PAGE.text) == PAGE.text, "stale: python -m tests.docs.reference --write"


def test_every_option_is_there_once_with_its_reason() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(FIELDS)
    assert docstrings(ProxyConfig).keys() == FIELDS.keys()
    assert all(type_of(field) for field in FIELDS.values())


def test_every_number_has_a_unit() -> None:
    numbers = {name for name, field in FIELDS.items() if re.match(r"(int|float)\b", str(field.type))}
    assert {name for name in FIELDS if unit_of(name)} == numbers


def test_every_error_of_the_source_was_provoked() -> None:
    said = [refusal(options) for refused in REFUSED.values() for options in refused]
    for text in templates():
        if not text.startswith("fast:"):  # needs a machine without that package
            assert any(re.fullmatch(".+".join(map(re.escape, text.split("…"))), one) for one in said), text


def test_every_error_names_its_option() -> None:
    for option, refused in REFUSED.items():
        assert all(option in options for options in refused)
        for options in refused:
            # The endpoint of streams has names of its own.
            assert refusal(options).startswith((f"{option}: ", "hosts: ", "propagate_upstream: "))


def test_what_is_taken_is_not_shown_as_refused() -> None:
    with pytest.raises(AssertionError, match="taken"):
        refusal({"prefix": "/v2"})


def test_every_variable_of_the_environment_is_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    variables = {*re.findall(r"\b(?:OTEL|REPLICATE_API|REPLICATE_PROXY)_[A-Z_]+\b", sources)}
    assert {"REPLICATE_API_TOKEN", "OTEL_SERVICE_NAME"} < variables
    assert [name for name in variables if f"`{name}" not in PAGE.text] == []


def test_the_app_of_the_page_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_of_the_account")
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-for-the-designers")
    app = execute(PAGE.block("python", "ProxyConfig("))["app"]
    [middleware] = app.user_middleware
    assert middleware.kwargs["config"] == ProxyConfig(total_timeout=300, max_body_size=10_000_000)
    assert app.build_middleware_stack()


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert PAGE.count("python") == len(PAGE.code) == 1
    assert PAGE.missing_links() == []


def test_all_else_of_a_page_stays() -> None:
    text = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert written("headers.md", text) == f"a\n{BEGIN}\n\n{reference('headers.md')}\n{END}\nb\n"
    with pytest.raises(ValueError, match="reference: begin"):
        written("headers.md", f"a\n{END}\n")
