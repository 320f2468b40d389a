from __future__ import annotations

import json
import math
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from replicate_proxy_mw.store import StoredPrediction
from replicate_proxy_mw.store.redis import RedisPredictionStore
from tests.services import RedisServer, redis_server, two_processes

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MINE = StoredPrediction(tenant="team-a", traceparent=TRACEPARENT)
FULL = replace(MINE, details='{"model": "acme/painter"}', status="starting")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4()}:"


@pytest.fixture
async def redis(redis_service: RedisServer) -> AsyncIterator[Redis]:
    async with _client(redis_service) as client:
        yield client


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop or spoil."""
    with redis_server() as server:
        yield server


@pytest.fixture
async def own_redis(own_server: RedisServer) -> AsyncIterator[Redis]:
    async with _client(own_server) as client:
        yield client


def _client(server: RedisServer, **options: Any) -> Redis:
    return Redis.from_url(server.url, retry=Retry(NoBackoff(), 0), **options)


async def _put(store: RedisPredictionStore) -> object:
    await store.put("new", MINE)
    return None


async def _put_again(store: RedisPredictionStore) -> object:
    await store.put("a", MINE)
    return None


async def _fill_in(store: RedisPredictionStore) -> object:
    await store.put("a", FULL)
    return None


async def _get(store: RedisPredictionStore) -> object:
    return await store.get(["a", "b"])


async def _read(store: RedisPredictionStore) -> object:
    return await store.read("a", "processing")


async def _claim(store: RedisPredictionStore) -> object:
    return await store.claim("a")


WRITES = [_put, _put_again, _fill_in, _read, _claim]


async def test_an_entry_has_an_end_from_its_beginning(redis: Redis, prefix: str) -> None:
    store = RedisPredictionStore(redis, prefix=prefix, max_age=100)
    await store.put("a", MINE)
    assert 0 < await redis.pttl(f"{prefix}a") <= 100_000
    # No use of it moves the end.
    await redis.pexpire(f"{prefix}a", 50_000)
    for use in (_put_again, _fill_in, _get, _read, _claim, _claim):
        await use(store)
    assert [key async for key in redis.scan_iter(f"{prefix}*")] == [f"{prefix}a".encode()]
    assert 0 < await redis.pttl(f"{prefix}a") <= 50_000


async def test_by_default_an_entry_lives_for_30_days(redis: Redis) -> None:
    store, id = RedisPredictionStore(redis), str(uuid.uuid4())
    await store.put(id, MINE)
    assert 29 * 86400 < await redis.ttl(f"replicate_proxy:{id}") <= 30 * 86400


async def test_what_has_ended_is_unknown_and_may_be_put_anew(redis: Redis, prefix: str) -> None:
    store = RedisPredictionStore(redis, prefix=prefix)
    await store.put("a", replace(MINE, reads=3))
    await redis.pexpire(f"{prefix}a", 0)
    assert await store.read("a", "processing") is None
    await store.put("a", MINE)
    assert await store.get(["a"]) == {"a": MINE}


@pytest.mark.parametrize("max_age", [0, -1, 0.0009, math.nan, math.inf])
async def test_an_age_has_to_be_one(redis: Redis, max_age: float) -> None:
    with pytest.raises(ValueError, match="max_age: "):
        RedisPredictionStore(redis, max_age=max_age)


@pytest.mark.parametrize("max_age", [100, 9.2233720368e15, 1e300])
async def test_no_entry_is_made_that_could_not_end(own_redis: Redis, max_age: float) -> None:
    if max_age == 100:
        await own_redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-pexpire"], keys=["*"])
    store = RedisPredictionStore(own_redis, max_age=max_age)
    for _ in range(2):
        with pytest.raises(ResponseError):
            await store.put("a", FULL)
    assert await own_redis.dbsize() == 0


class Counted(Connection):
    """Counts what is sent before an answer is waited for."""

    sent = 0

    async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
        type(self).sent += 1
        await super().send_packed_command(*arguments, **options)


async def test_each_call_is_one_round_trip_whatever_the_server_has_forgotten(redis_service: RedisServer) -> None:
    pool = ConnectionPool(Counted, host="127.0.0.1", port=redis_service.port)
    async with Redis(connection_pool=pool) as redis:
        store = RedisPredictionStore(redis, prefix=f"{uuid.uuid4()}:")
        await redis.script_flush()
        Counted.sent = 0
        await store.put("a", MINE)
        assert Counted.sent == 1
        await store.put("a", FULL)
        assert Counted.sent == 2
        assert await store.read("a", "processing") == replace(FULL, reads=1)
        assert Counted.sent == 3
        assert await store.claim("a") == replace(FULL, status="processing", reads=1)
        assert Counted.sent == 4
        assert list(await store.get([*(f"id{number}" for number in range(500)), "a"])) == ["a"]
        assert Counted.sent == 5
    await pool.aclose()


@pytest.mark.parametrize("kind", ["full", "replica", "misconfigured"])
async def test_a_server_that_takes_no_writes_is_out_of_order(own_server: RedisServer, kind: str) -> None:
    async with _client(own_server) as redis:
        store = RedisPredictionStore(redis)
        await store.put("a", MINE)
        if kind == "full":
            await redis.config_set("maxmemory", 1)
        elif kind == "replica":
            await redis.replicaof("127.0.0.1", "1")
        else:
            await redis.config_set("min-replicas-to-write", 1)
        for write in WRITES:
            with pytest.raises(RedisError):
                await write(store)
        assert await store.get(["a", "new"]) == {"a": MINE}


async def _nothing_but(redis: Redis, key: str, content: object) -> None:
    """Fill `key` as somebody else would."""
    if isinstance(content, dict):
        await redis.hset(key, mapping=content)
    elif isinstance(content, list):
        await redis.rpush(key, *content)
    else:
        await redis.set(key, str(content))


@pytest.mark.parametrize("content", ["text", ["a", "list"], {"other": "fields"}, {"traceparent": '"x"', "reads": 1}])
async def test_somebody_elses_key_is_neither_taken_nor_touched(redis: Redis, prefix: str, content: object) -> None:
    store = RedisPredictionStore(redis, prefix=prefix)
    await store.put("b", MINE)
    await _nothing_but(redis, f"{prefix}a", content)
    before = await redis.dump(f"{prefix}a")
    for use in (_put_again, _fill_in, _get, _read, _claim):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await use(store)
    assert await redis.dump(f"{prefix}a") == before
    assert await redis.pttl(f"{prefix}a") == -1
    assert await store.get(["c", "b"]) == {"b": MINE}


@pytest.mark.parametrize("decode_responses", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"tenant": "team-a"},
        {"tenant": "5"},
        {"tenant": b"\xff"},
        {"tenant": '["team-a"]'},
        {"tenant": '"team-a"', "traceparent": "{}"},
        {"tenant": '"team-a"', "details": "{}"},
        {"tenant": '"team-a"', "status": "starting"},
        {"tenant": '"team-a"', "traceparent": "5", "status": '"starting"', "reads": 1},
        {"tenant": '"team-a"', "reads": "many"},
    ],
)
async def test_a_hash_like_ours_with_other_values_is_not_taken_for_an_entry(
    redis_service: RedisServer, prefix: str, content: dict[str, str | bytes], decode_responses: bool
) -> None:
    async with _client(redis_service, decode_responses=decode_responses, max_connections=1) as redis:
        store = RedisPredictionStore(redis, prefix=prefix)
        await _nothing_but(redis, f"{prefix}a", content)
        await store.put("b", MINE)
        for use in (_get, _claim):
            with pytest.raises(ValueError):  # noqa: PT011 - of json, int or the codec
                await use(store)
        with pytest.raises((ValueError, ResponseError)):
            await _read(store)
        assert await store.get(["c", "b"]) == {"b": MINE}


async def test_an_outage_is_raised_and_ends_with_the_server(own_server: RedisServer, own_redis: Redis) -> None:
    store = RedisPredictionStore(own_redis)
    await store.put("a", MINE)
    own_server.stop()
    for use in (*WRITES, _get):
        with pytest.raises(RedisError):
            await use(store)
    # What comes back is another server, an empty one, as after a failover.
    own_server.start()
    assert await store.read("a", "processing") is None
    assert await store.claim("a") is None
    await store.put("a", MINE)
    assert await store.read("a", "processing") == replace(MINE, reads=1)
    assert await store.claim("a") == replace(MINE, reads=1, status="processing")


@pytest.mark.parametrize("use", [*WRITES, _get])
async def test_a_call_that_took_too_long_leaves_no_answer_to_the_next(own_server: RedisServer, use: Any) -> None:
    async with _client(own_server, max_connections=1) as redis:
        store = RedisPredictionStore(redis)
        await store.put("a", MINE)
        for name in "xyz":
            await store.put(name, StoredPrediction(tenant=name))
        with own_server.frozen():
            for _ in range(3):
                with pytest.raises(TimeoutError), anyio.fail_after(0.05):
                    await use(store)
        for name in "xyz":
            assert await store.get([name]) == {name: StoredPrediction(tenant=name)}
        assert await store.claim("z") == StoredPrediction(tenant="z")
        assert await store.get(["unknown"]) == {}


async def test_a_call_may_be_cancelled_at_any_moment(redis_service: RedisServer, prefix: str) -> None:
    async with _client(redis_service, max_connections=1) as redis:
        store = RedisPredictionStore(redis, prefix=prefix)
        ids = [f"id{number}" for number in range(100)]
        for id in ids:
            await store.put(id, StoredPrediction(tenant=id))
        cancelled = 0
        for step in range(100):
            with anyio.move_on_after(step * 0.0001) as scope:
                await store.get(ids)
            cancelled += scope.cancelled_caught
            assert await store.get([ids[step]]) == {ids[step]: StoredPrediction(tenant=ids[step])}
        assert cancelled > 0


ANOTHER_PROCESS = """
import asyncio, json, os, sys
from redis.asyncio import Redis
from replicate_proxy_mw.store.redis import RedisPredictionStore

