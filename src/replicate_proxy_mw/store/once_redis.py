"""What must not be paid twice, remembered for several processes: Redis."""

from __future__ import annotations

import re
from typing import Any

import anyio
from redis.asyncio import Redis, RedisCluster

from .once import EarlierResult, KeyedCreate

# At a time; others wait for their turn. redis-py 8 has 100 connections, and a call that finds none free fails at once.
MAX_CALLS = 25

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEX = re.compile(r"[0-9a-f]{1,64}")

# Each script takes one key, so that a cluster can run it. A key that holds something else is left alone. Times are
# milliseconds of the server, which all processes share.
_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

# What cannot expire does not stay.
_PUT = """
local function put(lifetime, ...)
  redis.call('HSET', KEYS[1], ...)
  local ends = redis.pcall('PEXPIRE', KEYS[1], lifetime)
  if type(ends) == 'table' then
    redis.call('DEL', KEYS[1])
    return ends
  end
  return false
end
"""

_CREATE = f"""{_NOW}{_PUT}
local known = redis.call('HMGET', KEYS[1], 'mark', 'fingerprint', 'until', 'status', 'id')
if not known[1] and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('WRONGTYPE the key holds no create')
end
"""

_BEGIN = f"""{_CREATE}
if not known[1] then
  return put(ARGV[1], 'mark', ARGV[2], 'fingerprint', ARGV[3], 'until', now + ARGV[4], 'status', '', 'id', '')
end
if known[1] == ARGV[2] then return false end
known[3] = (tonumber(known[3]) or 0) - now
return known
"""

_END = f"""{_CREATE}
if known[1] and known[1] ~= ARGV[2] then return false end
return put(
  ARGV[1], 'mark', ARGV[2], 'fingerprint', ARGV[3], 'until', now + ARGV[4], 'status', ARGV[5], 'id', ARGV[6]
)
"""

_FORGET = f"""{_CREATE}
if known[1] == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

_RESULT = f"""{_NOW}{_PUT}
local known = redis.call('HMGET', KEYS[1], 'result', 'at')
if not known[1] and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('WRONGTYPE the key holds no result')
end
"""

_PUT_RESULT = f"""{_RESULT}
return put(ARGV[1], 'result', ARGV[2], 'at', now)
"""

_GET_RESULT = f"""{_RESULT}
if not known[1] then return false end
known[2] = now - (tonumber(known[2]) or 0)
return known
"""


class RedisOnceStore:
    """Remembers in Redis, for all processes that share it: one hash for each create or result, with an expiry.

    Every method is one round trip. It needs asyncio, as redis-py does: under trio every call raises. What a call that
    was cancelled had sent may still be done.

    Args:
        redis: the host's own client, which stays the host's to close; `decode_responses` may be set or not. Its user
            needs EVAL, TIME, EXISTS, DEL, PEXPIRE and the commands of hashes on keys of that prefix. It has to allow 25
            connections beside those that others take of it. Redis 5 or newer; have it evict nothing
            (`maxmemory-policy noeviction`) and keep what it has over a restart (`appendonly yes`): a create whose key
            is forgotten is sent again with it. A million creates take about 410 MB, a million results 270 MB.
        prefix: of all keys. Hosts of different Replicate accounts may share one.

    Raises:
        ValueError: from `begin` and `result`, a key of the store holds a hash like ours, of other values.
        redis.exceptions.RedisError: from every method, if Redis cannot be reached or refuses, or a key of the store
            holds something else.
    """

    def __init__(self, redis: Redis | RedisCluster, *, prefix: str = "replicate_proxy:") -> None:
        self._redis, self._prefix = redis, prefix
        self._turns = anyio.Semaphore(MAX_CALLS, fast_acquire=True)

    async def begin(self, key: str, create: KeyedCreate, lifetime: float, /) -> KeyedCreate | None:
        given = create.mark, create.fingerprint, _milliseconds(create.left)
        known = await self._run(_BEGIN, f"create:{key}", _milliseconds(lifetime), *given)
        return None if known is None else _create(known)

    async def end(self, key: str, create: KeyedCreate, lifetime: float, /) -> None:
        given = create.mark, create.fingerprint, _milliseconds(create.left), create.status or "", create.id or ""
        await self._run(_END, f"create:{key}", _milliseconds(lifetime), *given)

    async def forget(self, key: str, mark: str, /) -> None:
        await self._run(_FORGET, f"create:{key}", mark)

    async def put_result(self, key: str, id: str, lifetime: float, /) -> None:
        await self._run(_PUT_RESULT, f"result:{key}", _milliseconds(lifetime), id)

    async def result(self, key: str, /) -> EarlierResult | None:
        known = await self._run(_GET_RESULT, f"result:{key}")
        return None if known is None else EarlierResult(_matching(_ID, known[0]), max(0.0, known[1] / 1000))

    async def _run(self, script: str, key: str, *arguments: str | int) -> Any:
        async with self._turns:
            return await self._redis.execute_command("EVAL", script, 1, self._prefix + key, *arguments)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _create(known: list[Any]) -> KeyedCreate:
    mark, fingerprint, left, status, id = known
    return KeyedCreate(
        mark=_matching(_HEX, mark),
        fingerprint=_matching(_HEX, fingerprint),
        left=left / 1000,
        status=int(status) if status else None,
        id=_matching(_ID, id) if id else None,
    )


def _matching(form: re.Pattern[str], value: str | bytes | None) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value or ""
    if not form.fullmatch(text):
        raise ValueError("a key of the store holds neither a create nor a result")
    return text
