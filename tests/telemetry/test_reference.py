from __future__ import annotations

import pytest

from replicate_proxy_mw.telemetry import names
from tests.telemetry.reference import BEGIN, END, PAGE, reference, written


def test_the_page_is_what_the_generator_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "stale: python -m tests.telemetry.reference --write"


def test_every_name_has_a_row_of_its_own() -> None:
    rows = [line.split(" | ")[0] for line in reference().splitlines() if line.startswith("| `")]
    expected = [*names.EVENTS, *names.ATTRIBUTES, *names.METRICS]
    assert [row.strip("| `").removesuffix("<key>") for row in rows] == expected


def test_tables_have_as_many_cells_in_each_row() -> None:
    tables = reference().split("\n### ")[1:]
    assert [table.partition("\n")[0] for table in tables] == ["Spans", "Events", "Attributes", "Metrics"]
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines() if line.startswith("|")}) == 1


def test_all_else_of_a_page_stays() -> None:
    assert written(f"a\n{BEGIN}\nold\n{END}\nb\n") == f"a\n{BEGIN}\n\n{reference()}\n{END}\nb\n"
    with pytest.raises(ValueError, match="reference: begin"):
        written(f"a\n{END}\n")
