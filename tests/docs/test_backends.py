"""docs/backends.md and its recipes: run where the program is here, else parsed, and held against real spans."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import yaml
from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Counter, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.routing import Mount

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, Rates, ReplicateKey, ReplicateProxyMiddleware
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.testing import FakeReplicate, serve
from scripts import phoenix
from tests.dashboards.prometheus import prometheus, promtool
from tests.documents import ROOT, Page
from tests.otlp import ExportedSpan, Sink, tracing
from tests.raw_asgi import host

BACKENDS = Page("docs/backends.md")
RECIPES = ROOT / "docs" / "backends"
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
PORTKEY = {"x-portkey-trace-id": "order-4711", "x-portkey-metadata": '{"team": "design", "_user": "ada"}'}

# The keys that the programs document, of each component that a recipe uses.
COMPONENTS = {
    "receivers": {"otlp": {"protocols"}},
    "processors": {
        "batch": set(),
        "memory_limiter": {"check_interval", "limit_mib", "spike_limit_mib"},
        "tail_sampling": {"decision_wait", "num_traces", "decision_cache", "policies"},
    },
    "exporters": {"otlp_http": {"endpoint", "headers"}, "jaeger_storage_exporter": {"trace_storage"}},
    "extensions": {"jaeger_storage": {"backends"}, "jaeger_query": {"storage"}},
}
POLICIES = {
    "status_code": {"status_codes"},
    "numeric_attribute": {"key", "min_value", "max_value"},
    "string_attribute": {"key", "values", "enabled_regex_matching"},
    "boolean_attribute": {"key", "value"},
    "latency": {"threshold_ms"},
    "ottl_condition": {"error_mode", "span"},
    "probabilistic": {"sampling_percentage"},
    "and": {"and_sub_policy"},
    "not": {"not_sub_policy"},
}

Policy = Mapping[str, Any]


def _recipe(name: str) -> Any:
    return yaml.safe_load(RECIPES.joinpath(name).read_text(encoding="utf-8"))


COLLECTOR = _recipe("collector.yaml")
SAMPLING: Sequence[Policy] = COLLECTOR["processors"]["tail_sampling"]["policies"]


# Where the variables send spans and metrics.

PROGRAM = """
from fastapi.testclient import TestClient

with TestClient(app) as client:
    assert client.get("/v1/hardware", headers={"x-portkey-api-key": "pk-team-a"}).status_code == 200