async def main(url, prefix, ids):
    async with Redis.from_url(url) as redis:
        store = RedisPredictionStore(redis, prefix=prefix)
        await redis.ping()
        print("ready", flush=True)
        sys.stdin.readline()
        claimed = [id for id in ids if await store.claim(id)]
        seen = []
        for number in range(300):
            status = f"{os.getpid()} {number}"
            known = await store.read("shared", status)
            seen.append([known.reads, known.status, status])
        print(json.dumps([claimed, seen]))

asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
"""


async def test_two_processes_share_what_there_is_to_claim_and_count(
    redis_service: RedisServer, redis: Redis, prefix: str
) -> None:
    store = RedisPredictionStore(redis, prefix=prefix)
    ids = [f"id{number}" for number in range(300)]
    for id in (*ids, "shared"):
        await store.put(id, FULL)
    told = [json.loads(text) for text in two_processes(ANOTHER_PROCESS, redis_service.url, prefix, json.dumps(ids))]
    assert sorted(told[0][0] + told[1][0]) == sorted(ids)
    assert await store.get(ids) == dict.fromkeys(ids, replace(FULL, reported=True))
    reads = sorted(told[0][1] + told[1][1])
    assert [number for number, _, _ in reads] == list(range(1, 601))
    # Each saw the status that the one before it had brought.
    assert [before for _, before, _ in reads] == ["starting", *(status for _, _, status in reads[:-1])]
    assert await store.get(["shared"]) == {"shared": replace(FULL, reads=600, status=reads[-1][2])}


async def test_a_cluster_is_as_good() -> None:
    with redis_server(None, "--cluster-enabled", "yes") as server:
        async with _client(server) as node:
            await node.cluster("ADDSLOTSRANGE", 0, 16383)
            while (await node.cluster("INFO"))["cluster_state"] != "ok":  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(0.05)
        async with RedisCluster("127.0.0.1", server.port) as cluster:
            store = RedisPredictionStore(cluster)
            await store.put("a", MINE)
            await store.put("b", MINE)
            await store.put("b", FULL)
            assert await store.get(["a", "b", "c"]) == {"a": MINE, "b": FULL}
            assert await store.read("a", "processing") == replace(MINE, reads=1)
            assert await store.claim("a") == replace(MINE, reads=1, status="processing")
            assert await store.claim("a") is None
            assert await store.get([]) == {}


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.parametrize("use", [*WRITES, _get])
async def test_under_trio_every_call_raises(redis_service: RedisServer, use: Any) -> None:
    redis = _client(redis_service)
    with pytest.raises((RuntimeError, RedisError), match="no running event loop"):
        await use(RedisPredictionStore(redis))


@pytest.mark.parametrize("call", ["put", "get", "read", "claim"])
async def test_more_calls_at_once_than_a_client_has_connections(redis_service: RedisServer, call: str) -> None:
    arguments = {"put": ("x", MINE), "get": (["x"],), "read": ("x", "starting"), "claim": ("x",)}[call]
    async with _client(redis_service, max_connections=60) as redis:
        store = RedisPredictionStore(redis, prefix=f"{uuid.uuid4()}:")
        async with anyio.create_task_group() as calls:
            for _ in range(200):
                calls.start_soon(getattr(store, call), *arguments)
