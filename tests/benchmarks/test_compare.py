from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.compare import contestants, plot, report, scenarios, upstream
from tests.clients.drivers import require
from tests.documents import ROOT

PAGE = "# Speed\n\n<!-- results -->\nstale figures\n<!-- end of results -->\n\nBelow.\n"
EVERYTHING = "c1,c32,sse,down,up,held,host,import"
SHORT = ["--seconds", "1", "--repeat", "1", "--held", "20", "--hold", "1", "--mebibytes", "4", "--loop", "asyncio"]


def _compare(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _of_session(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(") ")
        except OSError:
            continue
        if rest.split()[3] == str(session):
            found.append(name)
    return found


@pytest.mark.timeout(180)
def test_one_command_measures_writes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for program in ("nginx", "wrk", "taskset"):
        require(program)
    page = tmp_path / "speed.md"
    page.write_text(PAGE)
    process = _compare("--only", EVERYTHING, "--contestants", "nginx,default", *SHORT, "--write", str(page))
    try:
        told = process.communicate(timeout=150)[0]
    finally:
        process.terminate()
        process.wait()
    assert process.returncode == 0, told
    written = page.read_text()
    assert written.startswith("# Speed\n")
    assert written.endswith("\nBelow.\n")
    assert "stale figures" not in written
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("|")]
    goals = {row[0]: row[2] for row in rows if row[0] in {goal.name for goal in report.GOALS}}
    assert len(goals) == len(report.GOALS) - 3  # those that need more contestants or another load
    assert all(re.match(r"(1/)?-?\d", measured) for measured in goals.values()), goals
    assert goals["held requests that do not finish"] == "0"
    svg = ElementTree.parse(tmp_path / "speed" / "cpu.svg").getroot()
    assert [each.get("class") for each in svg.findall("{*}rect")] == ["bar", "ours"]
    assert _of_session(process.pid) == []


def test_what_is_missing_is_named() -> None:
    process = _compare("--contestants", "nginx", PATH="/nowhere")
    told = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert told.startswith("Not there:")
    assert {"nginx", "wrk", "taskset"} <= {*re.findall(r"^- (\w+)", told, re.MULTILINE)}


def test_who_does_not_swap_the_key_is_not_compared(tmp_path: Path) -> None:
    for program in ("nginx", "taskset"):
        require(program)
    with upstream.small(tmp_path / "upstream") as process:
        scenarios.right(scenarios.DIRECT, process)
        with pytest.raises(scenarios.Wrong, match="401"):
            scenarios.right("default", process)


def test_a_load_with_refused_requests_is_none(tmp_path: Path) -> None:
    for program in ("nginx", "wrk", "taskset"):
        require(program)
    results = scenarios.Results()
    with upstream.small(tmp_path / "upstream") as process:
        assert scenarios.attempted(results, "c1", {"default": process}, scenarios.load, 1, 1) == {}
    assert "refused" in results.failed["c1", "default"]


def test_ratios_are_those_of_medians() -> None:
    def loads(*cpus: float) -> list[scenarios.Load]:
        return [scenarios.Load(rate=1e3, cpu=cpu, p50=cpu * 2) for cpu in cpus]

    results = scenarios.Results()
    results.loads["c32"] = {"nginx": loads(10, 12, 90), "default": loads(60, 600, 20)}
    results.loads["c1"] = {"direct": loads(50, 100, 50), "nginx": loads(60, 110, 60), "default": loads(70, 130, 80)}
    assert report.cpu_to("nginx")(results, "default") == 5
    assert report.added(results, "default") == 60
    assert report.added_to_nginx(results, "default") == 3
    assert report.growing(results, "default") is None


def test_held_requests_that_are_not_all_answered_have_no_figures() -> None:
    results = scenarios.Results()
    results.held = {"direct": scenarios.Held(20, 6.0, 0.0), "default": scenarios.Held(19, 18.0, 9.0)}
    assert report.wall(results, "default") is None
    assert report.held_memory(results, "default") is None
    [row] = [row for goal in report.GOALS if (row := goal.row(results)) is not None]
    assert row == ("held requests that do not finish", "0", "1, **missed**", "0", report.NONE)


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n")
    with pytest.raises(ValueError, match="has no"):
        report.write(page, "new", scenarios.Results())
    assert page.read_text() == "# Speed\n"


def test_bars_are_in_order_and_within_the_picture() -> None:
    rows = [plot.Bar("a < b", 4000.0, False), plot.Bar("ours", 15.0, True), plot.Bar("c", 200.0, False)]
    svg = ElementTree.fromstring(plot.bars("CPU", rows))
    widths = [float(each.get("width", "")) for each in svg.findall("{*}rect")]
    assert widths == sorted(widths)
    assert widths[0] > 0
    assert widths[-1] <= plot.WIDTH - plot.LEFT - plot.RIGHT
    assert "a < b" in [each.text for each in svg.findall("{*}text")]


def test_every_contestant_has_its_app() -> None:
    from benchmarks.compare import apps

    assert [each.name for each in contestants.CONTESTANTS if each.app and not hasattr(apps, each.app)] == []
