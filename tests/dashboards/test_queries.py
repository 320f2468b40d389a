"""Every query of the dashboards and alerts, asked of a Prometheus that has scraped the driven example app."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest

from replicate_proxy_mw.telemetry.names import ATTRIBUTES, OUTCOME
from tests.dashboards.prometheus import Prometheus
from tests.dashboards.queries import Asked, of_alerts, of_panels, of_variables, replaced, spelt
from tests.dashboards.scraped import WINDOW, chosen, scraped


@pytest.fixture(scope="module", name="scraped")
def of_module() -> Iterator[Prometheus]:
    with scraped() as server:
        yield server


@pytest.fixture(scope="module")
def variables(scraped: Prometheus) -> dict[str, str]:
    return chosen(scraped)


@pytest.mark.parametrize("asked", of_variables(), ids=lambda asked: asked.where)
def test_a_variable_has_values(asked: Asked, scraped: Prometheus) -> None:
    assert [value for value in scraped.values(asked.label, replaced(asked.expr, {"job": ".*"}, WINDOW)) if value]


@pytest.mark.parametrize("asked", of_panels(), ids=lambda asked: asked.where)
def test_a_panel_has_data(asked: Asked, scraped: Prometheus, variables: dict[str, str]) -> None:
    found = scraped.query(replaced(asked.expr, variables, WINDOW))
    assert any(math.isfinite(float(series["value"][1])) for series in found), asked.expr
    for label in re.findall(r"{{(\w+)}}", asked.legend):
        assert any(series["metric"].get(label) for series in found), label


@pytest.mark.parametrize("asked", of_alerts(), ids=lambda asked: asked.where)
def test_an_alert_fires_where_everything_is_too_much(asked: Asked, scraped: Prometheus) -> None:
    """The limits are tested in `alerts_test.yaml`; here it is what is compared to them."""
    lower = re.sub(r"> [\d.]+", "> -1", asked.expr)
    assert scraped.query(re.sub(r"\[\w+\]", f"[{WINDOW}]", lower)), lower


def test_every_outcome_was_there(scraped: Prometheus) -> None:
    [outcomes] = [asked for asked in of_variables() if asked.label == "replicate_proxy_outcome"]
    words = set(re.findall(r"`(\w+)`", ATTRIBUTES[OUTCOME].meaning)) - {"on_webhook"}
    assert set(scraped.values(outcomes.label, replaced(outcomes.expr, {"job": ".*"}, WINDOW))) == words


def test_prometheus_spells_names_as_expected(scraped: Prometheus) -> None:
    names = scraped.values("__name__", '{job="desk"}')
    assert spelt().keys() <= set(names)
    own = {name for name in names if name.startswith(("replicate", "gen_ai", "http_client"))}
    assert own <= spelt().keys()
    for name, labels in spelt().items():
        found = set().union(*(series["metric"] for series in scraped.query(f'{name}{{otel_scope_name!="fastapi"}}')))
        assert {label for label in found if not label.startswith("otel_scope")} - {
            "__name__",
            "job",
            "instance",
            "le",
        } == (labels)


def test_the_cost_is_a_plain_number_with_its_currency_as_a_label(scraped: Prometheus) -> None:
    [series] = scraped.query("sum by (replicate_prediction_cost_currency) (replicate_prediction_cost_total)")
    assert series["metric"] == {"replicate_prediction_cost_currency": "USD"}
    assert float(series["value"][1]) > 0.006
