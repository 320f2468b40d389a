"""`docs/security.md` against the tests and patches that there are; `scripts/defences` shows that they do as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.documents import ROOT, Page

PAGE = Page("docs/security.md")
PATCHES = sorted(ROOT.glob("tests/security/patches/*.patch"))
OUTSIDE = {"2.34", "3.exporter"}

_TEST = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/\S+?\.py)\)")
_PATCH = re.compile(r"`([23]\.[a-z0-9-]+)`")


def _table(*, shown: bool) -> dict[str, list[str]]:
    """The cells of each row, by its first: of those that say what it is about, or of those that say what shows it."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.text.splitlines() if line[:1] == "|"
    ]
    return {cells[0]: cells for cells in rows if re.match(r"[23]\.", cells[0]) and (len(cells) == 3) is shown}


def _row_of(patch: Path) -> str:
    """`2.01-….patch` is of row 2.1; names of faults have hyphens, too."""
    if patch.stem.startswith("2."):
        return f"2.{int(patch.stem[2:4])}"
    return max((row for row in _table(shown=True) if patch.stem.startswith(row + "-")), key=len)


def _named(patch: Path) -> list[str]:
    return re.findall(r"^Test: (\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)


@cache
def _tied(path: str) -> dict[str, str | None]:
    """The tests of a file, and the row of each."""
    spec = spec_from_file_location(f"tied_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {name: getattr(test, "row", None) for name, test in vars(module).items() if name.startswith("test_")}


def test_all_threats_and_faults_are_there() -> None:
    rows = list(_table(shown=False))
    assert rows == list(_table(shown=True))
    assert rows[:34] == [f"2.{number}" for number in range(1, 35)]
    assert len(rows[34:]) == 20
    assert all(row.startswith("3.") for row in rows[34:])


@pytest.mark.parametrize("row", _table(shown=True))
def test_a_row_has_its_tests_and_its_patches(row: str) -> None:
    _, named, removed = _table(shown=True)[row]
    tests = _TEST.findall(named)
    assert tests
    for name, path in tests:
        tied = _tied(path)
        assert name in tied
        assert tied[name] == row or row in OUTSIDE
    patches = {patch.stem: patch for patch in PATCHES if _row_of(patch) == row}
    assert sorted(_PATCH.findall(removed)) == sorted(patches)
    assert bool(patches) == (row not in OUTSIDE)
    for patch in patches.values():
        assert {f"{path}::{name}" for name, path in tests} >= set(_named(patch))


def test_every_test_is_of_a_row() -> None:
    tied: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.glob("tests/security/test_*.py")):
        if "@row(" in path.read_text(encoding="utf-8"):
            for name, row in _tied(str(path.relative_to(ROOT))).items():
                if row is not None:
                    tied[row].append(name)
    assert set(tied) | OUTSIDE == set(_table(shown=True))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_applies(patch: Path) -> None:
    [removes] = re.findall(r"^Removes: (.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    assert removes.endswith(".")
    assert _named(patch)
    applied = subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr


def test_links_lead_somewhere() -> None:
    assert PAGE.missing_links() == []
