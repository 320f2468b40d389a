"""A request on its way to Replicate, for tests of what it passes."""

from __future__ import annotations

from typing import Any

from replicate_proxy_mw import ProxyRequest, ReplicateKey
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from tests.raw_asgi import TOKEN


def request_of(method: str = "GET", target: str = "/predictions/p1", **more: Any) -> ProxyRequest:
    fields: dict[str, Any] = {
        "method": method,
        "target": target,
        "route": match(method, target.partition("?")[0]),
        "headers": (),
        "body": Chunks([]),
        "content_length": 0,
        "key": ReplicateKey(TOKEN),
        "portkey": PortkeyContext(api_key="pk"),
        "scope": {},
    }
    return ProxyRequest(**(fields | more))
