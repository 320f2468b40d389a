"""Grafana's own types of a dashboard (`@grafana/schema`) take what is in `docs/dashboards`, and nothing misspelt."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dashboards.make import FOLDER, made
from tests.services import _missing

NODE = Path(__file__).parent / "node"

Change = Callable[[dict[str, Any]], object]

# Each is what a hand could do to a dashboard. The panels are a row, numbers, and then curves.
WRONG: dict[str, Change] = {
    "an unknown key": lambda wrong: wrong.update(titel="Traffic"),
    "no schema version": lambda wrong: wrong.pop("schemaVersion"),
    "a variable with an unknown key": lambda wrong: wrong["templating"]["list"][1].update(include_all=True),
    "a variable of no type": lambda wrong: wrong["templating"]["list"][1].update(type="queries"),
    "a refresh that is none": lambda wrong: wrong["templating"]["list"][1].update(refresh=7),
    "a link without its icon": lambda wrong: wrong["links"][0].pop("icon"),
    "a panel with an unknown key": lambda wrong: wrong["panels"][1].update(descripton=""),
    "a place without its width": lambda wrong: wrong["panels"][1]["gridPos"].pop("w"),
    "a query with an unknown key": lambda wrong: wrong["panels"][1]["targets"][0].update(legend="x"),
    "another data source": lambda wrong: wrong["panels"][1]["targets"][0]["datasource"].update(uid="mine"),
    "an option of another panel": lambda wrong: wrong["panels"][1]["options"].update(showHeader=True),
    "a mode that is none": lambda wrong: wrong["panels"][1]["options"].update(colorMode="blue"),
    "a colour that is none": lambda wrong: wrong["panels"][1]["fieldConfig"]["defaults"]["color"].update(mode="red"),
    "a threshold without its value": lambda wrong: wrong["panels"][1]["fieldConfig"]["defaults"]["thresholds"].update(
        steps=[{"color": "red"}]
    ),
    "an unknown style": lambda wrong: next(panel for panel in wrong["panels"] if panel["type"] == "timeseries")[
        "fieldConfig"
    ]["defaults"]["custom"].update(fill=1),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By name of the file, or of what is wrong. All in one run, since the compiler takes long to start."""
    if shutil.which("node") is None:
        _missing("Node is not installed")
    if not (NODE / "node_modules").is_dir():
        _missing("Grafana's types are not installed: run `npm ci` in tests/dashboards/node")
    folder = tmp_path_factory.mktemp("types")
    folder.joinpath("node_modules").symlink_to(NODE / "node_modules")
    for name in ("dashboard.ts", "tsconfig.json"):
        shutil.copy(NODE / name, folder)
    models = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
    small = models["traffic.json"]
    small["panels"] = small["panels"][:9]
    for name, change in WRONG.items():
        models[name] = copy.deepcopy(small)
        change(models[name])
    numbers = {name: f"of_{number}.ts" for number, name in enumerate(models)}
    for name, model in models.items():
        lines = ['import type { Dashboard } from "./dashboard";', f"export const it: Dashboard = {json.dumps(model)};"]
        folder.joinpath(numbers[name]).write_text("\n".join(lines))
    compiler = NODE / "node_modules/typescript/bin/tsc"
    done = subprocess.run(
        ["node", compiler, "--project", folder, "--pretty", "false"], capture_output=True, text=True, cwd=folder
    )
    told = re.findall(r"^(\S+)\(\d+,\d+\): (error .*)", done.stdout, re.MULTILINE)
    assert {file for file, _ in told} <= set(numbers.values()), done.stdout
    return {name: [error for file, error in told if file == numbers[name]] for name in models}


@pytest.mark.parametrize("name", sorted(made()))
def test_grafana_s_types_take_a_dashboard(errors: dict[str, list[str]], name: str) -> None:
    assert errors[name] == []


@pytest.mark.parametrize("wrong", WRONG)
def test_they_do_not_take_what_is_wrong(errors: dict[str, list[str]], wrong: str) -> None:
    assert len(errors[wrong]) == 1
