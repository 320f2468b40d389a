"""The store of a host with several processes: Redis."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import anyio
from redis.asyncio import Redis, RedisCluster

from .contract import StoredPrediction

# Each script takes one key, so that a cluster can run it. A key that holds something else is left alone.
_KNOWN = """
local known = redis.call('HMGET', KEYS[1], 'tenant', 'traceparent', 'details', 'status', 'reads', 'reported')
if not known[1] and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('WRONGTYPE the key holds no prediction')
end
"""

# HSETNX is sent in any case, and first: a server that takes no writes has to say so. What cannot expire does not stay.
_PUT = f"""{_KNOWN}
local is_new = redis.call('HSETNX', KEYS[1], 'tenant', ARGV[2]) == 1
if is_new then
  local ends = redis.pcall('PEXPIRE', KEYS[1], ARGV[1])
  if type(ends) == 'table' then
    redis.call('HDEL', KEYS[1], 'tenant')
    return ends
  end
end
local names = {{'traceparent', 'details', 'status', 'reads', 'reported'}}
for i = 1, is_new and 5 or 3 do
  if ARGV[i + 2] ~= '' then redis.call('HSETNX', KEYS[1], names[i], ARGV[i + 2]) end
end
"""

_GET = f"""{_KNOWN}
if not known[1] then return false end
return known
"""

_READ = f"""{_KNOWN}
if not known[1] then return false end
known[5] = redis.call('HINCRBY', KEYS[1], 'reads', 1)
redis.call('HSET', KEYS[1], 'status', ARGV[1])
return known
"""

_CLAIM = f"""{_KNOWN}
if not known[1] or redis.call('HSETNX', KEYS[1], 'reported', 1) == 0 then return false end
return known
"""


# At a time; others wait for their turn. redis-py 8 has 100 connections, and a call that finds none free fails at once.
MAX_CALLS = 50


class RedisPredictionStore:
    """Remembers predictions in Redis, for all processes that share it: one hash for each id, with an expiry.

    Every method is one round trip. It needs asyncio, as redis-py does: under trio every call raises. What a call that
    was cancelled had sent may still be done. A claim whose answer is lost counts as made: an end is reported at most
    once.

    Args:
        redis: the host's own client, which stays the host's to close; `decode_responses` may be set or not. Its user
            needs EVAL, EXISTS, PEXPIRE and the commands of hashes on keys of that prefix. Have Redis evict nothing
            (`maxmemory-policy noeviction`), or own predictions become unknown. It has to allow 50 connections.
        prefix: of all keys. Hosts of different Replicate accounts may share one: ids are Replicate's.
        max_age: seconds until an entry is forgotten. 30 days: trainings can be read for good, and a million entries
            take about 270 MB; with details of 250 characters 970 MB, or 600 MB where Redis is set to keep them compact
            (`hash-max-listpack-value 512`).

    Raises:
        ValueError: `max_age` is no time that Redis can keep; from `get`, `read` and `claim`, a key of the store holds a
            hash like ours, of other values.
        redis.exceptions.RedisError: from every method, if Redis cannot be reached or refuses, or a key of the store
            holds something else.
    """

    def __init__(
        self, redis: Redis | RedisCluster, *, prefix: str = "replicate_proxy:", max_age: float = 30 * 86400.0
    ) -> None:
        if not 0.001 <= max_age < math.inf:
            raise ValueError("max_age: must be at least 0.001 seconds, and finite")
        self._redis, self._prefix, self._milliseconds = redis, prefix, int(max_age * 1000)
        self._turns = anyio.Semaphore(MAX_CALLS, fast_acquire=True)

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        # As JSON, None differs from "", and every text is ASCII whatever encoding the client has.
        texts = prediction.traceparent, prediction.details, prediction.status
        fields: list[Any] = [json.dumps(prediction.tenant)]
        fields += ["" if text is None else json.dumps(text) for text in texts]
        fields += [prediction.reads or "", 1 if prediction.reported else ""]
        await self._evaluated(_PUT, 1, self._key(id), self._milliseconds, *fields)

    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        once = list(dict.fromkeys(ids))
        async with self._turns, self._redis.pipeline(transaction=False) as pipeline:
            for id in once:
                pipeline.execute_command("EVAL", _GET, 1, self._key(id))
            answers = await pipeline.execute()
        return {id: _prediction(known) for id, known in zip(once, answers, strict=True) if known is not None}

    async def read(self, id: str, status: str, /) -> StoredPrediction | None:
        known = await self._evaluated(_READ, 1, self._key(id), json.dumps(status))
        return None if known is None else _prediction(known)

    async def claim(self, id: str, /) -> StoredPrediction | None:
        known = await self._evaluated(_CLAIM, 1, self._key(id))
        return None if known is None else _prediction(known)

    async def _evaluated(self, script: str, *arguments: Any) -> Any:
        async with self._turns:
            return await self._redis.execute_command("EVAL", script, *arguments)

    def _key(self, id: str) -> bytes:
        return (self._prefix + id).encode("utf-8", "surrogatepass")


def _prediction(known: list[Any]) -> StoredPrediction:
    texts = [None if text is None else json.loads(text) for text in known[:4]]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError("a key of the store holds no prediction")
    tenant, traceparent, details, status = texts
    return StoredPrediction(
        tenant=tenant,
        traceparent=traceparent,
        details=details,
        status=status,
        reads=int(known[4] or 0),
        reported=known[5] is not None,
    )
