"""docs/dashboards.md is run as it stands there, but for ports; what it links to is tested in tests/dashboards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest

from replicate_proxy_mw.operations import OPERATIONS
from replicate_proxy_mw.telemetry import metrics, names
from replicate_proxy_mw.testing import FakeReplicate
from tests.dashboards.grafana import SCHEMA_VERSION
from tests.dashboards.prometheus import prometheus, promtool
from tests.dashboards.queries import dashboards, of_panels, panels, rules
from tests.docs.hosts import KEY, with_upstream
from tests.docs.programs import environment, free_port, running
from tests.documents import ROOT, Page, execute
from tests.otlp import Sink

PAGE = Page("docs/dashboards.md")


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        yield fake


@pytest.fixture
def env(fake: FakeReplicate) -> dict[str, str]:
    return environment(REPLICATE_API_TOKEN=fake.token, REPLICATE_PROXY_KEYS="team-a=pk-team-a")


def _first_app() -> str:
    return next(code for language, code in PAGE.code if language == "python")


def _eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _read(port: int, times: int = 1) -> None:
    """Reads of the account, each by a connection of its own, which any worker may take."""
    for _ in range(times):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/account", headers=KEY).status_code == 200


def _requests(port: int) -> float:
    """What the metrics at a port say of them."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", follow_redirects=True).text
    return sum(float(found) for found in re.findall(r"^replicate_proxy_requests_total{.*} (.+)$", text, re.MULTILINE))


