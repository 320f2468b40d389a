"""docs/deployment.md is run as it stands there: real servers with two workers, a real Redis, a fake Replicate."""

from __future__ import annotations

import asyncio
import configparser
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

from replicate_proxy_mw import ProxyConfig
from replicate_proxy_mw.testing import FakeReplicate
from tests.docs.hosts import BODY, KEY, create, with_upstream
from tests.docs.programs import environment, free_port, running
from tests.documents import Page, execute
from tests.otlp import ExportedSpan, Sink
from tests.services import RedisServer

DEPLOYMENT = Page("docs/deployment.md")
SERVERS = {line.split()[0]: line for line in DEPLOYMENT.block("sh", "uvicorn").splitlines()}
GRACE = 100  # seconds, of whoever sends the signal


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(queue_time=0.0, run_time=30.0).serve() as fake:
        yield fake


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


@pytest.fixture
def env(fake: FakeReplicate, sink: Sink, redis_service: RedisServer) -> dict[str, str]:
    return environment(
        REPLICATE_API_TOKEN=fake.token,
        REPLICATE_PROXY_KEYS="team-a=pk-team-a",
        REDIS_URL=redis_service.url,
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.url,
        OTEL_BSP_SCHEDULE_DELAY="50",
    )


@pytest.fixture
def folder(tmp_path: Path, fake: FakeReplicate) -> Path:
    tmp_path.joinpath("app.py").write_text(with_upstream(DEPLOYMENT.block("python", "# app.py"), fake))
    return tmp_path


def _command(server: str, port: int, *, workers: int) -> str:
    command = SERVERS[server].replace("0.0.0.0", "127.0.0.1").replace("8000", str(port))
    assert "--workers 4" in command
    return command.replace("--workers 4", f"--workers {workers}")


def _at_once(origin: str, ask: Callable[[httpx.AsyncClient], Any], times: int = 12) -> list[httpx.Response]:
    """So many requests, each by a connection of its own, so that both workers get some."""

    async def each() -> httpx.Response:
        async with httpx.AsyncClient(base_url=origin, headers=KEY) as client:
            answer: httpx.Response = await ask(client)
            return answer

    async def all_of_them() -> list[httpx.Response]:
        return await asyncio.gather(*(each() for _ in range(times)))

    return asyncio.run(all_of_them())


def _workers(spans: list[ExportedSpan]) -> set[str]:
    return {span.resource["service.instance.id"] for span in spans}


def _operation(sink: Sink, name: str) -> list[ExportedSpan]:
    return [span for span in sink.spans if span.attributes.get("replicate.operation") == name]


def _runs(sink: Sink) -> list[ExportedSpan]:
    return [span for span in sink.spans if span.attributes.get("gen_ai.operation.name") == "generate_content"]


def _until(condition: Callable[[], object], do: Callable[[], object] = lambda: time.sleep(0.05)) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        do()


@pytest.mark.timeout(120)  # four processes start, on whatever machine
def test_two_workers_tell_one_story(fake: FakeReplicate, sink: Sink, env: dict[str, str], folder: Path) -> None:
    port = free_port()
    with running(_command("uvicorn", port, workers=2), folder, port, env):
        origin = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{origin}/health").json() == {"up": True}
        once = {"idempotency-key": f"deployment-{port}"}
        made = _at_once(origin, lambda client: client.post("/v1/predictions", json=BODY, headers=once))
        [id] = {answer.json()["id"] for answer in made}

        def poll() -> list[httpx.Response]:
            return _at_once(origin, lambda client: client.get(f"/v1/predictions/{id}"))

        _until(lambda: len(_workers(_operation(sink, "predictions.get"))) == 2, poll)
        fake.clock.advance(60)
        assert {answer.json()["status"] for answer in poll()} == {"succeeded"}
        _until(lambda: _runs(sink))
    # It has stopped, and exported what there was.
    [run] = _runs(sink)
    creates = [one for one in _operation(sink, "predictions.create") if one.span_id == run.parent_id]
    assert len(creates) == 1
    assert run.attributes["replicate_proxy.lifecycle.origin"] == "store"
    assert run.attributes["replicate_proxy.lifecycle.polls"] > 1
    assert [request.operation for request in fake.requests].count("predictions.create") == 1


@pytest.mark.parametrize("server", ["hypercorn", "granian"])
def test_other_servers(fake: FakeReplicate, env: dict[str, str], folder: Path, server: str) -> None:
    port = free_port()
    with running(_command(server, port, workers=1), folder, port, env) as log:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            create(client)
        assert "Traceback" not in log.read_text()


def _options_of_uvicorn(words: list[str]) -> dict[str, Any]:
    assert words[0].endswith("uvicorn")
    return uvicorn.main.make_context("uvicorn", words[1:]).params


def test_what_is_stopped_is_given_time(fake: FakeReplicate) -> None:
    """The grace of each server covers a held create, and that of whoever stops it the server's."""
    [docker] = re.findall(r"^CMD (.*)$", DEPLOYMENT.block("dockerfile", "FROM "), re.MULTILINE)
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(DEPLOYMENT.block("ini", "[Service]"))
    kubernetes = yaml.safe_load(DEPLOYMENT.block("yaml", "kind: Deployment"))["spec"]["template"]["spec"]
    held = ProxyConfig().read_timeout
    for words in (json.loads(docker), unit["Service"]["ExecStart"].split(), SERVERS["uvicorn"].split()):
        options = _options_of_uvicorn(words)
        assert options["app"] == "app:app"
        assert options["timeout_graceful_shutdown"] >= held
    assert int(unit["Service"]["TimeoutStopSec"]) == kubernetes["terminationGracePeriodSeconds"] == GRACE
    [container] = kubernetes["containers"]
    [_, before] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert held + 10 + 5 + int(before) <= GRACE
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": 8000}
    for server in ("hypercorn", "gunicorn"):
        assert f"--graceful-timeout {held:.0f}" in SERVERS[server]


def test_the_image_gets_what_the_app_imports() -> None:
    lines = DEPLOYMENT.block("dockerfile", "FROM ").splitlines()
    assert {line.split()[0] for line in lines} == {"FROM", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert lines[-1].startswith("CMD ")
    [extras] = re.findall(r"\.whl\[([a-z,]+)\]", "\n".join(lines))
    assert {*extras.split(",")} == {"redis", "limits", "otlp"}


def test_open_files() -> None:
    default = ProxyConfig()
    assert f"{default.max_in_flight + default.max_connections + default.max_streams:,}" in DEPLOYMENT.text
    config = execute(DEPLOYMENT.block("python", "max_in_flight=500"))["config"]
    assert config.max_in_flight + config.max_connections + config.max_streams <= 1024 - 100


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert DEPLOYMENT.count("python") == 2
    assert [DEPLOYMENT.count(name) for name in ("sh", "dockerfile", "ini", "yaml")] == [1, 1, 1, 1]
    assert len(DEPLOYMENT.code) == 6
    assert {*SERVERS} == {"uvicorn", "hypercorn", "granian", "gunicorn"}
    assert DEPLOYMENT.missing_links() == []
