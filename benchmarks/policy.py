"""What a mapping, a policy and own_predictions cost per request: `python benchmarks/policy.py`.

The same create and the same poll through the middleware, without and with them, on a transport that answers at once.
Both run in turns, in batches; printed is the median of the differences of neighbouring batches, in CPU time.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx

from replicate_proxy_mw import (
    KeyResolver,
    MappingKeyResolver,
    Policy,
    ReplicateKey,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
)

TOKEN = "r8_0000000000000000000000000000"
ID = "gm3qorzdhgbfurvjtvhg6dckhu"
INPUT = {"prompt": "an astronaut on a horse, " * 8, "seed": 42, "guidance": 7.5}
BODY = json.dumps(
    {"version": "acme/painter:5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa", "input": INPUT}
)
ANSWER = json.dumps(
    {
        "id": ID,
        "model": "acme/painter",
        "input": INPUT,
        "logs": "",
        "output": ["https://replicate.delivery/pbxt/out-0.png"],
        "status": "succeeded",
        "created_at": "2026-11-21T09:00:00.000Z",
        "urls": {"get": f"https://api.replicate.com/v1/predictions/{ID}"},
    }
).encode()
POLICY = Policy(
    operations=["predictions.*", "models.get"], models=["acme/*", "meta/llama"], own_predictions=True, max_in_flight=100
)
BATCH, ROUNDS = 500, 60


class AtOnce(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for _ in request.stream:
            pass
        return httpx.Response(201, headers={"content-type": "application/json"}, stream=httpx.ByteStream(ANSWER))


def scope(method: str, path: str) -> dict[str, Any]:
    headers = [(b"host", b"app.example"), (b"x-portkey-api-key", b"pk-team-a"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("192.0.2.1", 1234),
        "server": ("app.example", 443),
    }


def request(resolver: KeyResolver, method: str, path: str, body: bytes) -> Callable[[], Any]:
    async def host(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("not the host's")

    app = ReplicateProxyMiddleware(host, key_resolver=resolver, transport=AtOnce())

    async def once(method: str = method, path: str = path, body: bytes = body) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 201

        await app(scope(method, path), receive, send)

    async def batch() -> float:
        start = time.process_time()
        for _ in range(BATCH):
            await once()
        return (time.process_time() - start) / BATCH * 1e6

    async def prepared() -> float:
        await once("POST", "/v1/predictions", BODY.encode())  # so that the poll has something to find
        return await batch()

    return prepared


async def compare(name: str, method: str, path: str, body: bytes) -> None:
    plain = request(StaticKeyResolver(TOKEN, api_keys=["pk-team-a"]), method, path, body)
    key = ReplicateKey(TOKEN, tenant="team-a", policy=POLICY)
    ruled = request(MappingKeyResolver({"pk-team-a": key}), method, path, body)
    pairs = [(await plain(), await ruled()) for _ in range(ROUNDS)]
    without, added = statistics.median(a for a, _ in pairs), statistics.median(b - a for a, b in pairs)
    print(f"{name:<8}{without:>10.1f} µs{added:>+10.1f} µs{(without + added) / without:>10.2f}")


async def main() -> None:
    print(f"{'':<8}{'without':>13}{'with':>13}{'ratio':>10}")
    await compare("create", "POST", "/v1/predictions", BODY.encode())
    await compare("poll", "GET", f"/v1/predictions/{ID}", b"")


if __name__ == "__main__":
    asyncio.run(main())