def test_prometheus_scrapes_the_app_and_takes_the_rules(
    fake: FakeReplicate, env: dict[str, str], tmp_path: Path
) -> None:
    tmp_path.joinpath("app.py").write_text(with_upstream(_first_app(), fake))
    config = yaml.safe_load(PAGE.block("yaml", "scrape_configs"))
    shutil.copy(ROOT / "docs/dashboards/alerts.yaml", tmp_path)
    tmp_path.joinpath("prometheus.yml").write_text(PAGE.block("yaml", "scrape_configs"))
    checked = promtool("check", "config", "prometheus.yml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout

    port = free_port()
    [scrape] = config["scrape_configs"]
    [target] = scrape["static_configs"]
    target["targets"] = [address.replace("8000", str(port)) for address in target["targets"]]
    scrape |= {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
    config["rule_files"] = [str(tmp_path / name) for name in config["rule_files"]]
    with running(f"uvicorn app:app --port {port}", tmp_path, port, env), prometheus(config) as server:
        _read(port, 3)
        [series] = _eventually(lambda: server.query('replicate_proxy_requests_total{job="my-app"} == 3'))
        assert series["metric"]["replicate_operation"] == "account.get"
        assert server.rules() == [rule["alert"] for rule in rules()]


def test_spans_for_a_collector_and_metrics_for_prometheus(
    fake: FakeReplicate, env: dict[str, str], tmp_path: Path
) -> None:
    tmp_path.joinpath("app.py").write_text(with_upstream(PAGE.block("python", "add_metric_reader"), fake))
    port = free_port()
    with Sink() as sink:
        to = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, "OTEL_METRICS_EXPORTER": "none"}
        with running(f"uvicorn app:app --port {port}", tmp_path, port, env | to):
            _read(port, 2)
            _eventually(lambda: _requests(port) == 2)
        assert len([span for span in sink.spans if span.attributes.get("replicate_proxy.outcome") == "forwarded"]) == 2
        assert sink.metrics == {}


def test_each_worker_has_a_port_for_its_metrics(fake: FakeReplicate, env: dict[str, str], tmp_path: Path) -> None:
    code = with_upstream(PAGE.block("python", "def expose("), fake)
    port, *ports = free_port(), free_port(), free_port()
    assert "[9464, 9465]" in code
    tmp_path.joinpath("app.py").write_text(code.replace("[9464, 9465]", repr(ports)))
    command = PAGE.block("sh", "--workers")
    assert command == "uvicorn app:app --workers 2\n"
    with running(f"{command.rstrip()} --port {port}", tmp_path, port, env):
        _eventually(lambda: all(map(_listens, ports)))
        _read(port, 20)
        _eventually(lambda: sum(map(_requests, ports)) == 20)


def test_there_are_ports_for_all_workers_or_an_error() -> None:
    code = PAGE.block("python", "def expose(")
    known = execute("from collections.abc import Iterable\n" + code[code.index("def expose(") : code.index("@async")])
    known["start_http_server"] = _taken
    with pytest.raises(RuntimeError, match="more workers than ports"):
        known["expose"]([1, 2])


def test_a_limit_of_series_can_be_raised() -> None:
    reader = execute(PAGE.block("python", "cardinality_limits"))["reader"]
    provider = MeterProvider([reader], shutdown_on_exit=False)
    try:
        instruments = metrics.Instruments(provider.get_meter("test"))
        for number in range(2100):
            instruments._requests.add(1, "account.get", "forwarded", f"tenant-{number}")
        assert len(re.findall(r"^replicate_proxy_requests_total{", generate_latest().decode(), re.MULTILINE)) == 2100
    finally:
        provider.shutdown()


def test_versions_are_those_that_are_tested() -> None:
    package = json.loads(ROOT.joinpath("tests/dashboards/node/package.json").read_text(encoding="utf-8"))
    assert f"(`@grafana/schema` {package['dependencies']['@grafana/schema']})" in PAGE.text
    assert {model["schemaVersion"] for model in dashboards().values()} == {SCHEMA_VERSION}
    assert f"version {SCHEMA_VERSION}" in PAGE.text


def test_what_is_to_be_installed_has_what_is_imported() -> None:
    assert PAGE.block("sh", "pip").split()[2:] == ["opentelemetry-sdk", "opentelemetry-exporter-prometheus"]
    assert "prometheus-client" in " ".join(distribution("opentelemetry-exporter-prometheus").requires or ())


def test_grafana_finds_a_folder() -> None:
    [provider] = yaml.safe_load(PAGE.block("yaml", "providers:"))["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()


def test_variables_are_those_of_the_dashboards() -> None:
    models = dashboards()
    on = {
        name: {stem for stem, model in models.items() if name in _variables(model)}
        for model in models.values()
        for name in _variables(model)
    }
    told = dict(re.findall(r"^\| `(\w+)` \| .* \| (\w+) \|$", PAGE.text, re.MULTILINE))
    assert told == {name: "both" if len(where) == 2 else next(iter(where)) for name, where in on.items()}


def test_panels_are_those_of_the_dashboards() -> None:
    titles = {name: {panel["title"] for panel in panels(model)} for name, model in dashboards().items()}
    rows = re.findall(r"^\| .*\? \| (\w+) \| (.*) \|$", PAGE.text, re.MULTILINE)
    assert len(rows) == 13
    for name, told in rows:
        assert set(re.findall(r"\*\*(.+?)\*\*", told)) <= titles[name], told
    of_alerts = PAGE.text.partition("## Alerts")[2].partition("##")[0]
    assert set(re.findall(r"\*\*(.+?)\*\*", of_alerts)) <= set().union(*titles.values())
    assert all(f"/d/{model['uid']}" in PAGE.text for model in dashboards().values())


def test_alerts_are_the_rules() -> None:
    told = re.findall(r"^\| `(Replicate\w+)` \| (\w+) \|", PAGE.text, re.MULTILINE)
    assert told == [(rule["alert"], rule["labels"]["severity"]) for rule in rules()]
    assert len(told) == 15
    assert "fifteen alerting rules" in PAGE.text


def test_figures_of_series_are_those_of_the_registry() -> None:
    def of(*metrics: str) -> int:
        sizes = {name: len(names.METRICS[name].buckets) for name in metrics}
        return sum(buckets + 3 if buckets else 1 for buckets in sizes.values())

    table = PAGE.text.partition("## How many series")[2]
    told = [int(number) for number in re.findall(r"^\| [a-z].* \| (\d+)\b.*\|$", table, re.MULTILINE)]
    assert told == [
        of(names.IN_FLIGHT, names.OVERHEAD),
        of(names.REQUEST_DURATION),
        of(names.SERVER_DURATION),
        of(names.CLIENT_DURATION),
        of(names.QUEUE_DURATION, names.RUN_DURATION, names.TOTAL_DURATION),
        of(names.GEN_AI_DURATION),
        2 * of(names.GEN_AI_TOKENS),
        of(names.COST_TOTAL),
        of(names.LAG, names.READS),
        of(names.RETRIES),
    ]
    outcomes = set(re.findall(r"`(\w+)`", names.ATTRIBUTES[names.OUTCOME].meaning)) - {"on_webhook"}
    assert f"has {len(OPERATIONS)} operations; there are {len(outcomes)} outcomes" in PAGE.text
    assert f"The first {metrics.MAX_MODELS} models" in PAGE.text


def test_no_block_is_forgotten() -> None:
    assert PAGE.count("python") == 4
    assert PAGE.count("sh", "yaml") == 4
    assert len(PAGE.code) == 8


def test_files_that_it_links_to_are_there() -> None:
    assert PAGE.missing_links() == []


def _variables(model: dict[str, Any]) -> list[str]:
    return [variable["name"] for variable in model["templating"]["list"]]


def _listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    except httpx.TransportError:
        return False


def _taken(port: int, addr: str) -> None:
    raise OSError("in use")


def test_the_table_has_all_panels() -> None:
    table = PAGE.text.partition("<!-- prometheus -->")[2].partition("<!-- end of prometheus -->")[0]
    assert re.findall(r"^\| (\w+: .+?) \| [1-9]\d* \| [\d.e+-]+", table, re.MULTILINE) == [
        asked.where.partition(" (")[0] for asked in of_panels()
    ]


def test_the_script_that_makes_it() -> None:
    said = subprocess.run([sys.executable, ROOT / "scripts/prometheus.py", "--help"], capture_output=True, text=True)
    assert (said.returncode, "--screenshot" in said.stdout) == (0, True)
