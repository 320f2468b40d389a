"""docs/api.md has all public names."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import isclass, isfunction
from typing import Any

import pytest

from tests.documents import Page

PAGE = Page("docs/api.md")
LISTED = re.findall(r"^::: (\S+)$", PAGE.text, re.MULTILINE)
PACKAGES = ["", ".checks", ".devtools", ".keys", ".store", ".telemetry", ".testing"]
LAYERS = ["cache", "coalescing", "guardrails", "idempotency", "limits", "results", "spending"]


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_a_package_gives_is_there(package: str) -> None:
    module = import_module(f"replicate_proxy_mw{package}")
    listed = {id(_found(name)) for name in LISTED}
    assert [name for name in module.__all__ if id(getattr(module, name)) not in listed] == []


def test_all_layers_and_checks_of_the_page_on_layers_are_there() -> None:
    layers = Page("docs/layers.md").block("python", "coalesce_polls(),\n    ],")
    imported = re.findall(r"^from (replicate_proxy_mw\.(?:layers|checks)\.\w+) import (\w+)$", layers, re.MULTILINE)
    assert [module.rpartition(".")[2] for module, _ in imported if ".layers." in module] == LAYERS
    assert [one for one in imported if ".".join(one) not in LISTED] == []


def test_what_is_listed_is_there_once_and_says_what_it_is() -> None:
    assert len(set(LISTED)) == len(LISTED)
    found = {name: _found(name) for name in LISTED}
    assert [name for name, one in found.items() if isclass(one) or isfunction(one) if not one.__doc__] == []


def test_links_lead_somewhere() -> None:
    assert PAGE.code == []
    assert PAGE.missing_links() == []
