"""What a dashboard of this project has to keep to, beyond Grafana's schema."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from replicate_proxy_mw.telemetry.names import METRICS
from tests.dashboards.grafana import DATASOURCE, WIDTH
from tests.dashboards.make import FOLDER, made
from tests.dashboards.queries import (
    OF_PROMETHEUS,
    Asked,
    Json,
    dashboards,
    of_alerts,
    of_panels,
    of_variables,
    panels,
    series,
    spelt,
    unknown,
)

MODELS = dashboards()
ASKED = [*of_panels(), *of_variables(), *of_alerts()]


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Json:
    model: Json = MODELS[request.param]
    return model


def test_they_are_as_their_program_makes_them() -> None:
    """Else: `python -m tests.dashboards.make --write`."""
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")} == made()


def test_ids_are_unique(model: Json) -> None:
    ids = [panel["id"] for panel in model["panels"]]
    assert len(ids) == len(set(ids)) > 10
    assert len({of["uid"] for of in MODELS.values()}) == len(MODELS)


def test_no_panel_is_upon_another(model: Json) -> None:
    places = [panel["gridPos"] for panel in model["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH
        assert place["h"] > 0
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_data_source_is_that_of_the_variable(model: Json) -> None:
    def found(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            if "datasource" in value:
                yield value["datasource"]
            for inner in value.values():
                yield from found(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from found(inner)

    assert model["templating"]["list"][0]["name"] == "datasource"
    assert all(source == DATASOURCE for source in found({**model, "annotations": {}}))
    assert [query["datasource"]["uid"] for query in model["annotations"]["list"]] == ["-- Grafana --"]


def test_every_variable_is_used_and_there(model: Json) -> None:
    names = {variable["name"] for variable in model["templating"]["list"]}
    queries = [target["expr"] for panel in panels(model) for target in panel["targets"]]
    used = set(re.findall(r"\$(?!__)(\w+)", " ".join(queries)))
    assert used == names - {"datasource"}


def test_every_panel_says_what_it_shows(model: Json) -> None:
    for panel in panels(model):
        assert panel["description"].endswith("."), panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in ("reqps", "ops", "percentunit", "s", "short")
    titles = [panel["title"] for panel in panels(model)]
    assert len(titles) - len(set(titles)) <= 1


def test_links_lead_to_a_dashboard_and_to_variables_that_it_has(model: Json) -> None:
    uids = {of["uid"]: {variable["name"] for variable in of["templating"]["list"]} for of in MODELS.values()}
    links = [link for panel in panels(model) for link in panel["fieldConfig"]["defaults"]["links"]]
    assert links
    for link in [*model["links"], *links]:
        found = re.match(r"/d/([\w-]+)", link["url"])
        assert found is not None
        assert set(re.findall(r"var-(\w+)=", link["url"])) <= uids[found[1]]
    assert [link["url"] for link in model["links"]] == [f"/d/{uid}" for uid in uids if uid != model["uid"]]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.where)
def test_a_query_has_only_metrics_and_labels_of_the_registry(asked: Asked) -> None:
    assert series(asked.expr)
    assert series(asked.expr) <= spelt().keys() | {"up"}
    assert unknown(asked.expr) == set()
    of_registry = {label for name in series(asked.expr) for label in spelt().get(name, ())} | OF_PROMETHEUS
    assert {*re.findall(r"{{(\w+)}}", asked.legend), *filter(None, [asked.label])} <= of_registry


def test_a_metric_or_label_that_is_none_is_noticed() -> None:
    assert series('sum by (le) (rate(my_metric{job="x"}[5m])) > 3 and on (job) up') == {"my_metric", "up"}
    assert unknown('sum by (tenant) (replicate_proxy_in_flight{outcome=~"x", job="y"})') == {
        "replicate_proxy_in_flight: tenant",
        "replicate_proxy_in_flight: outcome",
    }


def test_every_metric_of_ours_is_on_a_panel() -> None:
    shown = set().union(*(series(asked.expr) for asked in of_panels()))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown}
    assert families == {re.sub(r"_(bucket|count|sum)$", "", name) for name in spelt()}
    assert len(families) == len(METRICS)
