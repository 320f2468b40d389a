from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from replicate_proxy_mw.testing import FakeReplicate
from replicate_proxy_mw.testing.pytest_plugin import fake_replicate, fake_replicate_options

__all__ = ["client", "fake_replicate", "fake_replicate_options"]


@pytest.fixture
def client(fake_replicate: FakeReplicate) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {fake_replicate.token}"}
    with httpx.Client(base_url=fake_replicate.url, headers=headers, verify=False) as client:  # nothing to load
        yield client
