"""docs/litestar.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

import httpx
import pytest
from litestar import Litestar
from litestar.exceptions import ImproperlyConfiguredException
from litestar.middleware import DefineMiddleware
from litestar.testing import TestClient

from replicate_proxy_mw import EnvKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import KEY, app_of, create
from tests.documents import Page, execute

LITESTAR = Page("docs/litestar.md")


def test_an_app_with_the_plugin(fake: FakeReplicate) -> None:
    app = app_of(LITESTAR.block("python", '"my own app"'), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/").text == "my own app"
        assert client.get("/v1/status").json() == {"up": True}
        create(client)
    assert [request.operation for request in fake.requests] == ["predictions.create", "predictions.get"]


def test_a_route_that_would_lose_its_requests_is_refused() -> None:
    code = LITESTAR.block("python", '"my own app"').replace('"/v1/status"', '"/v1beta"')
    with pytest.raises(ImproperlyConfiguredException, match="/v1beta"):
        execute(code.replace("EnvKeyResolver()", "None"))


def test_the_middleware_gets_nothing_where_the_page_says_so(fake: FakeReplicate) -> None:
    config = ProxyConfig(upstream=fake.url)
    listed = DefineMiddleware(ReplicateProxyMiddleware, key_resolver=EnvKeyResolver(), config=config)
    with TestClient(Litestar(middleware=[listed])) as client:
        assert client.get("/v1/hardware", headers=KEY).status_code == 404
    assert fake.requests == []


def test_guards_and_cors(fake: FakeReplicate) -> None:
    code = LITESTAR.block("python", "inside_only")
    with serve(app_of(code, fake)) as served, httpx.Client(base_url=served.url) as client:
        create(client)
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        assert client.options("/v1/predictions", headers=asked).status_code == 204
        answer = client.get("/v1/hardware", headers=KEY | {"origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    with serve(app_of(code.replace('"127."', '"192."'), fake)) as served:
        sent = len(fake.requests)
        refused = httpx.get(f"{served.url}/v1/hardware", headers=KEY)
        assert (refused.status_code, refused.json()["detail"]) == (403, "Only from within.")
        assert len(fake.requests) == sent


def test_a_resolver_of_the_app(fake: FakeReplicate) -> None:
    app = app_of(LITESTAR.block("python", "app.state.teams"), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        create(client)
        assert client.get("/v1/account", headers={"x-portkey-api-key": "pk-stranger"}).status_code == 401


def test_around_the_app(fake: FakeReplicate) -> None:
    app = app_of(LITESTAR.block("python", "Litestar([status])"), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/v1/status").json() == {"up": True}
        create(client)


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert LITESTAR.count("python") == len(LITESTAR.code) == 4
    assert LITESTAR.missing_links() == []
