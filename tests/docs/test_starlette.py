"""docs/starlette.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

import httpx

from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import app_of, create
from tests.documents import Page

STARLETTE = Page("docs/starlette.md")


def test_an_app_with_the_proxy(fake: FakeReplicate) -> None:
    app = app_of(STARLETTE.block("python", "middleware=[Middleware("), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/").text == "my own app"
        create(client)
    assert [request.operation for request in fake.requests] == ["predictions.create", "predictions.get"]


def test_under_a_path_of_its_own(fake: FakeReplicate) -> None:
    app = app_of(STARLETTE.block("python", "Mount("), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        create(client, "/replicate/v1")
        assert [client.get(path).status_code for path in ("/replicate/other", "/v1/predictions")] == [404, 404]


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert STARLETTE.count("python") == len(STARLETTE.code) == 2
    assert STARLETTE.missing_links() == []
