from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.security.generated import Judge, judges


@pytest.fixture(scope="module")
def all_judges() -> Iterator[tuple[asyncio.Runner, list[Judge]]]:
    with asyncio.Runner() as runner, judges() as found:
        yield runner, found
        for judge in found:
            runner.run(judge.app.aclose())
