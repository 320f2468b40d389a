"""What the README shows is run as it stands there, but for addresses and tokens."""

from __future__ import annotations

import re
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from replicate_proxy_mw import KeyRequest, ProxyConfig, ReplicateProxyMiddleware, StaticKeyResolver
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.clients.drivers import require
from tests.documents import ROOT, Page, execute
from tests.raw_asgi import host

README, PERFORMANCE, RELIABILITY = Page("README.md"), Page("docs/performance.md"), Page("docs/reliability.md")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        yield fake


def _fastapi_app(fake: FakeReplicate) -> FastAPI:
    code = README.block("python", "FastAPI()")
    code = re.sub(r"r8_the_token\w*", fake.token, code)
    code = code.replace("key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=", 1)
    app = execute("from replicate_proxy_mw import ProxyConfig\n" + code)["app"]
    assert isinstance(app, FastAPI)
    return app


def _app_with_a_resolver(fake: FakeReplicate) -> ReplicateProxyMiddleware:
    async def find_team(api_key: str) -> Any:
        return types.SimpleNamespace(name="team-a", may_generate=True, replicate_token=fake.token)

    resolver = execute(README.block("python", "def key_resolver"), find_team=find_team)["key_resolver"]
    return ReplicateProxyMiddleware(host, key_resolver=resolver, config=ProxyConfig(upstream=fake.url))


@pytest.fixture(scope="module", params=[_fastapi_app, _app_with_a_resolver], ids=["fastapi", "resolver"])
def origin(request: pytest.FixtureRequest, fake: FakeReplicate) -> Iterator[str]:
    with serve(request.param(fake)) as served:
        yield served.url


def _called(fake: FakeReplicate) -> None:
    request = fake.requests.pop()
    assert (request.operation, request.header("authorization")) == ("predictions.create", f"Bearer {fake.token}")
    assert fake.violations == []


def _addressed(code: str, origin: str) -> str:
    return code.replace("http://127.0.0.1:8000", origin).replace("VERSION", HELLO_WORLD)


@pytest.mark.parametrize("client", ["import Portkey", "import OpenAI", "from replicate import"])
def test_clients_of_python(origin: str, fake: FakeReplicate, client: str) -> None:
    known = execute(_addressed(README.block("python", client), origin))
    prediction = known["prediction"]
    assert prediction["status"] if isinstance(prediction, dict) else prediction.status
    for name in ("portkey", "openai", "replicate"):
        if name in known:
            getattr(known[name], "_client", known[name]).close()
    _called(fake)


@pytest.mark.parametrize("client", ["{ Portkey }", "import OpenAI", "import Replicate"])
def test_clients_of_node(origin: str, fake: FakeReplicate, client: str) -> None:
    require("node")
    code = _addressed(README.block("js", client), origin) + "\nconsole.log(prediction.status);"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code],
        cwd=Path(__file__).parent / "clients" / "node",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() in ("starting", "processing"), done.stderr
    _called(fake)


def test_curl(origin: str, fake: FakeReplicate) -> None:
    require("curl")
    done = subprocess.run(_addressed(README.block("sh", "curl"), origin), shell=True, capture_output=True, text=True)
    assert '"status"' in done.stdout, done.stderr
    _called(fake)


@pytest.mark.anyio
async def test_the_resolver_tells_callers_apart() -> None:
    async def find_team(api_key: str) -> Any:
        teams = {"pk-archive": types.SimpleNamespace(may_generate=False)}
        return teams.get(api_key)

    known = execute(README.block("python", "def key_resolver"), find_team=find_team)
    request: dict[str, Any] = {"method": "GET", "path": "/x", "scope": {}}
    assert await known["key_resolver"](KeyRequest(api_key="pk-nobody", **request)) is None
    with pytest.raises(known["PermissionDenied"], match="archive only"):
        await known["key_resolver"](KeyRequest(api_key="pk-archive", **request))


def test_the_viewer_shows_requests_of_the_app(fake: FakeReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TracerProvider] = []
    # The rest of the process is to keep its own, so the middleware is given this one.
    monkeypatch.setattr(trace, "set_tracer_provider", given.append)
    app = _fastapi_app(fake)
    execute(README.block("python", "TraceViewer"), app=app)
    app.user_middleware[0].kwargs["tracer_provider"] = given[0]
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/v1/account", headers={"x-portkey-api-key": "pk-team-b"}).status_code == 200
        assert "<html" in client.get("/traces", follow_redirects=True).text
        [request] = client.get("/traces/requests.json").json()["requests"]
    assert (request["tenant"], request["operation"]) == ("team-b", "account.get")
    fake.requests.clear()


def test_telemetry_is_switched_on_and_has_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")  # the rest of the process is to keep its own
    known = execute(README.block("python", "configure_telemetry()"))
    assert known["telemetry"].shutdown()
    ReplicateProxyMiddleware(
        host, key_resolver=StaticKeyResolver("r8_the_token", api_keys=["a"]), prices=known["prices"]
    )


