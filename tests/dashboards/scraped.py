"""A Prometheus that has scraped the driven example app, and the dashboards' variables as Grafana would have them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.dashboards.prometheus import Prometheus, prometheus
from tests.dashboards.queries import of_variables, replaced
from tests.dashboards.stage import eventually, stage
from tests.services import _free_port

# Longer than all the traffic takes.
WINDOW = "2m"


@contextmanager
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


def chosen(server: Prometheus) -> dict[str, str]:
    """As Grafana has them where all values are chosen: `.*`, or each of them where that would be too much."""
    [upstream] = [asked for asked in of_variables() if asked.where == "traffic: $upstream"]
    found = server.values(upstream.label, replaced(upstream.expr, {"job": ".*"}, WINDOW))
    names = [asked.where.rpartition("$")[2] for asked in of_variables()]
    return {**dict.fromkeys(names, ".*"), "upstream": "|".join(map(re.escape, found)).replace("\\", "\\\\")}


def _scrape(server: Prometheus) -> None:
    now = time.time()
    eventually(lambda: server.query(f"min(timestamp(replicate_proxy_in_flight)) > {now}"))
