"""What the page on performance shows is run as it stands there; its figures are put in by the benchmarks."""

from __future__ import annotations

import shlex

import pytest

from benchmarks.compare.__main__ import arguments
from replicate_proxy_mw import ProxyConfig
from tests.documents import Page, execute

PERFORMANCE = Page("docs/performance.md")


def test_how_to_tune() -> None:
    config = execute(PERFORMANCE.block("python", "fast=True"))["config"]
    assert config == ProxyConfig(fast=True, max_connections=4000)


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [shlex.split(line, comments=True) for line in PERFORMANCE.block("sh", "compare").splitlines()]
    taken = []
    for line in lines:
        assert line[:3] == ["python", "-m", "benchmarks.compare"]
        monkeypatch.setattr("sys.argv", line[2:])
        taken.append(arguments())
    assert [(options.seconds, options.repeat, options.write) for options in taken] == [(2, 5, None), (1, 3, None)]
    assert taken[1].only == ("c1", "c32")


@pytest.mark.parametrize("mark", ["results", "instructions"])
def test_there_is_a_place_for_figures(mark: str) -> None:
    _, first, rest = PERFORMANCE.text.partition(f"<!-- {mark} -->\n")
    figures, last, _ = rest.partition(f"<!-- end of {mark} -->\n")
    assert first
    assert last
    assert "| --- |" in figures


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert PERFORMANCE.count("python", "sh") == len(PERFORMANCE.code) == 2
    assert PERFORMANCE.missing_links() == []
