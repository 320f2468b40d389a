"""What a shared store and telemetry cost is put into a page by one command each."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import store, volume
from tests.clients.drivers import require

PAGE = "# Scaling\n\n<!-- {0} -->\nstale figures\n<!-- end of {0} -->\n\nBelow.\n"


class Command:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._page, self._monkeypatch, self._capsys = tmp_path / "scaling.md", monkeypatch, capsys

    def __call__(self, module: ModuleType, mark: str, *arguments: str) -> str:
        """What is in the page afterwards."""
        self._page.write_text(PAGE.format(mark))
        self._monkeypatch.setattr("sys.argv", ["python -m benchmarks", *arguments, "--write", str(self._page)])
        module.main()
        written = self._page.read_text()
        printed = self._capsys.readouterr().out
        assert written == PAGE.format(mark).replace("stale figures\n", f"\n{printed.rstrip()}\n\n")
        return written


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def test_one_command_measures_a_store(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("redis-server", "taskset"):
        require(program)
    monkeypatch.setattr(store, "BATCH", 5)
    written = command(store, "store", "--rounds", "1")
    figures = r"(\d) \| (\d) \| (-?\d+) \| (-?\d+) \| (\d+)"
    rows = re.findall(rf"^\| (?:create|poll.*?) \| .+? \| {figures} \|$", written, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        *[("2", "0"), ("1", "0"), ("1", "0")],
        *[("0", "1"), ("0", "1"), ("0", "2")],
        *[("2", "1"), ("1", "1"), ("1", "2")],
    ]
    assert all(int(row[4]) > 0 for row in rows)
    assert 400 < int(re.findall(r"an entry takes (\d+) bytes", written)[0]) < 2000


def test_one_command_weighs_telemetry(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "AT_ONCE", 20)
    written = command(volume, "volume")
    assert "| a prediction with 10 polls | 23 | " in written
    assert "| 50 tenants, one model | " in written
