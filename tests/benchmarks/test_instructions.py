"""The way of a request may not grow unseen: its instructions, by those of other work in the same interpreter."""

from __future__ import annotations

import sys

import pytest

from benchmarks.instructions import NULL, REFERENCE, counted
from tests.clients.drivers import require

# What was counted with each Python, times the reference; two counts of the same differed by 0.04 % at most.
MEASURED = {
    (3, 11): {"create": 1.38, "poll": 1.39},
    (3, 13): {"create": 1.56, "poll": 1.58},
}
HEAD_ROOM = 1.15


@pytest.mark.timeout(300)
def test_an_exchange_takes_as_few_instructions_as_it_did() -> None:
    require("valgrind")
    require("setarch")
    kinds = {exchange: f"{exchange}/{NULL}" for exchange in ("create", "poll")}
    figures = counted([*kinds.values(), REFERENCE])
    taken = {exchange: figures[kind] / figures[REFERENCE] for exchange, kind in kinds.items()}
    measured = MEASURED.get(sys.version_info[:2], MEASURED[max(MEASURED)])
    assert all(taken[exchange] <= measured[exchange] * HEAD_ROOM for exchange in kinds), taken
