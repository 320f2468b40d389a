"""The app under long and hostile runs, as a factory; the environment names its upstream and transport."""

from __future__ import annotations

import logging
import os
from typing import Any

import anyio

from replicate_proxy_mw import (
    MappingKeyResolver,
    MemoryPredictionStore,
    ProxyConfig,
    ReplicateKey,
    ReplicateProxyMiddleware,
)
from replicate_proxy_mw.keys import KeyRequest

from ..compare.apps import host
from ..compare.traffic import KEY, TOKEN

SLOW_KEY = "pk-slow"
RESOLVING = 0.3

# Below it, upstream's TLS handshake never begins; and nobody listens.
SILENT, REFUSED = "/silent", "/refused"

MAX_CONNECTIONS = 100
# As many as a minute's creates, so that the store is full when the memory is looked at.
KNOWN = 1000


class Resolver:
    """Takes its time for one key."""

    def __init__(self) -> None:
        key = ReplicateKey(TOKEN, tenant="team-a")
        self._known = MappingKeyResolver({KEY: key, SLOW_KEY: key})

    async def __call__(self, request: KeyRequest) -> ReplicateKey | None:
        if request.api_key == SLOW_KEY:
            await anyio.sleep(RESOLVING)
        return await self._known(request)


def app() -> Any:
    # Upstreams that cannot be reached are part of it, and what else is said is looked at.
    logging.getLogger("replicate_proxy_mw").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "fast": os.environ.get("TRANSPORT") == "fast",
        "max_connections": int(os.environ.get("MAX_CONNECTIONS", MAX_CONNECTIONS)),
        "connection_wait": 30.0,
    }
    inner = host
    for prefix, upstream in (
        (SILENT, f"https://127.0.0.1:{os.environ.get('SILENT', 9)}/v1"),
        (REFUSED, "http://127.0.0.1:9/v1"),
        ("/v1", f"{os.environ['UPSTREAM']}/v1"),
    ):
        inner = ReplicateProxyMiddleware(
            inner,
            key_resolver=Resolver(),
            store=MemoryPredictionStore(max_entries=KNOWN),
            config=ProxyConfig(prefix=prefix, upstream=upstream, **options),
        )
    return inner
