"""docs/questions.md: what it says of an answer is what callers get, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from replicate_proxy_mw import MappingKeyResolver, Policy, ProxyConfig, ReplicateKey, ReplicateProxyMiddleware, errors
from replicate_proxy_mw.devtools import TraceBuffer, TraceViewer
from replicate_proxy_mw.errors import ProxyError
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.clients.drivers import require
from tests.docs.hosts import app_of, create
from tests.docs.programs import environment, free_port, running, shell
from tests.documents import ROOT, Page, execute
from tests.raw_asgi import call, host, http_scope

QUESTIONS = Page("docs/questions.md")
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
CREATE = {"version": VERSION, "input": {"text": "Alice"}}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        yield fake


@pytest.fixture(scope="module")
def client(fake: FakeReplicate) -> Iterator[httpx.Client]:
    keys = {
        "pk-team-a": ReplicateKey(fake.token, tenant="team-a"),
        "pk-own": ReplicateKey(fake.token, tenant="own", policy=Policy(own_predictions=True)),
        "pk-models": ReplicateKey(fake.token, tenant="models", policy=Policy(models=["replicate/*"])),
        "pk-stale": ReplicateKey("r8_a_token_that_was_revoked", tenant="stale"),
    }
    app = ReplicateProxyMiddleware(
        host, key_resolver=MappingKeyResolver(keys), config=ProxyConfig(upstream=fake.url, exclude=["/v1/own"])
    )
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        yield client


def ask(client: httpx.Client, key: str | None, method: str, path: str, **more: Any) -> tuple[int, str | None]:
    """Status, and the code if the answer is the proxy's own."""
    headers = ({} if key is None else {"x-portkey-api-key": key}) | more.pop("headers", {})
    answer = client.request(method, path, headers=headers, **more)
    own = answer.headers.get("x-portkey-gateway-exception") == "true"
    return answer.status_code, answer.json()["error"]["code"] if own else None


def test_a_401_says_whose_it_is(client: httpx.Client) -> None:
    found = [ask(client, key, "GET", "/v1/account") for key in (None, "pk-other", "pk-stale", "pk-team-a")]
    assert found == [(401, "key_missing"), (401, "key_unknown"), (401, None), (200, None)]
    assert ask(client, None, "GET", "/v1/account", headers={"authorization": "Token pk-team-a"}) == (200, None)


def test_a_403_for_a_bare_version(client: httpx.Client) -> None:
    assert ask(client, "pk-models", "POST", "/v1/predictions", json=CREATE) == (403, "permission_denied")
    named = CREATE | {"version": f"replicate/hello-world:{VERSION}"}
    assert ask(client, "pk-models", "POST", "/v1/predictions", json=named) == (201, None)


def test_a_404_for_a_prediction_that_exists(client: httpx.Client) -> None:
    id = client.post("/v1/predictions", headers={"x-portkey-api-key": "pk-team-a"}, json=CREATE).json()["id"]
    assert ask(client, "pk-own", "GET", f"/v1/predictions/{id}") == (404, "not_found")
    assert ask(client, "pk-team-a", "GET", f"/v1/predictions/{id}") == (200, None)


@pytest.mark.parametrize("path", ["/v1/v1/predictions", "/v1/chat/completions"])
def test_a_404_is_replicate_s_own(client: httpx.Client, path: str) -> None:
    assert ask(client, "pk-team-a", "POST", path, json={}) == (404, None)


def test_what_worked_with_portkey(client: httpx.Client) -> None:
    for headers in ({"x-portkey-custom-host": "https://app.example"}, {"x_portkey_api_key": "pk-team-a"}):
        assert ask(client, "pk-team-a", "GET", "/v1/account", headers=headers) == (400, "bad_request")
    doubled = [("x-portkey-api-key", "pk-team-a"), ("x-portkey-api-key", "pk-own")]
    assert client.get("/v1/account", headers=doubled).status_code == 400


