"""Every query of the dashboards and alerts, asked of a Prometheus that has scraped the driven example app."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator

import pytest

from replicate_proxy_mw.telemetry.names import ATTRIBUTES, OUTCOME
from tests.dashboards.prometheus import Prometheus, prometheus
from tests.dashboards.queries import Asked, of_alerts, of_panels, of_variables, replaced, spelt
from tests.dashboards.stage import eventually, stage
from tests.services import _free_port

# Longer than all the traffic takes.
WINDOW = "2m"


@pytest.fixture(scope="module")
def scraped() -> Iterator[Prometheus]:
    with stage() as played:
        targets = [played.example.removeprefix("http://"), f"127.0.0.1:{_free_port()}"]  # nothing is at the second
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
            "scrape_configs": [{"job_name": "desk", "static_configs": [{"targets": targets}]}],
        }
        with prometheus(config) as server:
            for _ in range(2):  # since a rate is between two scrapes
                played.play()
                _scrape(server)
            # A busy machine may be late for a later scrape, and then there would be nothing.
            [scrape] = eventually(lambda: server.query("timestamp(up == 1) and on (job) up == 0"))
            server.moment = float(scrape["value"][1])
            yield server


@pytest.fixture(scope="module")
def variables(scraped: Prometheus) -> dict[str, str]:
    """As Grafana has them where all values are chosen: `.*`, or each of them where that would be too much."""
    [upstream] = [asked for asked in of_variables() if asked.where == "traffic: $upstream"]
    found = scraped.values(upstream.label, replaced(upstream.expr, {"job": ".*"}, WINDOW))
    names = [asked.where.rpartition("$")[2] for asked in of_variables()]
    return {**dict.fromkeys(names, ".*"), "upstream": "|".join(map(re.escape, found)).replace("\\", "\\\\")}


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


def _scrape(server: Prometheus) -> None:
    now = time.time()
    eventually(lambda: server.query(f"min(timestamp(replicate_proxy_in_flight)) > {now}"))
