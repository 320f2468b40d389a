"""docs/index.md: its app is run as it stands there, and it leads to every page."""

from __future__ import annotations

import re

import httpx
import pytest

from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import app_of, create
from tests.documents import ROOT, Page

INDEX = Page("docs/index.md")


def test_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    [keys] = re.findall(r"`REPLICATE_PROXY_KEYS` \(`(.*)`\)", INDEX.text)
    with FakeReplicate().serve() as fake:
        monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
        monkeypatch.setenv("REPLICATE_PROXY_KEYS", keys)
        app = app_of(INDEX.block("python", "EnvKeyResolver()"), fake)
        with serve(app) as served, httpx.Client(base_url=served.url) as client:
            create(client)
            assert client.get("/v1/account", headers={"x-portkey-api-key": "pk-team-b"}).status_code == 200
            assert client.get("/elsewhere").json() == {"detail": "Not Found"}


@pytest.mark.parametrize(("page", "folder"), [("docs/index.md", ""), ("README.md", "docs/")])
def test_every_page_is_reached(page: str, folder: str) -> None:
    reached = set(re.findall(r"\]\((\S+?\.md)(?:#\S+)?\)", Page(page).text))
    pages = {f"{folder}{path.name}" for path in ROOT.joinpath("docs").glob("*.md")}
    assert pages - reached <= {f"{folder}index.md"}


def test_pictures_and_links_are_there() -> None:
    pictures = re.findall(r'(?:src|srcset)="(\S+)"', INDEX.text)
    assert len(pictures) == 2
    assert all(ROOT.joinpath("docs", picture).exists() for picture in pictures)
    assert INDEX.missing_links() == []
    assert INDEX.count("python") == len(INDEX.code) == 1
