from __future__ import annotations

from collections.abc import Iterator

import pytest

from replicate_proxy_mw.testing import FakeReplicate


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReplicate]:
    """The Replicate of a page's app, whose `EnvKeyResolver` knows its token and one caller."""
    with FakeReplicate().serve() as fake:
        monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
        monkeypatch.setenv("REPLICATE_PROXY_KEYS", "team-a=pk-team-a")
        yield fake