def _tables(text: str) -> list[list[list[str]]]:
    """The cells of all tables, heads included."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[line.strip("|").split("|") for line in table.splitlines() if "---" not in line] for table in tables]


def _figures(text: str) -> dict[tuple[str, str], str]:
    """The cells of all tables by the names of their row and column."""
    return {
        (row[0].strip(), name.strip()): cell.strip()
        for names, *rows in _tables(text)
        for row in rows
        for name, cell in zip(names[1:], row[1:], strict=True)
    }


def test_figures_are_those_of_the_page_on_performance() -> None:
    results, _, _ = PERFORMANCE.text.partition("<!-- end of results -->")
    for condition in ("2026-11-22", "2 cores, AMD EPYC, CPython 3.11.2", "uvloop", "A create and its answer of 1.2 kB"):
        assert condition in README.text
        assert condition in results
    proxies = {
        "nginx": "nginx, `proxy_pass`",
        "this, `fast=True`": "replicate_proxy_mw, fast",
        "this": "replicate_proxy_mw",
        "Starlette and httpx": "Starlette and httpx",
        "fastapi-proxy-lib": "fastapi-proxy-lib",
    }
    measures = {
        "CPU per request, 32 at a time, µs": "CPU, c=32 (least, most)",
        "median latency added, 1 at a time, µs": "p50 added, c=1, µs",
        "of 2,000 creates held for 6 s, finished within 18 s": "held: finished",
        "memory of each, KiB": "KiB each",
        "first event of a stream, later by ms": "first event, ms over direct",
    }
    measured, shown = _figures(results), _figures(README.text)
    assert {row for row, column in shown if column == "nginx"} == {*measures}
    for measure, column in measures.items():
        for proxy, row in proxies.items():
            figure = measured[row, column].split()[0].replace(",", "")
            rounded = f"{float(figure):.0f}" if column.startswith("CPU") else figure
            assert shown[measure, proxy].replace(",", "") == rounded, (measure, proxy)
    for name in ("replicate_proxy_mw", "replicate_proxy_mw, fast"):  # "about twice"
        cpu = [
            float(measured[row, "CPU, c=32 (least, most)"].split()[0]) for row in (name, f"{name}, OpenTelemetry SDK")
        ]
        assert 1.8 < cpu[1] / cpu[0] < 2.3


def test_what_was_missed_is_told() -> None:
    _, *goals = _tables(PERFORMANCE.text)[0]
    reached = [cell.strip() for _, _, default, at_most, fast in goals for cell in (default, fast)]
    reached = [cell for cell in reached if cell != "-"]
    missed = [cell for cell in reached if "missed" in cell]
    assert f"Of the {len(reached)} goals in [Performance](docs/performance.md), {len(missed)} are missed" in README.text
    told = {name.strip(): [cell.strip().split(",")[0] for cell in cells] for name, *cells in goals}
    cpu, held = told["CPU per request, c=32, times nginx's"], told["… KiB each"]
    starting = told["import beyond httpx and opentelemetry-api, ms"]
    assert f"CPU is {cpu[3]} times nginx's where {cpu[2]} was the goal" in README.text
    assert f"takes {held[3]} KiB where {held[2]} was" in README.text
    assert f"the import {float(starting[1]):.0f} ms where {starting[0]} was" in README.text


def test_what_is_said_of_reliability_stands_there() -> None:
    departures = RELIABILITY.text.partition("<!-- aborts -->")[2].partition("<!-- end of aborts -->")[0]
    points = [row[1:] for table in _tables(departures)[:2] for row in table[1:]]
    assert len(points) == 2 * 9
    times = [[int(time) for time in cell.split(" / ")] for row in points for cell in row if " / " in cell]
    assert len(times) > 10
    assert max(half for half, _, _ in times) <= 250
    assert max(most for _, _, most in times) <= 800
    assert "closed within 0.8 s, half of the time within 0.25 s (50 departures at each of nine\npoints" in README.text
    assert "--repeat 50" in departures
    soak = RELIABILITY.text.partition("<!-- soak -->")[2].partition("<!-- end of soak -->")[0]
    [requests] = re.findall(r"In runs of ([\d,]+) requests", README.text)
    assert f"| {requests} in " in soak
    assert "| unexpected answers | 0 | 0 |" in soak


def test_no_block_is_forgotten() -> None:
    assert README.count("python", "js", "sh") == 11


def test_files_that_it_links_to_are_there() -> None:
    assert README.missing_links() == []
    pictures = re.findall(r'(?:src|srcset)="(\S+)"', README.text)
    assert len(pictures) == 2
    assert all(ROOT.joinpath(picture).exists() for picture in pictures)