telemetry.shutdown()
"""
SECRETS = {"HONEYCOMB_API_KEY": "hc-key", "GRAFANA_INSTANCE": "4711", "GRAFANA_TOKEN": "glc_" + "t" * 90}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(queue_time=0.4, run_time=30.0).serve() as fake:
        yield fake


def _sent(block: str, fake: FakeReplicate, folder: Path) -> Sink:
    """What the page's app sends after one request, with the variables of `block`, whose addresses lead to the sink."""
    code = BACKENDS.block("python", "configure_telemetry(").replace(
        "key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=", 1
    )
    folder.joinpath("app.py").write_text(f"from replicate_proxy_mw import ProxyConfig\n{code}{PROGRAM}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"NO_PROXY": "127.0.0.1", "REPLICATE_API_TOKEN": fake.token, "REPLICATE_PROXY_KEYS": "pk-team-a"}
    with Sink() as sink:
        exports = re.sub(r"https?://[^/\s]+", sink.url, block)
        command = f"{exports}exec {sys.executable} app.py"
        subprocess.run(["sh", "-ec", command], env=environment | SECRETS, cwd=folder, check=True, timeout=60)
    return sink


@pytest.mark.parametrize(
    ("containing", "paths"),
    [
        ("ENDPOINT=http://127.0.0.1:4318\n", {"/v1/traces", "/v1/metrics"}),
        ("9090", {"/v1/traces", "/api/v1/otlp/v1/metrics"}),
        ("ENDPOINT=http://127.0.0.1:6006", {"/v1/traces"}),
        ("honeycomb", {"/v1/traces", "/v1/metrics"}),
        ("grafana.net", {"/otlp/v1/traces", "/otlp/v1/metrics"}),
    ],
)
def test_spans_and_metrics_go_where_the_variables_say(
    containing: str, paths: set[str], fake: FakeReplicate, tmp_path: Path
) -> None:
    [block] = [code for code in _shell() if containing in code and "TEMPORALITY" not in code]
    sink = _sent(block, fake, tmp_path)
    assert {export.path for export in sink.exports} == paths
    spans = [export for export in sink.exports if export.path.endswith("/traces")]
    assert any(b"replicate_proxy.outcome" in export.body for export in spans)
    expected = {
        "honeycomb": ("x-honeycomb-team", "hc-key"),
        "grafana.net": ("authorization", "Basic " + b64encode(f"4711:{SECRETS['GRAFANA_TOKEN']}".encode()).decode()),
    }
    if containing in expected:
        name, value = expected[containing]
        assert all(unquote(export.headers[name]) == value for export in sink.exports)


def test_datadog_gets_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = [code for code in _shell() if "TEMPORALITY" in code]
    for name, value in re.findall(r"^export (\w+)=(\S+)$", block, re.MULTILINE):
        monkeypatch.setenv(name, value)
    exporter = OTLPMetricExporter()
    assert (exporter._preferred_temporality or {})[Counter] is AggregationTemporality.DELTA
    exporter.shutdown()


# The recipes.


@pytest.mark.parametrize("name", ["collector.yaml", "jaeger.yaml"])
def test_pipelines_name_what_is_declared_and_all_of_it(name: str) -> None:
    recipe = _recipe(name)
    assert set(recipe) <= {*COMPONENTS, "service"}
    used: dict[str, set[str]] = {"extensions": set(recipe["service"].get("extensions", []))}
    for pipeline, parts in recipe["service"]["pipelines"].items():
        assert pipeline in ("traces", "metrics")
        for kind, ids in parts.items():
            used.setdefault(kind, set()).update(ids)
    assert {kind: set(recipe[kind]) for kind in COMPONENTS if kind in recipe} == {
        kind: ids for kind, ids in used.items() if ids
    }
    for kind in set(COMPONENTS) & set(recipe):
        for id, settings in recipe[kind].items():
            assert set(settings or ()) <= COMPONENTS[kind][id.partition("/")[0]], id


def test_the_collector_limits_its_memory_first_and_batches_last() -> None:
    for pipeline in COLLECTOR["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"
    assert "tail_sampling" in COLLECTOR["service"]["pipelines"]["traces"]["processors"]
    limiter = COLLECTOR["processors"]["memory_limiter"]
    assert limiter["spike_limit_mib"] == limiter["limit_mib"] / 5
    assert _recipe("compose.yaml")["services"]["collector"]["environment"]["GOMEMLIMIT"] == (
        f"{limiter['limit_mib'] * 4 // 5}MiB"
    )


def test_the_snippet_with_a_key_fits_the_collector() -> None:
    [exporters] = yaml.safe_load(BACKENDS.block("yaml", "authorization:")).values()
    for id, settings in exporters.items():
        assert settings["endpoint"] == COLLECTOR["exporters"][id]["endpoint"]
        assert set(settings) <= COMPONENTS["exporters"]["otlp_http"]


def test_jaeger_reads_what_it_has_stored() -> None:
    jaeger = _recipe("jaeger.yaml")
    [storage] = jaeger["extensions"]["jaeger_storage"]["backends"]
    assert jaeger["extensions"]["jaeger_query"]["storage"] == {"traces": storage}
    assert jaeger["exporters"]["jaeger_storage_exporter"] == {"trace_storage": storage}


def test_the_stack_is_wired() -> None:
    compose = _recipe("compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        mounted = [volume.split(":") for volume in service["volumes"]]
        for source, target, *mode in mounted:
            assert source in compose["volumes"] or (RECIPES.joinpath(source).exists() and mode == ["ro"])
            assert target.startswith("/")
        for argument in service.get("command", []):
            if "config" in argument and "/" in argument:
                assert argument.partition("=")[2] in [target for _, target, *_ in mounted]
    asked = dict(re.findall(r"\$\{env:(\w+)(:-)?", RECIPES.joinpath("collector.yaml").read_text()))
    given = set(services["collector"]["environment"])
    assert {name for name, default in asked.items() if not default} < given == {*asked, "GOMEMLIMIT"}
    sources = _recipe("grafana-datasources.yaml")["datasources"]
    assert {source["type"] for source in sources} == {"prometheus", "tempo"}
    assert {re.split("[/:]+", source["url"])[1] for source in sources} <= set(services)
    [provider] = _recipe("grafana-dashboards.yaml")["providers"]
    assert any(provider["options"]["path"] in volume for volume in services["grafana"]["volumes"])
    assert list(RECIPES.parent.joinpath("dashboards").glob("*.json"))


def test_prometheus_takes_its_recipe(tmp_path: Path) -> None:
    config = _recipe("prometheus.yaml")
    assert config.pop("otlp") == {"promote_scope_metadata": True}  # of 3.6; Debian's is older
    tmp_path.joinpath("prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(ROOT / "docs" / "dashboards" / "alerts.yaml", tmp_path)
    checked = promtool("check", "config", str(tmp_path / "prometheus.yaml"))
    assert checked.returncode == 0, checked.stderr
    assert "SUCCESS" in checked.stdout


# What the collector keeps of real traffic.


def _leaves(policies: Sequence[Policy]) -> Iterator[Policy]:
    for policy in policies:
        inner = policy.get("and", {}).get("and_sub_policy") or policy.get("not", {}).get("not_sub_policy")
        if inner is None:
            yield policy
        else:
            yield from _leaves(inner if isinstance(inner, list) else [inner])


def _all(policies: Sequence[Policy]) -> Iterator[Policy]:
    yield from policies
    yield from (leaf for leaf in _leaves(policies) if leaf not in policies)


def test_the_policies_ask_for_what_the_proxy_says() -> None:
    for policy in _all(SAMPLING):
        kind = policy["type"]
        assert set(policy) == {"name", "type", kind}
        assert set(policy[kind]) <= POLICIES[kind], policy["name"]
        for name in [policy[kind]["key"]] if "key" in policy[kind] else _attributes(str(policy[kind])):
            assert names.known(name), name
    assert len({policy["name"] for policy in _all(SAMPLING)}) == len(list(_all(SAMPLING)))
    for policy in _leaves(SAMPLING):
        if policy.get("string_attribute", {}).get("key") in (names.OUTCOME, names.ORIGIN):
            meaning = names.ATTRIBUTES[policy["string_attribute"]["key"]].meaning
            assert all(f"`{value}`" in meaning for value in policy["string_attribute"]["values"])


def _attributes(text: str) -> list[str]:
    return re.findall(r'attributes\["([\w.]+)"\]', text)


class _Values(dict[str, Any]):
    def __missing__(self, name: str) -> None:
        return None


def _holds(condition: str, span: ExportedSpan) -> bool:
    """OTTL's comparisons and `and` are Python's; what cannot be compared is false there."""
    try:
        return bool(eval(condition, {"attributes": _Values(span.attributes), "nil": None}))
    except TypeError:
        return False


def _picks(policy: Policy, spans: Sequence[ExportedSpan]) -> bool:
    """As the tail sampling processor's README says; a probability picks nothing."""
    told = policy[policy["type"]]
    values = [span.attributes.get(told.get("key", "")) for span in spans]
    match policy["type"]:
        case "status_code":
            return any(span.status in told["status_codes"] for span in spans)
        case "numeric_attribute":  # floats are 0 to it
            return any(type(value) is int and told["min_value"] <= value <= told["max_value"] for value in values)
        case "string_attribute" if told.get("enabled_regex_matching"):
            return any(isinstance(v, str) and re.search(pattern, v) for v in values for pattern in told["values"])
        case "string_attribute":
            return any(value in told["values"] for value in values)
        case "boolean_attribute":
            return any(value is told["value"] for value in values)
        case "latency":
            took = max(span.end for span in spans) - min(span.start for span in spans)
            return bool(took > told["threshold_ms"] * 1_000_000)
        case "ottl_condition":
            return any(_holds(condition, span) for condition in told["span"] for span in spans)
        case "and":
            return all(_picks(inner, spans) for inner in told["and_sub_policy"])
        case "not":
            return not _picks(told["not_sub_policy"], spans)
    assert policy["type"] == "probabilistic"
    return False


def _picked_by(spans: Sequence[ExportedSpan]) -> set[str]:
    return {policy["name"] for policy in SAMPLING if _picks(policy, spans)}


@pytest.fixture(scope="module")
def traces(fake: FakeReplicate) -> dict[str, list[ExportedSpan]]:
    """Traces of real requests by what they are; the run of the create is apart, as it comes late."""
    found: dict[str, list[ExportedSpan]] = {}
    with Sink() as sink, tracing(sink) as (tracer_provider, _):
        app = ReplicateProxyMiddleware(
            host,
            key_resolver=MappingKeyResolver({"pk-team-a": ReplicateKey(fake.token, tenant="team-a")}),
            config=ProxyConfig(upstream=fake.url),
            prices={"replicate/hello-world": Rates(per_run=0.25)},
            tracer_provider=tracer_provider,
        )
        with serve(app) as served, httpx.Client(base_url=f"{served.url}/v1") as client:

            def ask(what: str, method: str, path: str, status: int, **more: Any) -> Any:
                headers = {"x-portkey-api-key": "pk-team-a", **PORTKEY, **more.pop("headers", {})}
                seen = {span.span_id for span in sink.spans}
                answer = client.request(method, path, headers=headers, **more)
                assert answer.status_code == status, answer.text
                expected = 3 if what == "end" else 1 if status == 401 else 2 + what.startswith("unknown")
                found[what] = [span for span in sink.wait(len(seen) + expected) if span.span_id not in seen]
                return answer.json()

            body = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
            path = f"/predictions/{ask('create', 'POST', '/predictions', 201, json=body)['id']}"
            ask("poll", "GET", path, 200)
            fake.clock.advance(0.8)
            ask("poll with news", "GET", path, 200)
            ask("poll again", "GET", path, 200)
            fake.clock.advance(60)
            ask("end", "GET", path, 200)
            found["run"] = [span for span in found["end"] if span.name.startswith("generate_content")]
            found["end"] = [span for span in found["end"] if span not in found["run"]]
            ask("read after its end", "GET", path, 200)
            ask("list", "GET", "/predictions", 200)
            ask("stranger", "GET", path, 401, headers={"x-portkey-api-key": "pk-stranger"})
            ask("missing", "GET", "/predictions/" + "a" * 26, 404)
            fake.fail(500, operation="predictions.get")
            ask("broken", "GET", path, 500)
            with httpx.Client(base_url=fake.url, headers={"authorization": f"Bearer {fake.token}"}) as elsewhere:
                other = elsewhere.post("/predictions", json=body).json()["id"]
            fake.clock.advance(60)
            ask("unknown create", "GET", f"/predictions/{other}", 200)
        with tracer_provider.get_tracer("the rest of the app").start_as_current_span("a job of the host"):
            pass
        found["host"] = [span for span in sink.wait(1) if span.name == "a job of the host"]
    return found


def test_all_but_polls_without_news_is_kept(traces: Mapping[str, Sequence[ExportedSpan]]) -> None:
    assert {what: sorted(_picked_by(spans)) for what, spans in traces.items()} == {
        "create": ["all-but-polls"],
        "poll": [],
        "poll with news": ["polls-with-news"],
        "poll again": [],
        "end": ["polls-with-news"],
        "run": ["expensive", "not-the-proxy", "slow"],
        "read after its end": [],
        "list": ["all-but-polls"],
        "stranger": ["refusals"],
        "missing": ["errors", "refusals"],
        "broken": ["errors", "refusals"],
        "unknown create": ["ends-without-a-create", "expensive", "slow"],
        "host": ["not-the-proxy"],
    }
    [some] = [policy for policy in SAMPLING if policy["name"] == "some-polls"]
    [polls, share] = some["and"]["and_sub_policy"]
    assert _picks(polls, traces["poll"])
    assert not _picks(polls, traces["create"])
    assert share["probabilistic"] == {"sampling_percentage": 1}


def test_a_caller_who_left_is_kept(traces: Mapping[str, Sequence[ExportedSpan]]) -> None:
    left = [replace(span, attributes={names.OUTCOME: "client_disconnected"}) for span in traces["poll"]]
    assert "callers-who-left" in _picked_by(left)


# The queries.


def test_queries_name_what_is_on_spans_and_labels() -> None:
    for language, code in BACKENDS.code:
        if language in ("traceql", "text"):
            said = re.sub(r"'\]\['", ".", code)
            found = re.findall(r"(?:span\.|attributes\['|^|\s)((?:replicate|replicate_proxy|portkey)\.[\w.]+)", said)
            assert found or "link:traceID" in code
            for name in found:
                assert names.known(name), name
    for name in re.findall(r"`@?((?:replicate|replicate_proxy|portkey)\.[\w.]+)`", BACKENDS.text):
        assert names.known(name) or name in names.METRICS, name
    for name in re.findall(r"@((?:replicate|replicate_proxy|portkey)\.[\w.]*\w)", BACKENDS.text):
        assert names.known(name), name


def test_prometheus_knows_what_tenants_spend(fake: FakeReplicate) -> None:
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry)], shutdown_on_exit=False)
    app = ReplicateProxyMiddleware(
        FastAPI(routes=[Mount("/metrics", make_asgi_app(registry))]),
        key_resolver=MappingKeyResolver({"pk-team-a": ReplicateKey(fake.token, tenant="team-a")}),
        config=ProxyConfig(upstream=fake.url),
        prices={"replicate/hello-world": Rates(per_run=0.25)},
        meter_provider=provider,
    )

    def predict(client: httpx.Client) -> None:
        body = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
        id = client.post("/predictions", json=body).json()["id"]
        fake.clock.advance(60)
        assert client.get(f"/predictions/{id}").json()["status"] == "succeeded"

    with serve(app) as served:
        target = served.url.removeprefix("http://")
        every = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
        config = {"scrape_configs": [{"job_name": "my-app", **every, "static_configs": [{"targets": [target]}]}]}
        with (
            httpx.Client(base_url=f"{served.url}/v1", headers={"x-portkey-api-key": "pk-team-a"}) as client,
            prometheus(config) as server,
        ):
            predict(client)
            total = "replicate_prediction_cost_total"
            _eventually(lambda: [s["value"][1] for s in server.query(total)] == ["0.25"])
            predict(client)
            _eventually(lambda: [s["value"][1] for s in server.query(total)] == ["0.5"])
            [series] = server.query(BACKENDS.block("promql", total))
    provider.shutdown()
    assert series["metric"] == {"replicate_proxy_tenant": "team-a", "replicate_prediction_cost_currency": "USD"}
    assert float(series["value"][1]) > 0


def _eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# scripts/phoenix, as far as it goes without Phoenix.


def _script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "phoenix.py", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_script_tells_its_options() -> None:
    done = subprocess.run([ROOT / "scripts" / "phoenix", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--screenshot PATH" in done.stdout
    assert "--exposed" in done.stdout
    assert "--inside" not in done.stdout
    assert BACKENDS.block("sh", "--screenshot").split()[0] == "./scripts/phoenix"
    assert _script("--screenshots").returncode == 2


def test_it_refuses_where_it_cannot_be_alone(tmp_path: Path) -> None:
    done = _script(PATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "binds its gRPC port on all interfaces" in done.stderr
    assert "there is no program unshare" in done.stderr
    assert "add --exposed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_needs_a_browser(tmp_path: Path) -> None:
    done = _script("--screenshot", "x.png", PATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "needs Chromium" in done.stderr


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOENIX_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(phoenix.Failed, match="somebody else's"):
        phoenix.installed()


def test_in_its_namespace_only_loopback_is_there() -> None:
    unshare = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces for us here")
    program = (
        "import socket; from scripts import phoenix; phoenix.keep_to_loopback();"
        "server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname()); print('up')"
    )
    done = subprocess.run([*unshare, sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("up\n", "")


def test_all_that_it_installs_is_pinned_with_hashes() -> None:
    pins = phoenix.REQUIREMENTS.read_text().replace("\\\n", " ").splitlines()
    assert any(pin.startswith("arize-phoenix==20.26.1 ") for pin in pins)
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+", pin) for pin in pins)


def test_it_looks_for_what_the_demo_says() -> None:
    demo = ROOT.joinpath("scripts/demo.py").read_text()
    assert f'trace_id="{phoenix.TRACE_ID[1]}"' in demo
    assert f'"{phoenix.METADATA[0].rpartition(".")[2]}": "{phoenix.METADATA[1]}"' in demo
    for name in (phoenix.TRACE_ID[0], *phoenix.SHOWN):
        assert names.known(name)


def test_it_tells_the_story_of_a_run(traces: Mapping[str, Sequence[ExportedSpan]]) -> None:
    [run] = traces["run"]
    told = phoenix.story({"attributes": run.attributes, "context": {"trace_id": run.trace_id}})
    assert told == [
        f"Prediction {run.attributes[names.PREDICTION_ID]} of replicate/hello-world succeeded:",
        "  0.4 s in the queue, 30.0 s of running, read 4 times until its end was known",
        "  for the tenant team-a: ada of design",
        "  0.25000 USD, by the app's own prices (per_run)",
        f"  trace {run.trace_id}",
    ]
    attributes = {name: value for name, value in run.attributes.items() if name != names.COST}
    with pytest.raises(phoenix.Failed, match=r"says nothing of 'replicate\.prediction\.cost'"):
        phoenix.story({"attributes": attributes, "context": {"trace_id": run.trace_id}})


def test_whatever_the_server_has_started_ends_with_it() -> None:
    shell = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        phoenix.end(server)
    assert server.returncode is not None
    _eventually(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The page.


def _shell() -> list[str]:
    return [code for language, code in BACKENDS.code if language == "sh"]


@pytest.mark.parametrize("block", _shell())
def test_shell_blocks_parse(block: str) -> None:
    subprocess.run(["sh", "-n"], input=block, text=True, check=True)
    for name in re.findall(r"(?:\./|docs/backends/)[\w./-]+", block):
        assert ROOT.joinpath(name).exists(), name
    for name in re.findall(r"\bPHOENIX_\w+", block):
        assert name in {*phoenix.SETTINGS, "PHOENIX_PORT"}


def test_the_settings_of_phoenix_are_those_of_the_script() -> None:
    said = dict(re.findall(r"(PHOENIX_\w+)=(\S+)", BACKENDS.block("sh", "phoenix serve")))
    assert said.pop("PHOENIX_PORT") == "6006"
    assert said == {name: value for name, value in phoenix.SETTINGS.items() if name.startswith("PHOENIX_")}


def test_no_block_is_forgotten() -> None:
    assert {language: BACKENDS.count(language) for language, _ in BACKENDS.code} == {
        "python": 1,
        "sh": 12,
        "text": 2,
        "yaml": 1,
        "traceql": 2,
        "promql": 1,
    }


def test_what_it_links_to_is_there() -> None:
    assert BACKENDS.missing_links() == []
    picture = RECIPES.parent / "images" / "phoenix.png"
    assert picture.stat().st_size < 300_000
    assert {path.name for path in RECIPES.iterdir()} == {
        *("collector.yaml", "tempo.yaml", "jaeger.yaml", "prometheus.yaml", "compose.yaml"),
        *("grafana-datasources.yaml", "grafana-dashboards.yaml"),
    }
