"""What stands in the dashboards and alerts: their queries, and the names that Prometheus has for our metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from replicate_proxy_mw.telemetry.names import METRICS
from tests.dashboards.make import FOLDER

Json = dict[str, Any]

_UNITS = {"s": "_seconds"}
_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "up/down counter": ("",)}

# Of the scrape, of the buckets of a histogram, and of the exporter.
OF_PROMETHEUS = {"job", "instance", "le", "otel_scope_name"}


@dataclass(frozen=True)
class Asked:
    """A query, and where it stands. `legend` is a template of labels; `label` is what a variable wants to know."""

    where: str
    expr: str
    legend: str = ""
    label: str = ""


def spelt() -> dict[str, set[str]]:
    """Labels by name of each of our series, as Prometheus spells them."""
    return {
        _name(metric.name) + _UNITS.get(metric.unit, "") + suffix: {_name(label) for label in metric.labels}
        for metric in METRICS.values()
        for suffix in _SUFFIXES[metric.kind]
    }


def dashboards() -> dict[str, Json]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def panels(model: Json) -> list[Json]:
    return [panel for panel in model["panels"] if panel["type"] != "row"]


def of_panels() -> list[Asked]:
    return [
        Asked(
            f"{name}: {panel['title']} ({panel['id']}{target['refId']})", target["expr"], legend=target["legendFormat"]
        )
        for name, model in dashboards().items()
        for panel in panels(model)
        for target in panel["targets"]
    ]


def of_variables() -> list[Asked]:
    asked = []
    for name, model in dashboards().items():
        for variable in model["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert found is not None, variable
                asked.append(Asked(f"{name}: ${variable['name']}", found[1], label=found[2]))
    return asked


def rules() -> list[Json]:
    text = FOLDER.joinpath("alerts.yaml").read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def of_alerts() -> list[Asked]:
    return [Asked(f"alerts: {rule['alert']}", rule["expr"]) for rule in rules()]


def replaced(expr: str, variables: Mapping[str, str], window: str) -> str:
    """`expr` as Grafana would send it; it has no variables left."""
    for name, value in {"__rate_interval": window, "__range": window, **variables}.items():
        expr = re.sub(rf"\${name}\b", lambda _, value=value: value, expr)  # type: ignore[misc]
    assert "$" not in expr, expr
    return expr


def series(expr: str) -> set[str]:
    """The names of the metrics in it."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on) \([^)]*\)", " ", expr)
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare)) - {"or", "and", "by", "on"}


def labels(expr: str) -> dict[str, set[str]]:
    """The labels that are looked for on each metric, with those that results are grouped by, on all of them."""
    grouped = {
        label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expr) for label in re.split(r",\s*", group.strip())
    }
    found: dict[str, set[str]] = {name: set() for name in series(expr)}
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expr):
        found[name] |= set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", matchers))
    return {name: of | grouped for name, of in found.items()}


def unknown(expr: str) -> set[str]:
    """Labels that a metric in it does not have."""
    names = spelt() | {"up": set()}
    return {
        f"{name}: {label}" for name, of in labels(expr).items() for label in of - names.get(name, set()) - OF_PROMETHEUS
    }


def _name(name: str) -> str:
    return name.replace(".", "_")
