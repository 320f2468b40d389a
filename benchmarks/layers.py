"""What each optional layer costs per request: `python benchmarks/layers.py`.

The layer by itself around an answer that is at hand, everything in memory: CPU time of the process, in batches, less
that of the same requests without the layer, in turns; printed are medians of the differences. What a layer does when
the answer is out counts, too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from replicate_proxy_mw import Forward, Layer, ProxyRequest, ProxyResponse, Rates, ReplicateKey, portkey, routing
from replicate_proxy_mw.checks.input_schema import valid_input
from replicate_proxy_mw.checks.patterns import matches
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.layers.cache import cache_catalogue
from replicate_proxy_mw.layers.coalescing import coalesce_polls
from replicate_proxy_mw.layers.guardrails import guardrails
from replicate_proxy_mw.layers.idempotency import idempotency_keys
from replicate_proxy_mw.layers.limits import limit_requests
from replicate_proxy_mw.layers.results import reuse_results
from replicate_proxy_mw.layers.spending import limit_spending

BATCH, ROUNDS = 200, 30
KEY = ReplicateKey("r8_0000000000000000000000000000", tenant="team-a")
INPUT = {"prompt": "an astronaut on a horse, " * 8, "seed": 42, "guidance": 7.5}
CREATE, POLL, MODEL = "/models/acme/painter/predictions", "/predictions/{}", "/models/acme/painter"
JSON = (b"content-type", b"application/json")
ASKS_FOR_RESULTS = (b"x-portkey-config", b'{"cache": {"mode": "simple"}}')
SCHEMA = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string", "title": "Prompt"},
        "seed": {"type": "integer", "nullable": True},
        "guidance": {"type": "number", "minimum": 0, "maximum": 20},
        **{f"option_{n}": {"type": "string", "default": "", "title": f"Option {n}"} for n in range(20)},
    },
}
ids = (f"gm3qorzdhg{n:016}" for n in itertools.count())


@dataclass(frozen=True)
class Case:
    """`request` makes one request each; the first of a batch may be another, which is not counted."""

    name: str
    layer: Callable[[], Layer]
    request: Callable[[], Iterator[ProxyRequest]]


def asked(method: str, target: str, *headers: tuple[bytes, bytes], content: Any = None) -> ProxyRequest:
    body = b"" if content is None else json.dumps(content).encode()
    caller = [(b"x-portkey-api-key", b"pk-team-a"), *headers]
    return ProxyRequest(
        method=method,
        target=target,
        route=routing.match(method, target),
        headers=((b"accept", b"*/*"), *([JSON] if body else [])),
        body=Chunks([body] if body else []),
        content_length=len(body),
        key=KEY,
        portkey=portkey.read(caller),
        scope={"type": "http", "method": method, "headers": caller},
    )


def answer(request: ProxyRequest) -> bytes:
    if request.operation == "models.get":
        shown: Any = {
            "owner": "acme",
            "name": "painter",
            "latest_version": {"id": "v1", "openapi_schema": {"components": {"schemas": {"Input": SCHEMA}}}},
        }
        return json.dumps(shown).encode()
    ended = request.method == "GET"
    shown = {
        "id": request.route.params.get("prediction_id") or next(ids),
        "model": "acme/painter",
        "input": INPUT,
        "logs": "",
        "output": ["https://replicate.delivery/pbxt/out-0.png"] if ended else None,
        "status": "succeeded" if ended else "starting",
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime()),
        "completed_at": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime()) if ended else None,
        "metrics": {"predict_time": 3.25, "total_time": 4.5} if ended else {},
    }
    return json.dumps(shown).encode()


def repeated(make: Callable[[int], ProxyRequest]) -> Callable[[], Iterator[ProxyRequest]]:
    return lambda: (make(number) for number in itertools.count())


def polls(number: int) -> ProxyRequest:
    return asked("GET", POLL.format(f"p{number:025}"))


def creates(number: int, *headers: tuple[bytes, bytes]) -> ProxyRequest:
    return asked("POST", CREATE, *headers, content={"input": INPUT | {"seed": number}})


def spending() -> Layer:
    return limit_spending(per_day=1e6, prices={"acme/painter": Rates(per_second=0.000725)}, reserve=0.01)


CASES = (
    Case("limit_requests", lambda: limit_requests(others="100000/minute"), repeated(polls)),
    Case(
        "guardrails: matches, an input",
        lambda: guardrails(input=[matches("(?i)nightjar", fields=["prompt"])]),
        repeated(creates),
    ),
    Case("guardrails: valid_input", lambda: guardrails(input=[valid_input()]), repeated(creates)),
    Case("guardrails: matches, an output", lambda: guardrails(output=[matches("(?i)nightjar")]), repeated(polls)),
    Case("cache_catalogue: MISS", cache_catalogue, repeated(lambda n: asked("GET", f"/models/acme/painter-{n}"))),
    Case("cache_catalogue: HIT", cache_catalogue, repeated(lambda n: asked("GET", MODEL))),
    Case("idempotency_keys: no key", idempotency_keys, repeated(creates)),
    Case(
        "idempotency_keys: first",
        idempotency_keys,
        repeated(lambda n: creates(n, (b"idempotency-key", b"%d" % n))),
    ),
    Case(
        "idempotency_keys: again",
        idempotency_keys,
        repeated(lambda n: creates(0, (b"idempotency-key", b"one"))),
    ),
    Case("reuse_results: MISS", reuse_results, repeated(lambda n: creates(n, ASKS_FOR_RESULTS))),
    Case("reuse_results: HIT", reuse_results, repeated(lambda n: creates(0, ASKS_FOR_RESULTS))),
    Case("limit_spending: create", spending, repeated(creates)),
    Case("limit_spending: end", spending, repeated(polls)),
    Case("coalesce_polls: alone", lambda: coalesce_polls(interval=0), repeated(polls)),
)


async def forward(request: ProxyRequest) -> ProxyResponse:
    async for _ in request.body:
        pass
    status = 201 if request.method == "POST" else 200
    return ProxyResponse(status=status, headers=(JSON,), body=Chunks([answer(request)]))


async def batch(through: Forward, requests: Iterator[ProxyRequest]) -> float:
    """Microseconds for each request."""
    made = list(itertools.islice(requests, BATCH))
    start = time.process_time()
    for request in made:
        response = await through(request)
        assert response.status < 300, response
        async for _ in response.body:
            pass
        await response.aclose()
        for afterward in request.afterwards:
            await afterward()
    return (time.process_time() - start) / BATCH * 1e6


async def measure(case: Case) -> None:
    with_layer, requests, without = case.layer()(forward), case.request(), case.request()
    differences = []
    for _ in range(ROUNDS):
        bare = await batch(forward, without)
        differences.append(await batch(with_layer, requests) - bare)
    print(f"{case.name:<36}{statistics.median(differences[3:]):>8.1f}")


async def main() -> None:
    print("Microseconds of CPU per request, more than without the layer.")
    for case in CASES:
        await measure(case)


if __name__ == "__main__":
    asyncio.run(main())
