"""A pytest plugin. Load it with ``pytest_plugins = ["replicate_proxy_mw.testing.pytest_plugin"]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .replicate import FakeReplicate


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    """The keywords of `FakeReplicate` for the fixture `fake_replicate`; override it to change them."""
    return {}


@pytest.fixture
def fake_replicate(fake_replicate_options: dict[str, Any]) -> Iterator[FakeReplicate]:
    """A `FakeReplicate` of its own for each test, served on loopback ports: see its `url`, `token` and the rest.

    Fails the test at its end if a request brought headers that no proxy may pass on, unless the test took note of
    them and emptied `violations`.
    """
    with FakeReplicate(**fake_replicate_options).serve() as fake:
        yield fake
    assert fake.violations == [], f"headers that must not reach Replicate: {fake.violations}"
