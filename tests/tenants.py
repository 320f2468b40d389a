"""Two tenants who share a token, in front of upstreams and stores that do as they are told."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from replicate_proxy_mw import MappingKeyResolver, PermissionDenied, Policy, ReplicateKey
from replicate_proxy_mw.store import MemoryPredictionStore, PredictionStore, StoredPrediction
from replicate_proxy_mw.store.ledger import PROBE
from replicate_proxy_mw.testing import FakeModel
from tests.raw_asgi import TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection

A, B = ((b"x-portkey-api-key", b"pk-team-" + name) for name in (b"a", b"b"))
JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"multipart/form-data; boundary=x")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
MINE = FakeModel(owner="acme", name="mine", visibility="private")


OPTIONS: dict[str, Any] = {
    "models": [MINE],
    "page_size": 3,
    "api_url": "https://api.replicate.com/v1",
    "tokens": {TOKEN: "acme"},
}


def owned(upstream: str, *, store: PredictionStore | None = None, **more: Any) -> Any:
    """The proxy in front of `upstream`, with two tenants who share a token."""
    policy = Policy(own_predictions=True)
    keys = {f"pk-team-{name}": ReplicateKey(TOKEN, tenant=f"team-{name}", policy=policy) for name in "ab"}
    return proxy(upstream, key_resolver=MappingKeyResolver(keys), store=store, **more)


async def ask(
    app: Any, who: tuple[bytes, bytes], method: str, target: str, body: bytes = b"", *headers: tuple[bytes, bytes]
) -> Caller:
    return await call(app, http_scope(method, target, [who, *headers]), body)


def code(caller: Caller) -> tuple[int | None, str]:
    return caller.status, json.loads(caller.content)["error"]["code"]


async def nothing(id: str) -> None:
    pass


class Switched(MemoryPredictionStore):
    """A store with a switch: what is awaited before it writes or reads an id may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.put_ids: list[str] = []
        self.before_put: Callable[[str], Awaitable[None]] = nothing
        self.before_get: Callable[[str], Awaitable[None]] = nothing

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        self.put_ids.append(id)
        await self.before_put(id)
        await super().put(id, prediction)

    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        for id in ids:
            await self.before_get(id)
        return await super().get(ids)

    async def read(self, id: str, status: str, /) -> StoredPrediction | None:
        await self.before_get(id)
        return await super().read(id, status)


async def refuses(id: str) -> None:
    raise OSError("hunter2")


async def hangs(id: str) -> None:
    await anyio.sleep_forever()


async def denies(id: str) -> None:
    raise PermissionDenied("hunter2")


async def refuses_creations(id: str) -> None:
    if id != PROBE:
        raise OSError("hunter2")


def store_of(*ids: str, tenant: str = "team-a") -> MemoryPredictionStore:
    store = MemoryPredictionStore()
    for id in ids:
        with pytest.raises(StopIteration):  # nothing in it waits
            store.put(id, StoredPrediction(tenant=tenant)).send(None)
    return store


def answers(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> Callable[[Connection], None]:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(body, status=status, headers=headers)

    return script


def sends(answer: bytes) -> Callable[[Connection], None]:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(answer)

    return script


@dataclass(frozen=True)
class Create:
    target: str
    where: str
    body: bytes
    content_type: tuple[bytes, bytes] = JSON
    cancels: bool = True


_INPUT = {"input": {"text": "Ada", "prompt": "Ada"}}
_UPLOAD = b'--x\r\ncontent-disposition: form-data; name="content"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
CREATES = {
    "predictions.create": Create(
        "/v1/predictions", "/v1/predictions", json.dumps({"version": HELLO_WORLD, **_INPUT}).encode()
    ),
    "models.predictions.create": Create(
        "/v1/models/meta/meta-llama-3-8b-instruct/predictions", "/v1/predictions", json.dumps(_INPUT).encode()
    ),
    "deployments.predictions.create": Create(
        "/v1/deployments/acme/hello/predictions", "/v1/predictions", json.dumps(_INPUT).encode()
    ),
    "trainings.create": Create(
        f"/v1/models/replicate/hello-world/versions/{HELLO_WORLD}/trainings",
        "/v1/trainings",
        json.dumps({"destination": "acme/mine", **_INPUT}).encode(),
    ),
    "files.create": Create("/v1/files", "/v1/files", _UPLOAD, FORM, cancels=False),
}
each_create = pytest.mark.parametrize("create", CREATES.values(), ids=CREATES)


async def created(app: Any, who: tuple[bytes, bytes], create: Create = CREATES["predictions.create"]) -> str:
    caller = await ask(app, who, "POST", create.target, create.body, create.content_type)
    assert caller.status == 201, caller.content
    return str(json.loads(caller.content)["id"])


LIST = (
    b'{ "next":null,\n"previous" : null, "results": [ {"id":"p1", "x":1.50, "y":"\\u00e9"} , {"id": "p2"},\n'
    b'"p1", {"id": ["p1"]}, {"x": {"id": "p1"}}, null, {"z":0,"id":"p3"}]\n, "more": {"results": []} }'
)
CREATED = b'{"id":"p1","status":"starting"}'