def test_what_browsers_ask_beforehand(client: httpx.Client) -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert ask(client, None, "OPTIONS", "/v1/predictions", headers=asked) == (401, "key_missing")
    answer = client.get("/v1/account", headers={"x-portkey-api-key": "pk-team-a", "origin": "https://app.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_which_links_lead_where(client: httpx.Client, fake: FakeReplicate) -> None:
    headers = {"x-portkey-api-key": "pk-team-a"}
    made = client.post("/v1/predictions", headers=headers, json=CREATE | {"stream": True}).json()["urls"]
    origin = str(client.base_url)
    assert [name for name in made if made[name].startswith(origin)] == ["get", "cancel"]
    file = client.post("/v1/files", headers=headers, files={"content": b"a file"}).json()
    assert not file["urls"]["get"].startswith(origin)


def test_paths_of_the_host_s_own() -> None:
    config = execute(QUESTIONS.block("python", "exclude="))["config"]
    assert list(config.exclude) == ["/v1/status", "/v1/chat"]


def test_without_an_app(fake: FakeReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-team-a")
    app = app_of(QUESTIONS.block("python", "Starlette()"), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        create(client)
        assert client.get("/elsewhere").status_code == 404


def test_who_speaks(client: httpx.Client, tmp_path: Path) -> None:
    require("curl")
    command = QUESTIONS.block("sh", "curl -si").replace("https://app.example", str(client.base_url))

    def told(key: str, path: str = "/v1/account") -> list[str]:
        said = shell(command.replace("/v1/account", path), tmp_path, environment(KEY=key))
        found = re.findall(r'HTTP/1.1 (\d+)|^(x-portkey-[a-z-]+)|"code":"(\w+)"', said, re.MULTILINE)
        return sorted("".join(one) for one in found)

    assert told("pk-other") == ["401", "key_unknown", "x-portkey-gateway-exception", "x-portkey-trace-id"]
    assert told("pk-stale") == ["401", "x-portkey-trace-id"]
    assert told("pk-team-a", "/elsewhere") == ["200"]


APP = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from replicate_proxy_mw import EnvKeyResolver, ReplicateProxyMiddleware, configure_telemetry

telemetry = configure_telemetry()

@asynccontextmanager
async def lifespan(app):
    yield
    telemetry.shutdown()

app = FastAPI(lifespan=lifespan)
app.add_middleware(ReplicateProxyMiddleware, key_resolver=EnvKeyResolver())
"""


def test_spans_without_a_backend(tmp_path: Path) -> None:
    tmp_path.joinpath("app.py").write_text(APP)
    port = free_port()
    command = "env " + QUESTIONS.block("sh", "OTEL_TRACES_EXPORTER=console").replace("8000", str(port))
    keys = {"REPLICATE_API_TOKEN": "r8_0000000000000000000000000000", "REPLICATE_PROXY_KEYS": "pk-team-a"}
    with running(command, tmp_path, port, environment(**keys, OTEL_BSP_SCHEDULE_DELAY="50")) as log:
        httpx.get(f"http://127.0.0.1:{port}/v1/hardware")
        deadline = time.monotonic() + 20
        while '"name": "GET /v1/hardware"' not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.anyio
async def test_the_viewer_answers_this_machine_alone() -> None:
    viewer = TraceViewer(TraceBuffer())
    near = {**http_scope("GET", "/"), "client": ("127.0.0.1", 1), "headers": [(b"host", b"127.0.0.1:8000")]}
    far = {**near, "client": ("192.0.2.1", 1)}
    assert [(await call(viewer, scope)).status for scope in (near, far)] == [200, 403]
    assert QUESTIONS.block("sh", "ssh").split() == ["ssh", "-L", "8000:127.0.0.1:8000", "app.example"]


def test_what_it_names_is_there() -> None:
    codes = {error.code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, ProxyError)}
    known = codes | {"upstream_aborted"} | set(ProxyConfig.__dataclass_fields__)
    known |= {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.joinpath("src").rglob("*.py"))
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=[^`]*|\(\))?`", QUESTIONS.text)
    assert len(named) > 40
    elsewhere = {
        "gaierror",
        "next",
        "traceparent",
        "localhost",
        "service.name",
        "urls.stream",
        "urls.web",
        "urls.get",
        "urls.cancel",
    }
    assert not [name for name in named if name not in known | elsewhere and name.rpartition(".")[2] not in sources]


def test_each_answer_is_short_and_leads_on() -> None:
    _, *parts = re.split(r"^### (.*)\n", QUESTIONS.text, flags=re.MULTILINE)
    answers = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(answers) >= 30
    for title, text in answers.items():
        without_code = re.sub(r"```.*?```", "", text.partition("\n## ")[0], flags=re.DOTALL)
        assert len([line for line in without_code.splitlines() if line.strip()]) <= 7, title
        assert "](" in text or title.startswith("… leave some paths"), title


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert (QUESTIONS.count("sh"), QUESTIONS.count("python"), len(QUESTIONS.code)) == (3, 2, 5)
    assert QUESTIONS.missing_links() == []
    assert subprocess.run(["sh", "-n", "-c", QUESTIONS.block("sh", "ssh")]).returncode == 0
