"""What holds for every store of creates and results, and that they tell the same story."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from replicate_proxy_mw.store.once import EarlierResult, KeyedCreate, MemoryOnceStore, OnceStore
from replicate_proxy_mw.store.once_redis import RedisOnceStore
from replicate_proxy_mw.testing import ManualClock
from tests.services import RedisServer

pytestmark = pytest.mark.anyio

ONE = KeyedCreate(mark="1" * 32, fingerprint="f" * 64, left=180.0)
OTHER = KeyedCreate(mark="2" * 32, fingerprint="e" * 64, left=180.0)
DONE = replace(ONE, left=0, status=201, id="p1-_")
LONG = 1000.0


@pytest.fixture(params=["memory-asyncio", "memory-trio", "redis-asyncio", "redis-asyncio-decoded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return kind.split("-")[1]


@pytest.fixture
async def stores(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[list[OnceStore]]:
    """As two hosts have it that share it, by clients of their own."""
    if kind.startswith("memory"):
        yield [MemoryOnceStore()] * 2
        return
    server: RedisServer = request.getfixturevalue("redis_service")
    options, prefix = {"decode_responses": kind.endswith("decoded")}, f"{uuid.uuid4()}:"
    async with Redis.from_url(server.url, **options) as one, Redis.from_url(server.url, **options) as other:
        yield [RedisOnceStore(redis, prefix=prefix) for redis in (one, other)]


@pytest.fixture
def store(stores: list[OnceStore]) -> OnceStore:
    return stores[0]


async def begun(store: OnceStore, key: str, create: KeyedCreate) -> KeyedCreate | None:
    """As `begin` has it, but for the fractions of a second that have gone by."""
    known = await store.begin(key, create, LONG)
    return None if known is None else replace(known, left=float(math.ceil(known.left)))


async def test_the_first_begins_and_all_others_are_told_of_it(stores: list[OnceStore]) -> None:
    one, other = stores
    assert await begun(one, "a", ONE) is None
    assert await begun(other, "a", OTHER) == ONE
    assert await begun(other, "b", OTHER) is None
    assert await begun(one, "a", ONE) is None, "a command that a client sends again must not shut itself out"


@pytest.mark.parametrize("ended", [DONE, replace(ONE, left=0), replace(DONE, status=202, id="x" * 64)])
async def test_what_came_of_it_is_told(stores: list[OnceStore], ended: KeyedCreate) -> None:
    one, other = stores
    await one.begin("a", ONE, LONG)
    await one.end("a", ended, LONG)
    assert await begun(other, "a", OTHER) == ended


async def test_what_has_made_nothing_is_forgotten(stores: list[OnceStore]) -> None:
    one, other = stores
    await one.begin("a", ONE, LONG)
    await one.forget("a", ONE.mark)
    assert await begun(other, "a", OTHER) is None
    assert await begun(one, "a", ONE) == OTHER


async def test_only_whose_it_is_ends_or_forgets_it(stores: list[OnceStore]) -> None:
    one, other = stores
    await one.begin("a", ONE, LONG)
    await other.end("a", replace(DONE, mark=OTHER.mark), LONG)
    await other.forget("a", OTHER.mark)
    assert await begun(other, "a", OTHER) == ONE


async def test_what_came_of_a_create_is_kept_though_the_store_has_lost_it(store: OnceStore) -> None:
    await store.end("a", DONE, LONG)
    assert await begun(store, "a", OTHER) == DONE
    await store.forget("b", ONE.mark)
    assert await begun(store, "b", OTHER) is None


async def test_a_create_is_lost_when_nothing_is_left_and_forgotten_after_its_lifetime(store: OnceStore) -> None:
    await store.begin("a", replace(ONE, left=0.01), LONG)
    await store.begin("b", ONE, 0.01)
    await store.end("c", DONE, 0.01)
    await anyio.sleep(0.05)
    known = await store.begin("a", OTHER, LONG)
    assert known is not None
    assert known.left <= 0
    for key in "bc":
        assert await store.begin(key, OTHER, LONG) is None


async def test_the_latest_result_is_told_with_its_age(stores: list[OnceStore]) -> None:
    one, other = stores
    assert await one.result("a") is None
    for id in ("p1", "p2"):
        await one.put_result("a", id, LONG)
        await anyio.sleep(0.02)
    known = await other.result("a")
    assert known is not None
    assert known.id == "p2"
    assert 0.01 < known.age < 10


async def test_a_result_is_forgotten_after_its_lifetime(store: OnceStore) -> None:
    await store.put_result("a", "p1", LONG)
    await store.put_result("a", "p2", 0.01)
    await anyio.sleep(0.05)
    assert await store.result("a") is None


async def test_a_create_and_a_result_of_one_key_are_two_things(store: OnceStore) -> None:
    await store.begin("a", ONE, LONG)
    assert await store.result("a") is None
    await store.put_result("a", "p1", LONG)
    assert await begun(store, "a", OTHER) == ONE


STEP = st.tuples(
    st.sampled_from(["begin", "end", "unknown", "forget", "put", "result"]),
    st.sampled_from("ab"),
    st.sampled_from("12"),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=st.lists(STEP, max_size=12))
async def test_all_stores_tell_the_story_of_a_dictionary(stores: list[OnceStore], steps: list[Any]) -> None:
    story = uuid.uuid4().hex
    creates: dict[str, KeyedCreate] = {}
    results: dict[str, str] = {}
    for number, (what, name, mark) in enumerate(steps):
        store, key, create = stores[number % 2], story + name, replace(ONE, mark=mark)
        known = creates.get(key)
        is_own = known is None or known.mark == mark
        if what == "begin":
            assert await begun(store, key, create) == (None if is_own else known)
            creates.setdefault(key, create)
        elif what in ("end", "unknown"):
            ended = replace(create, left=0, status=201, id=f"p{mark}") if what == "end" else replace(create, left=0)
            await store.end(key, ended, LONG)
            if is_own:
                creates[key] = ended
        elif what == "forget":
            await store.forget(key, mark)
            if is_own:
                creates.pop(key, None)
        elif what == "put":
            await store.put_result(key, f"p{mark}", LONG)
            results[key] = f"p{mark}"
        else:
            result = await store.result(key)
            assert (None if result is None else result.id) == results.get(key)
    for key, create in creates.items():
        assert await begun(stores[0], key, replace(ONE, mark="3")) == create


# --- memory, by its own clock


async def forgetful(**options: Any) -> tuple[MemoryOnceStore, ManualClock]:
    clock = ManualClock()
    return MemoryOnceStore(now=clock.now, **options), clock


@pytest.mark.parametrize("kind", ["memory-asyncio", "memory-trio"])
async def test_in_memory_time_goes_by() -> None:
    store, clock = await forgetful()
    await store.begin("a", ONE, 200)
    await store.put_result("a", "p1", 100)
    clock.advance(60)
    assert await store.begin("a", OTHER, 200) == replace(ONE, left=120)
    assert await store.result("a") == EarlierResult("p1", 60)
    clock.advance(39)
    assert len(store) == 2
    clock.advance(1)
    assert await store.result("a") is None
    assert len(store) == 1
    clock.advance(99)
    known = await store.begin("a", OTHER, 200)
    assert known == replace(ONE, left=-19)
    clock.advance(1)
    assert await store.begin("a", OTHER, 200) is None
    assert store.evicted == 0


@pytest.mark.parametrize("kind", ["memory-asyncio", "memory-trio"])
async def test_in_memory_the_oldest_is_forgotten_for_one_more() -> None:
    store, clock = await forgetful(max_entries=2)
    for key in "abc":
        await store.begin(key, ONE, 100)
        await store.put_result(key, "p1", 50)
        await store.end(key, DONE, 100)
    assert len(store) == 4
    assert store.evicted == 2
    assert await store.result("a") is None
    assert await store.result("c") == EarlierResult("p1", 0)
    clock.advance(50)
    await store.put_result("d", "p1", 50)
    assert store.evicted == 2, "what is over makes room"


@pytest.mark.parametrize("kind", ["memory-asyncio"])
async def test_memory_has_room_for_something() -> None:
    with pytest.raises(ValueError, match="max_entries: "):
        MemoryOnceStore(max_entries=0)
