"""The alerting rules fire when they should, by Prometheus' own tool."""

from __future__ import annotations

import re

from tests.dashboards.prometheus import promtool
from tests.dashboards.queries import dashboards, panels, rules
from tests.documents import ROOT

CASES = "tests/dashboards/alerts_test.yaml"


def test_the_rules_are_rules() -> None:
    done = promtool("check", "rules", "docs/dashboards/alerts.yaml", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_each_fires_when_it_should_and_says_why() -> None:
    cases = ROOT.joinpath(CASES).read_text(encoding="utf-8")
    assert re.findall(r"- name: (\w+)", cases) == [rule["alert"] for rule in rules()]
    done = promtool("test", "rules", CASES, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_leads_to_a_dashboard() -> None:
    uids = {model["uid"] for model in dashboards().values()}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["dashboard"].removeprefix("/d/") in uids


def test_the_dashed_lines_of_panels_are_the_limits_of_alerts() -> None:
    limits = {rule["alert"]: float(found[1]) for rule in rules() if (found := re.search(r"> ([\d.]+)", rule["expr"]))}
    drawn = {}
    for model in dashboards().values():
        for panel in panels(model):
            defaults = panel["fieldConfig"]["defaults"]
            if defaults["custom"].get("thresholdsStyle") == {"mode": "dashed"}:
                drawn[panel["title"]] = defaults["thresholds"]["steps"][-1]["value"]
    assert drawn == {
        "Failed, by operation": limits["ReplicateProxyFailing"],
        "Overhead by operation, 95 %": limits["ReplicateProxySlow"],
        "Failed, by model": limits["ReplicatePredictionsFailing"],
        "Queue by model, 95 %": limits["ReplicatePredictionsQueueing"],
        "Seen late, 95 %": limits["ReplicatePredictionsSeenLate"],
    }
