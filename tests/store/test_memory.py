from __future__ import annotations

import math
from dataclasses import replace

import pytest

from replicate_proxy_mw.store import MemoryPredictionStore, StoredPrediction
from replicate_proxy_mw.testing import ManualClock

pytestmark = pytest.mark.anyio

MINE = StoredPrediction(tenant="team-a")


async def test_an_entry_is_forgotten_at_its_age() -> None:
    clock = ManualClock()
    store = MemoryPredictionStore(max_age=10, now=clock.now)
    await store.put("a", MINE)
    clock.advance(6)
    await store.put("b", MINE)
    clock.advance(3.9)
    assert list(await store.get(["a", "b"])) == ["a", "b"]
    clock.advance(0.1)
    assert list(await store.get(["a", "b"])) == ["b"]
    clock.advance(5.9)
    assert len(store) == 1
    clock.advance(0.1)
    assert len(store) == 0
    assert store.evicted == 0


async def test_an_entry_grows_no_younger_by_use() -> None:
    clock = ManualClock()
    store = MemoryPredictionStore(max_age=10, now=clock.now)
    await store.put("a", MINE)
    clock.advance(9)
    await store.put("a", MINE)
    await store.put("a", replace(MINE, details="{}"))
    await store.read("a", "processing")
    assert await store.claim("a") == replace(MINE, details="{}", reads=1, status="processing")
    clock.advance(1)
    assert await store.get(["a"]) == {}
    await store.put("a", MINE)
    assert await store.claim("a") == MINE


async def test_what_is_too_old_can_be_neither_claimed_nor_read() -> None:
    clock = ManualClock()
    store = MemoryPredictionStore(max_age=10, now=clock.now)
    await store.put("a", MINE)
    clock.advance(10)
    assert await store.read("a", "processing") is None
    assert await store.claim("a") is None


async def test_the_oldest_is_forgotten_for_one_more() -> None:
    store = MemoryPredictionStore(max_entries=2)
    for id in "abc":
        await store.put(id, MINE)
        await store.read("a", "processing")
    assert list(await store.get(["a", "b", "c"])) == ["b", "c"]
    assert store.evicted == 1
    await store.put("b", MINE)
    assert (len(store), store.evicted) == (2, 1)


async def test_what_was_forgotten_for_its_age_makes_room() -> None:
    clock = ManualClock()
    store = MemoryPredictionStore(max_entries=1, max_age=10, now=clock.now)
    await store.put("a", MINE)
    clock.advance(10)
    await store.put("b", MINE)
    assert (len(store), store.evicted) == (1, 0)


async def test_by_default_entries_live_for_a_week() -> None:
    clock = ManualClock()
    store = MemoryPredictionStore(now=clock.now)
    await store.put("a", MINE)
    clock.advance(7 * 86400 - 1)
    assert len(store) == 1
    clock.advance(1)
    assert len(store) == 0


@pytest.mark.parametrize("max_age", [0, -1, math.nan])
def test_an_age_has_to_be_one(max_age: float) -> None:
    with pytest.raises(ValueError, match="max_age: "):
        MemoryPredictionStore(max_age=max_age)


@pytest.mark.parametrize("max_entries", [0, -1])
def test_there_has_to_be_room_for_one(max_entries: int) -> None:
    with pytest.raises(ValueError, match="max_entries: "):
        MemoryPredictionStore(max_entries=max_entries)
