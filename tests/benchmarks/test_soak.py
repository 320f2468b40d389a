from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.__main__ import slope
from benchmarks.soak.traffic import MIX, Traffic
from benchmarks.soak.upstream import Upstream
from tests.clients.drivers import require
from tests.documents import ROOT

MARKS = ("soak", "large bodies", "idle streams")
PAGE = "# Reliable\n" + "".join(f"\n<!-- {mark} -->\nstale figures\n<!-- end of {mark} -->\n" for mark in MARKS)


def _soak(page: Path, *arguments: str) -> dict[str, list[str]]:
    """Rows of the table that one run writes. A goal may be missed: seconds of a busy machine tell nothing of growth."""
    require("taskset")
    page.write_text(PAGE)
    command = [sys.executable, "-m", "benchmarks.soak", *arguments, "--write", str(page)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 or ended.stderr.endswith("A goal is missed.\n"), ended.stdout + ended.stderr
    written = page.read_text()
    assert written.count("stale figures") == len(MARKS) - 1
    return {row[0]: row[1:] for line in written.splitlines() if len(row := line.strip("| ").split(" | ")) > 1}


@pytest.mark.timeout(120)
def test_a_short_soak(tmp_path: Path) -> None:
    arguments = ("--requests", "400", "--minutes", "0.05", "--faults", "0.2", "--transport", "fast")
    rows = _soak(tmp_path / "reliable.md", *arguments)
    assert rows["requests"][1].startswith("400 in ")
    assert int(rows["… with a fault, or a caller who leaves"][1].split(",")[0]) > 20
    assert rows["unexpected answers"] == ["0", "0"]
    assert float(rows["RSS after warming up, MiB"][1]) > 10


@pytest.mark.timeout(120)
def test_large_bodies_and_idle_streams(tmp_path: Path) -> None:
    rows = _soak(tmp_path / "reliable.md", "--large", "8")
    assert all(0 <= float(rows[f"8 MiB {way}"][0]) <= 24 for way in ("down", "up"))
    rows = _soak(tmp_path / "reliable.md", "--streams", "100")
    assert rows["streams that are open"][1] == "100 of 100"
    assert float(rows["KiB each"][1]) < 60
    assert rows["files open more than before, once all have left"] == ["0", "0"]


def test_the_slope_is_per_ten_minutes() -> None:
    assert slope([(60.0 * minute, 40 + 0.2 * minute) for minute in range(30)]) == pytest.approx(2)
    assert slope([(0.0, 40), (1.0, 41), (2.0, 40)]) == pytest.approx(0)
    assert slope([]) == 0


def test_what_is_not_answered_as_it_should_be_is_noted() -> None:
    async def run() -> Traffic:
        async with Upstream() as upstream:  # which knows no caller's key
            traffic = Traffic(upstream.port, share=0.0)
            await traffic.run(50, concurrency=5)
            return traffic

    traffic = asyncio.run(run())
    assert sum(traffic.done.values()) == sum(traffic.wrong.values()) == 50
    assert {what.partition(":")[0] for what in traffic.wrong} <= set(MIX)
