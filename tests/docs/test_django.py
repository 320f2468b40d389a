"""docs/django.md is run as it stands there: a project that Django makes, a real server, and a fake Replicate."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from replicate_proxy_mw.testing import FakeReplicate
from tests.docs.hosts import KEY, create, with_upstream
from tests.docs.programs import environment, free_port, running, shell
from tests.documents import Page

DJANGO = Page("docs/django.md")
VIEW = """
import threading
from django.http import HttpResponse
from django.urls import path


def home(request):
    return HttpResponse(f"a synchronous view, in {threading.current_thread().name}")


urlpatterns = [path("", home)]
"""
SETTINGS = """
INSTALLED_APPS += ["keys"]
LOGGING_CONFIG = None
"""


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        yield fake


@pytest.fixture(scope="module")
def env(fake: FakeReplicate) -> dict[str, str]:
    return environment(REPLICATE_API_TOKEN=fake.token, REPLICATE_PROXY_KEYS="team-a=pk-team-a")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, fake: FakeReplicate, env: dict[str, str]) -> Path:
    """A project with the page's files in it."""
    folder = tmp_path_factory.mktemp("django")
    shell("django-admin startproject mysite .", folder, env)
    shell(DJANGO.block("sh", "startapp"), folder, env)
    for language, code in DJANGO.code:
        if language == "python":
            folder.joinpath(code.splitlines()[0].removeprefix("# ")).write_text(_served(code, fake))
    folder.joinpath("mysite/urls.py").write_text(VIEW)
    with folder.joinpath("mysite/settings.py").open("a") as settings:
        settings.write(SETTINGS)
    shell(DJANGO.block("sh", "migrate"), folder, env)
    return folder


def _served(code: str, fake: FakeReplicate) -> str:
    return with_upstream(code, fake) if "ReplicateProxyMiddleware(" in code else code


def _command(port: int) -> str:
    return DJANGO.block("sh", "uvicorn ").replace("8000", str(port))


def test_a_project_with_the_proxy(site: Path, env: dict[str, str], fake: FakeReplicate) -> None:
    port = free_port()
    with running(_command(port), site, port, env) as log:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            home = client.get("/")
            assert home.text.startswith("a synchronous view, in ThreadPoolExecutor")
            assert home.headers["x-frame-options"] == "DENY"
            create(client)
            assert "x-frame-options" not in client.get("/v1/hardware", headers=KEY).headers
            assert client.get("/v1/account", headers={"x-portkey-api-key": "pk-stranger"}).status_code == 401
            assert client.get("/nothing").status_code == 404
        said = log.read_text()
    assert "Application startup complete" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("server", ["uvicorn --port {port}", "hypercorn -b 127.0.0.1:{port}"])
def test_servers_go_on_without_a_lifespan(site: Path, env: dict[str, str], fake: FakeReplicate, server: str) -> None:
    code = site.joinpath("mysite/asgi.py").read_text()
    site.joinpath("mysite/direct.py").write_text(
        code.replace("ReplicateProxyMiddleware(host,", "ReplicateProxyMiddleware(django,")
    )
    port = free_port()
    program, _, options = server.format(port=port).partition(" ")
    with running(f"{program} mysite.direct:application {options}", site, port, env) as log:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/").status_code == 200
            create(client)
        said = log.read_text()
    assert ("ASGI Framework Lifespan error, continuing without Lifespan support" in said) == (program == "hypercorn")


def test_keys_in_a_model(site: Path, env: dict[str, str], fake: FakeReplicate) -> None:
    key = shell(DJANGO.block("sh", "token_urlsafe"), site, env).strip()
    assert key.startswith("pk-")
    assert key.encode() not in site.joinpath("db.sqlite3").read_bytes()
    code = site.joinpath("mysite/asgi.py").read_text()
    [imported] = [line for line in DJANGO.text.split("`") if line == "from keys.resolver import key_resolver"]
    assert "ReplicateProxyMiddleware(host, key_resolver=key_resolver)" in DJANGO.text
    code = code.replace("# What follows is new.", imported).replace("EnvKeyResolver()", "key_resolver")
    site.joinpath("mysite/by_model.py").write_text(code)
    port = free_port()
    with (
        running(_command(port).replace("mysite.asgi", "mysite.by_model"), site, port, env),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        create(client, **{"x-portkey-api-key": key})
        assert client.get("/v1/account", headers=KEY).status_code == 401
    with sqlite3.connect(site / "db.sqlite3") as database:
        assert database.execute("SELECT team FROM keys_proxykey").fetchall() == [("design",)]


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert (DJANGO.count("python"), DJANGO.count("sh"), len(DJANGO.code)) == (3, 4, 7)
    assert DJANGO.missing_links() == []
