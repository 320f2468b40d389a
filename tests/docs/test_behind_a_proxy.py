"""docs/behind-a-proxy.md is run as it stands there: a real nginx, a real uvicorn, a fake Replicate."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from replicate_proxy_mw import ProxyConfig
from replicate_proxy_mw.testing import FakeReplicate, ManualClock
from tests.docs.hosts import BODY, KEY
from tests.docs.programs import environment, free_port, running
from tests.documents import Page, execute

BEHIND = Page("docs/behind-a-proxy.md")
LLAMA = "/v1/models/meta/meta-llama-3-8b-instruct/predictions"
HOST = {"host": "app.example"}
APP = """
from fastapi import FastAPI
from replicate_proxy_mw import EnvKeyResolver, ProxyConfig, ReplicateProxyMiddleware

app = FastAPI()
config = ProxyConfig(upstream={upstream!r}, proxy_streams=True, stream_key="k" * 32, stream_hosts=[{streams!r}])
app.add_middleware(ReplicateProxyMiddleware, key_resolver=EnvKeyResolver(), config=config)


@app.get("/")
def home() -> str:
    return "my own app"
"""
AROUND = """
daemon off;
{user}
pid nginx.pid;
error_log stderr;
worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{site}
}}
"""


@dataclass
class Site:
    """nginx in front of an app, in front of a Replicate whose time stands still."""

    port: int
    app_port: int
    folder: Path
    fake: FakeReplicate

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers={**KEY, **HOST, **headers}, timeout=20)

    @property
    def log(self) -> list[str]:
        return self.folder.joinpath("replicate.log").read_text().splitlines()


@pytest.fixture(scope="module")
def nginx() -> str:
    binary = shutil.which("nginx")
    if binary is None:
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail("nginx is not installed")
        pytest.skip("nginx is not installed")
    return binary


@pytest.fixture(scope="module")
def site(nginx: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, port, inner = tmp_path_factory.mktemp("nginx"), free_port(), free_port()
    written = BEHIND.block("nginx", "server {").replace("127.0.0.1:8000", f"127.0.0.1:{inner}")
    written = written.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("/var/log/nginx", str(folder))
    user = "user root;" if os.geteuid() == 0 else ""
    folder.joinpath("nginx.conf").write_text(AROUND.format(user=user, site=written))
    command = [nginx, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with FakeReplicate(clock=ManualClock(), queue_time=0.0, run_time=2.0).serve() as fake:
        streams = httpx.URL(fake.streams_url).netloc.decode()
        folder.joinpath("app.py").write_text(APP.format(upstream=fake.url, streams=streams))
        env = environment(REPLICATE_API_TOKEN=fake.token, REPLICATE_PROXY_KEYS="team-a=pk-team-a")
        uvicorn = BEHIND.block("sh", "uvicorn").replace("8000", str(inner))
        with running(uvicorn, folder, inner, env), running(" ".join(command), folder, port):
            yield Site(port, inner, folder, fake)


def test_a_stream_is_not_collected(site: Site) -> None:
    with site.client() as client:
        made = client.post(LLAMA, json={"input": {"prompt": "one two three four five six"}}).json()
        url = made["urls"]["stream"].removeprefix("http://app.example")
        assert url.startswith("/v1/-/streams/")
        site.fake.clock.advance(1)  # half of it has come
        with client.stream("GET", f"http://127.0.0.1:{site.app_port}{url}") as stream:
            assert stream.headers["x-accel-buffering"] == "no"  # for nginx, which keeps it for itself
        with client.stream("GET", url) as stream:
            assert "x-accel-buffering" not in stream.headers
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("data:")) == "data: You"
            assert client.get(f"/v1/predictions/{made['id']}").json()["status"] == "processing"
            site.fake.clock.advance(5)
            assert "event: done" in list(lines)


def test_a_create_is_held(site: Site) -> None:
    def run() -> None:
        """Let it end, once Replicate holds it."""
        before = len(site.fake.requests)
        while len(site.fake.requests) == before:
            time.sleep(0.01)
        time.sleep(0.2)
        site.fake.clock.advance(60)

    thread = threading.Thread(target=run)
    thread.start()
    with site.client() as client:
        made = client.post("/v1/predictions", json=BODY, headers={"prefer": "wait"})
    thread.join()
    assert (made.status_code, made.json()["output"]) == (201, "hello Alice")


def test_large_bodies_come_through(site: Site) -> None:
    with site.client() as client:
        made = client.post("/v1/files", files={"content": ("large.bin", b"x" * (2 << 20), "application/octet-stream")})
    assert (made.status_code, made.json()["size"]) == (201, 2 << 20)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_links_lead_to_where_the_caller_is(site: Site, scheme: str) -> None:
    """nginx tells its own scheme; uvicorn believes it, since it comes from 127.0.0.1."""
    assert "proxy_set_header X-Forwarded-Proto $scheme;" in BEHIND.block("nginx", "server {")
    with site.client() as client:
        if scheme == "http":
            assert client.get("/").json() == "my own app"
        else:
            client.base_url = f"http://127.0.0.1:{site.app_port}"
            client.headers["x-forwarded-proto"] = "https"
        made = client.post("/v1/predictions", json=BODY).json()
    assert made["urls"]["get"] == f"{scheme}://app.example/v1/predictions/{made['id']}"


def test_the_public_url_needs_no_header(site: Site) -> None:
    assert execute(BEHIND.block("python", "public_url="))["config"].public_url == "https://app.example/v1"


def test_a_request_has_one_id_everywhere(site: Site) -> None:
    with site.client() as client:
        ids = [
            client.get("/v1/hardware", headers=said).headers["x-portkey-trace-id"]
            for said in ({}, {"x-portkey-trace-id": "order-1"})
        ]
        refused = client.get("/v1/hardware", headers={"x-portkey-api-key": "pk-stranger"})
        assert "x-portkey-trace-id" not in client.get("/").headers
    assert re.fullmatch("[0-9a-f]{32}", ids[0])
    assert ids[1] == "order-1"
    logged = [line.split() for line in site.log]
    for id, status in ((ids[0], "200"), (ids[1], "200"), (refused.headers["x-portkey-trace-id"], "401")):
        assert [(line[1], line[2]) for line in logged if line[-1] == id] == [("GET", status)]


def test_streams_are_in_no_log(site: Site) -> None:
    with site.client() as client:
        assert client.get("/v1/-/streams/unknown").status_code == 404
    assert "404" not in [line.split()[2] for line in site.log]


def test_times_in_front_are_longer_than_the_proxy_s() -> None:
    default, written = ProxyConfig(), BEHIND.block("nginx", "server {")
    held, streamed = (float(seconds) for seconds in re.findall(r"proxy_read_timeout (\d+)s;", written))
    before = default.resolver_timeout + default.store_timeout + default.connection_wait + default.connect_timeout
    assert held > before + default.read_timeout
    assert streamed > default.stream_timeout + before
    for seconds in (before + default.read_timeout, held, default.stream_timeout, streamed):
        assert f" {seconds:.0f} s" in BEHIND.text
    for option in re.findall(r"`(\w+)` (\d+) s", BEHIND.text):
        assert getattr(default, option[0]) == float(option[1])


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert [BEHIND.count(name) for name in ("nginx", "sh", "python")] == [1, 1, 1]
    assert len(BEHIND.code) == 3
    assert BEHIND.missing_links() == []
