"""What a mapping, a policy and own_predictions cost per request: `python benchmarks/policy.py`.

By themselves: the resolver, the check of the head and the layers, around an answer that is at hand. In an exchange: the
same create and the same poll through the whole middleware, without and with them, on a transport that answers at once.
Both are CPU time, taken in turns in batches; printed are medians, and the median of the differences of neighbours.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from replicate_proxy_mw import (
    KeyRequest,
    KeyResolver,
    MappingKeyResolver,
    MemoryPredictionStore,
    Policy,
    ProxyRequest,
    ProxyResponse,
    ReplicateKey,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
)
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.layers.in_flight import limit_in_flight
from replicate_proxy_mw.layers.model_rules import check_models
from replicate_proxy_mw.layers.ownership import own_predictions
from replicate_proxy_mw.layers.recording import record_creations
from replicate_proxy_mw.policy import permit
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from replicate_proxy_mw.store import Ledger, StoredPrediction

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
STORE = MemoryPredictionStore()


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


def by_themselves(method: str, path: str, body: bytes) -> Callable[[], Awaitable[float]]:
    key = ReplicateKey(TOKEN, tenant="team-a", policy=POLICY)
    resolver, route, ledger = MappingKeyResolver({"pk-team-a": key}), match(method, path), Ledger(STORE, timeout=1.0)
    asked = KeyRequest(api_key="pk-team-a", method=method, path=path, scope={})
    headers = ((b"content-type", b"application/json"), (b"accept-encoding", b"identity"))

    async def answer(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse(status=201, headers=headers[:1], body=Chunks([ANSWER]))

    forward = record_creations(ledger)(answer)
    for layer in (own_predictions(ledger), check_models(lookup_versions=False), limit_in_flight):
        forward = layer(forward)

    async def batch() -> float:
        requests = [
            ProxyRequest(
                method=method,
                target=path,
                route=route,
                headers=headers,
                body=Chunks([body]),
                content_length=len(body),
                key=key,
                portkey=PortkeyContext(),
                scope={},
            )
            for _ in range(BATCH)
        ]
        start = time.process_time()
        for request in requests:
            found = await resolver(asked)
            assert found is not None
            permit(found.policy, route, path)
            await forward(request)
            for opened in request.opened:
                await opened.aclose()
        return (time.process_time() - start) / BATCH * 1e6

    return batch


def exchange(resolver: KeyResolver, method: str, path: str, body: bytes) -> Callable[[], Awaitable[float]]:
    async def host(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("not the host's")

    app = ReplicateProxyMiddleware(host, key_resolver=resolver, transport=AtOnce(), store=STORE)

    async def once() -> None:
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

    return batch


async def compare(name: str, method: str, path: str, body: bytes) -> None:
    plain = exchange(StaticKeyResolver(TOKEN, api_keys=["pk-team-a"]), method, path, body)
    key = ReplicateKey(TOKEN, tenant="team-a", policy=POLICY)
    ruled = exchange(MappingKeyResolver({"pk-team-a": key}), method, path, body)
    alone = by_themselves(method, path.removeprefix("/v1"), body)
    rounds = [(await alone(), await plain(), await ruled()) for _ in range(ROUNDS)]
    themselves, without = (statistics.median(column) for column in list(zip(*rounds, strict=True))[:2])
    added = statistics.median(b - a for _, a, b in rounds)
    print(f"{name:<8}{themselves:>13.1f} µs{without:>13.1f} µs{added:>+13.1f} µs{(without + added) / without:>10.2f}")


async def main() -> None:
    await STORE.put(ID, StoredPrediction(tenant="team-a"))  # so that the poll has something to find
    print(f"{'':<8}{'by themselves':>16}{'exchange':>16}{'with them':>16}{'ratio':>10}")
    await compare("create", "POST", "/v1/predictions", BODY.encode())
    await compare("poll", "GET", f"/v1/predictions/{ID}", b"")


if __name__ == "__main__":
    asyncio.run(main())
