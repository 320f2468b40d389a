"""docs/quart.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import KEY, app_of, create, with_upstream
from tests.docs.programs import environment, free_port, running
from tests.documents import Page

QUART = Page("docs/quart.md")


@pytest.mark.parametrize(
    "command", ["hypercorn --graceful-timeout 75 -b 127.0.0.1:{port} app:app", "quart run -p {port}"]
)
def test_its_servers_have_the_proxy(fake: FakeReplicate, tmp_path: Path, command: str) -> None:
    tmp_path.joinpath("app.py").write_text(with_upstream(QUART.block("python", '"my own app"'), fake))
    port = free_port()
    with running(command.format(port=port), tmp_path, port, environment()) as log:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/").text == "my own app"
            create(client)
        assert "Traceback" not in log.read_text()


def test_its_test_client_has_the_proxy(fake: FakeReplicate) -> None:
    app = app_of(QUART.block("python", '"my own app"'), fake)
    ran: list[str] = []
    app.before_request(lambda: ran.append("before_request"))

    async def ask() -> list[int]:
        async with app.test_app():
            client = app.test_client()
            return [(await client.get(path, headers=KEY)).status_code for path in ("/v1/hardware", "/v1/account")]

    assert asyncio.run(ask()) == [200, 200]
    assert ran == []


def test_its_lifespan_goes_on(fake: FakeReplicate) -> None:
    app = app_of(QUART.block("python", '"my own app"'), fake)
    ran: list[str] = []
    app.before_serving(lambda: ran.append("before"))
    app.after_serving(lambda: ran.append("after"))
    with serve(app) as served:
        assert httpx.get(f"{served.url}/v1/hardware", headers=KEY).status_code == 200
        assert ran == ["before"]
    assert ran == ["before", "after"]


def test_a_resolver_of_the_app(fake: FakeReplicate) -> None:
    app = app_of(QUART.block("python", "before_serving"), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        create(client)
        assert client.get("/v1/account", headers={"x-portkey-api-key": "pk-stranger"}).status_code == 401


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert QUART.count("python") == len(QUART.code) == 2
    assert QUART.missing_links() == []
