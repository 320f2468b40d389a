"""One prediction through the installed wheel: run away from the source by scripts/check."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import httpx

import replicate_proxy_mw
from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.testing import FakeReplicate, serve


async def host(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


assert replicate_proxy_mw.__file__.startswith(sys.prefix), replicate_proxy_mw.__file__
assert files("replicate_proxy_mw").joinpath("py.typed").is_file()

with FakeReplicate().serve() as fake:
    resolver = MappingKeyResolver({"pk-wheel": fake.token})
    app = ReplicateProxyMiddleware(host, key_resolver=resolver, config=ProxyConfig(upstream=fake.url))
    with serve(app, lifespan="off") as served:
        response = httpx.post(
            served.url + "/v1/models/meta/meta-llama-3-8b-instruct/predictions",
            json={"input": {"prompt": "Hello"}},
            headers={"x-portkey-api-key": "pk-wheel"},
        )
assert response.status_code == 201, response.text
assert fake.violations == []
print(f"replicate-proxy-mw {version('replicate-proxy-mw')}: the wheel works")
