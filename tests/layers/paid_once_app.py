"""A host behind the proxy with both layers and a Redis, for servers that are started as programs."""

from __future__ import annotations

import os

from redis.asyncio import Redis

from replicate_proxy_mw.layers.idempotency import idempotency_keys
from replicate_proxy_mw.layers.results import reuse_results
from replicate_proxy_mw.store.once_redis import RedisOnceStore
from tests.raw_asgi import proxy

store = RedisOnceStore(Redis.from_url(os.environ["REDIS"]), prefix=os.environ["PREFIX"])
longest_create = float(os.environ["LONGEST_CREATE"])
app = proxy(
    os.environ["UPSTREAM"],
    layers=[idempotency_keys(store=store, longest_create=longest_create), reuse_results(store=store)],
)
