from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aborts import PHASES, Crowd, Left, Results
from tests.clients.drivers import require
from tests.documents import ROOT

PAGE = "# Reliable\n\n<!-- aborts -->\nstale figures\n<!-- end of aborts -->\n\nBelow.\n"


@pytest.mark.timeout(120)
def test_one_command_measures_and_writes(tmp_path: Path) -> None:
    require("taskset")
    page = tmp_path / "reliable.md"
    page.write_text(PAGE)
    command = [sys.executable, "-m", "benchmarks.aborts", "--servers", "uvicorn-httptools", "--transports", "fast"]
    command += ["--repeat", "1", "--rounds", "0", "--faults", "24", "--warm", "48", "--write", str(page)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    written = page.read_text()
    assert written.startswith("# Reliable\n")
    assert written.endswith("\nBelow.\n")
    assert "stale figures" not in written
    rows = {row[0]: row[1:] for line in written.splitlines() if len(row := line.strip("| ").split(" | ")) > 1}
    assert {phase.name for phase in PHASES} <= set(rows)
    assert rows["nothing sent"] == ["none was open"]
    assert [float(part) >= 0 for part in rows["waiting for the head"][0].split(" / ")] == [True] * 3
    assert rows["uvicorn-httptools"][:4] == ["fast", "0", "0", "0"]


def test_what_stays_or_comes_whole_or_takes_long_is_a_miss() -> None:
    good, clean = Left(took=[0.1] * 100), Crowd(0, 0, {}, 0.5, 0)
    results = Results()
    results.phases["fast", "granian"] = {"idle": Left(), "good": good, "late once": Left(took=[0.1] * 199 + [3.0])}
    results.bursts["fast", "granian"] = results.faults["fast", "granian"] = clean
    assert results.missed == []
    for bad in (Left(stayed=1), Left(made_whole=1), Left(took=[0.1] * 50 + [1.6])):
        results.phases["fast", "granian"]["bad"] = bad
        assert len(results.missed) == 1
    results.phases.clear()
    for crowd in (
        Crowd(1, 0, {}, 0, 0),
        Crowd(0, 1, {}, 0, 0),
        Crowd(0, 0, {"x": 1}, 0, 0),
        Crowd(0, 0, {}, 0, 0, "!"),
    ):
        results.bursts["fast", "granian"] = crowd
        assert len(results.missed) == 1
