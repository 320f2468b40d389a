"""The limits that docs/reliability.md names are those of the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any

import pytest

from replicate_proxy_mw import ProxyConfig, errors
from replicate_proxy_mw.errors import ProxyError
from tests.documents import Page

PAGE = Page("docs/reliability.md")
LIMITS = PAGE.text.partition("\n## Limits\n")[2].partition("\n## ")[0]
ROWS = [line.strip("| ").split(" | ") for line in LIMITS.splitlines() if line.startswith("| `")]
UNITS = {"": 1, " s": 1, " KiB": 1 << 10, " MiB": 1 << 20}


def _named(name: str) -> Any:
    """An option's default, that of a class's argument, or a constant."""
    if "." not in name:
        return getattr(ProxyConfig(), name)
    module, _, rest = name.rpartition(".")
    found = import_module(f"replicate_proxy_mw.{module}")
    kind, _, argument = rest.rstrip(")").partition("(")
    value = getattr(found, kind)
    return inspect.signature(value).parameters[argument].default if argument else value


def _said(text: str) -> float | None:
    if text == "none":
        return None
    [(number, unit)] = re.findall(r"^([0-9.,]+)( s| KiB| MiB|)$", text)
    return float(number.replace(",", "")) * UNITS[unit]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_a_limit_is_what_the_page_says(row: list[str]) -> None:
    name, default, *words = row
    assert _named(name.strip("`")) == _said(default)
    assert len(words) == 3
    assert all(words)


def test_every_option_with_a_time_or_a_number_is_there() -> None:
    fields = dataclasses.fields(ProxyConfig)
    expected = {field.name for field in fields if re.match(r"(int|float)\b", str(field.type))}
    assert {"read_timeout", "total_timeout", "max_body_size"} < expected
    assert expected == {row[0].strip("`") for row in ROWS if "." not in row[0]}


def test_every_limit_is_there_once() -> None:
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names)


def test_the_codes_and_statuses_are_those_of_the_errors() -> None:
    known = {(str(error.status), error.code) for error in ProxyError.__subclasses__()}
    said = set(re.findall(r"\b([1-5][0-9]{2}) `(\w+)`", LIMITS))
    assert {("408", "body_timeout"), ("413", "body_too_large"), ("504", "upstream_timeout")} < said
    assert said <= known
    assert errors.UpstreamTimeout in ProxyError.__subclasses__()


def test_links_lead_somewhere() -> None:
    assert not PAGE.missing_links()
