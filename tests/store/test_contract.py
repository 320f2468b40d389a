"""What holds for every store, and that they tell the same story."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from replicate_proxy_mw.store import MemoryPredictionStore, PredictionStore, StoredPrediction
from replicate_proxy_mw.store.redis import RedisPredictionStore
from tests.services import RedisServer

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MINE = StoredPrediction(tenant="team-a", traceparent=TRACEPARENT)
OTHERS = StoredPrediction(tenant="team-b")


@pytest.fixture(params=["memory-asyncio", "memory-trio", "redis-asyncio", "redis-asyncio-decoded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return kind.split("-")[1]


@pytest.fixture
async def store(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[PredictionStore]:
    if kind.startswith("memory"):
        yield MemoryPredictionStore()
        return
    server: RedisServer = request.getfixturevalue("redis_service")
    async with Redis.from_url(server.url, decode_responses=kind.endswith("decoded")) as redis:
        yield RedisPredictionStore(redis, prefix=f"{uuid.uuid4()}:")


async def test_what_was_put_is_known(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.put("b", OTHERS)
    assert await store.get(["a", "b", "c"]) == {"a": MINE, "b": OTHERS}
    assert await store.get({"b"}) == {"b": OTHERS}
    assert await store.get([]) == {}


@pytest.mark.parametrize(
    "prediction",
    [
        StoredPrediction(tenant=None),
        StoredPrediction(tenant="", traceparent=""),
        StoredPrediction(tenant="None", traceparent="null"),
        StoredPrediction(tenant="Büro 🐈\x00\n\"'", traceparent=TRACEPARENT),
        StoredPrediction(tenant="\udcff"),
        StoredPrediction(tenant="t" * 10_000, reads=7, reported=True),
    ],
    ids=repr,
)
async def test_every_value_comes_back_as_it_was(store: PredictionStore, prediction: StoredPrediction) -> None:
    await store.put("a", prediction)
    assert await store.get(["a"]) == {"a": prediction}


async def test_an_id_may_be_any_text(store: PredictionStore) -> None:
    ids = ["", "a", "A", "a:b", "ü", "🐈", "\udcff", "a\r\nDEL a", "x" * 10_000]
    for id in ids[1:]:
        await store.put(id, replace(MINE, tenant=id))
    assert await store.get(ids) == {id: replace(MINE, tenant=id) for id in ids[1:]}


async def test_what_is_known_stays_as_it_is(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.get(["a"], read=True)
    await store.claim("a")
    for again in (MINE, OTHERS, replace(MINE, reads=9)):
        await store.put("a", again)
        assert await store.get(["a"]) == {"a": replace(MINE, reads=1, reported=True)}
    await store.put("b", OTHERS)
    await store.put("b", MINE)
    assert await store.get(["b"]) == {"b": OTHERS}


async def test_reads_are_counted_where_asked_for(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.put("b", OTHERS)
    assert await store.get(["a"], read=True) == {"a": replace(MINE, reads=1)}
    assert await store.get(["a", "b", "a"], read=True) == {"a": replace(MINE, reads=2), "b": replace(OTHERS, reads=1)}
    assert await store.get(["a", "b"]) == {"a": replace(MINE, reads=2), "b": replace(OTHERS, reads=1)}


async def test_an_unknown_id_is_not_made_known_by_asking(store: PredictionStore) -> None:
    assert await store.get(["a"], read=True) == {}
    assert await store.claim("a") is None
    assert await store.get(["a"]) == {}
    await store.put("a", MINE)
    assert await store.get(["a"]) == {"a": MINE}
    assert await store.claim("a") == MINE


async def test_an_end_is_claimed_once(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.get(["a"], read=True)
    assert await store.claim("a") == replace(MINE, reads=1)
    assert await store.claim("a") is None
    assert await store.get(["a"]) == {"a": replace(MINE, reads=1, reported=True)}


async def test_what_was_put_as_reported_cannot_be_claimed(store: PredictionStore) -> None:
    await store.put("a", replace(MINE, reported=True))
    assert await store.claim("a") is None


async def test_of_many_at_once_each_gets_its_share(store: PredictionStore) -> None:
    ids = [f"id{number}" for number in range(300)]
    known = {id: replace(MINE, tenant=id) for id in ids[:10]}
    claimed: list[StoredPrediction | None] = []
    for id in known:
        await store.put(id, known[id])

    async def one_caller() -> None:
        for id in known:
            await store.put(id, OTHERS)
            await store.get(ids, read=True)
            claimed.append(await store.claim(id))

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(one_caller)
    assert sorted(one.tenant or "" for one in claimed if one) == sorted(known)
    assert await store.get(ids) == {id: replace(one, reads=40, reported=True) for id, one in known.items()}


IDS = st.sampled_from(["a", "b", "c", "d", "ü", ""])
PREDICTIONS = st.builds(
    StoredPrediction,
    tenant=st.none() | st.text(max_size=5),
    traceparent=st.none() | st.just(TRACEPARENT) | st.text(max_size=3),
    reads=st.integers(0, 3),
    reported=st.booleans(),
)
STEPS = st.one_of(
    st.tuples(st.just("put"), IDS, PREDICTIONS),
    st.tuples(st.just("get"), st.lists(IDS, max_size=6), st.booleans()),
    st.tuples(st.just("claim"), IDS),
)


@pytest.mark.parametrize("kind", ["redis-asyncio", "redis-asyncio-decoded"], indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
async def test_redis_answers_as_memory_does(kind: str, redis_service: RedisServer, steps: list[tuple[object]]) -> None:
    memory = MemoryPredictionStore()
    async with Redis.from_url(redis_service.url, decode_responses=kind.endswith("decoded")) as client:
        redis = RedisPredictionStore(client, prefix=f"{uuid.uuid4()}:")
        for step in steps:
            assert await _do(redis, *step) == await _do(memory, *step), step


async def _do(store: PredictionStore, name: object, *arguments: object) -> object:
    match name, *arguments:
        case "put", str(id), StoredPrediction() as prediction:
            await store.put(id, prediction)
            return None
        case "get", list(ids), bool(read):
            return list((await store.get(ids, read=read)).items())
        case "claim", str(id):
            return await store.claim(id)
    raise AssertionError(name)
