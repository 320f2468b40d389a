"""What tests of layers that keep creates from being paid twice share: who pays for what, and stores that fail."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from replicate_proxy_mw import MappingKeyResolver, ReplicateKey
from replicate_proxy_mw.store.once import EarlierResult, KeyedCreate, MemoryOnceStore
from tests.raw_asgi import TOKEN, Caller, http_scope, proxy
from tests.tenants import HELLO_WORLD, JSON

Header = tuple[bytes, bytes]

OTHER_TOKEN = "r8_" + "2" * 37
# A tenant and a token each; the third shares the token with the first, the fourth the tenant.
CALLERS: dict[bytes, ReplicateKey] = {
    b"a": ReplicateKey(TOKEN, tenant="team-a"),
    b"b": ReplicateKey("r8_" + "1" * 37, tenant="team-b"),
    b"c": ReplicateKey(TOKEN, tenant="team-c"),
    b"d": ReplicateKey(OTHER_TOKEN, tenant="team-a"),
}
A, B, C, D = ((b"x-portkey-api-key", b"pk-" + name) for name in CALLERS)

BODY = json.dumps({"version": HELLO_WORLD, "input": {"text": "Ada"}}).encode()


def paying(upstream: str = "http://127.0.0.1:1/v1", **more: Any) -> Any:
    """The proxy with those callers."""
    keys = {f"pk-{name.decode()}": key for name, key in CALLERS.items()}
    return proxy(upstream, key_resolver=MappingKeyResolver(keys), **more)


async def create(
    app: Any, *headers: Header, body: bytes = BODY, target: str = "/v1/predictions", who: Header = A
) -> Caller:
    """A create of a caller that stays; connections are left open, since others may be under way."""
    return await Caller([body]).call(app, http_scope("POST", target, [who, JSON, *headers]))


def told(caller: Caller) -> Any:
    return json.loads(caller.content)


def code(caller: Caller) -> tuple[int | None, str]:
    return caller.status, told(caller)["error"]["code"]


class Cut(httpx.AsyncByteStream):
    """A body that ends before its end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"id":"cut", "input'
        raise httpx.ReadError("cut")


# What becomes of a create at Replicate, and whether that says that nothing was made.
OUTCOMES = {
    "made": False,
    "accepted": False,
    "refused": True,
    "throttled": True,
    "conflict": False,
    "timeout": False,
    "error": False,
    "moved": False,
    "no id": False,
    "cut": False,
    "dropped": False,
    "late": False,
    "unreachable": True,
    "overloaded": True,
    "broken": False,
}
_STATUSES = {
    "accepted": 202,
    "refused": 422,
    "throttled": 429,
    "conflict": 409,
    "timeout": 408,
    "error": 500,
    "moved": 307,
}
_ERRORS = {"dropped": httpx.ReadError, "late": httpx.ReadTimeout, "broken": ZeroDivisionError}
_BEFORE = {"unreachable": httpx.ConnectError, "overloaded": httpx.PoolTimeout}


@dataclass
class Replicate(httpx.AsyncBaseTransport):
    """Does with creates as it is told, and shows what was made.

    Attributes:
        outcomes: words of `OUTCOMES` for the next creates; then all are `made`.
        made: who paid, for what and where, by the id of what was made.
        arrived: the same for all creates of which a byte was sent, whatever became of them.
        hold: what creates wait for once they have arrived.
        shown: what reads answer for an id in the place of what was made.
        status: of what a create has made.
    """

    outcomes: list[str] = field(default_factory=list)
    made: dict[str, tuple[bytes, str, bytes]] = field(default_factory=dict)
    arrived: list[tuple[bytes, str, bytes]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    hold: anyio.Event | None = None
    waiting: anyio.Event | None = None
    shown: dict[str, httpx.Response | Exception] = field(default_factory=dict)
    status: str = "starting"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await (self._read(request) if request.method == "GET" else self._create(request))

    async def _read(self, request: httpx.Request) -> httpx.Response:
        id = request.url.path.rpartition("/")[2]
        self.reads.append(request.url.path)
        shown = self.shown.get(id)
        if isinstance(shown, Exception):
            raise shown
        if shown is not None:
            return shown
        who = request.headers["authorization"].encode()
        if id not in self.made or self.made[id][0] != who:
            return _json(404, {"detail": "Not found."})
        return _json(200, {"id": id, "status": "processing"})

    async def _create(self, request: httpx.Request) -> httpx.Response:
        word = self.outcomes.pop(0) if self.outcomes else "made"
        if word in _BEFORE:
            raise _BEFORE[word]("nothing was sent")
        what = request.headers["authorization"].encode(), request.url.path, await request.aread()
        self.arrived.append(what)
        if self.waiting is not None:
            self.waiting.set()
        if self.hold is not None:
            await self.hold.wait()
        if word in _ERRORS:
            raise _ERRORS[word]("after it was sent")
        if word in ("made", "accepted"):
            id = f"p{len(self.made)}"
            self.made[id] = what
            return _json(_STATUSES.get(word, 201), {"id": id, "status": self.status})
        if word == "cut":
            return httpx.Response(201, headers={"content-type": "application/json"}, stream=Cut())
        return _json(_STATUSES.get(word, 201), {"detail": word})


def _json(status: int, content: Any) -> httpx.Response:
    body = json.dumps(content).encode()
    # A stream, since what httpx has at hand already is none.
    headers = {"content-type": "application/json", "content-length": str(len(body)), "ratelimit-remaining": "7"}
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


async def nothing() -> None:
    pass


async def refuses() -> None:
    raise OSError("hunter2")


async def hangs() -> None:
    await anyio.sleep_forever()


class SwitchedOnce(MemoryOnceStore):
    """A store with a switch for each method: what is awaited before and after it is done may fail."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}
        self.calls: list[str] = []

    async def _before(self, name: str) -> None:
        self.calls.append(name)
        await self.before.get(name, nothing)()

    async def begin(self, key: str, create: KeyedCreate, lifetime: float, /) -> KeyedCreate | None:
        await self._before("begin")
        known = await super().begin(key, create, lifetime)
        await self.after.get("begin", nothing)()
        return known

    async def end(self, key: str, create: KeyedCreate, lifetime: float, /) -> None:
        await self._before("end")
        await super().end(key, create, lifetime)
        await self.after.get("end", nothing)()

    async def forget(self, key: str, mark: str, /) -> None:
        await self._before("forget")
        await super().forget(key, mark)
        await self.after.get("forget", nothing)()

    async def put_result(self, key: str, id: str, lifetime: float, /) -> None:
        await self._before("put_result")
        await super().put_result(key, id, lifetime)
        await self.after.get("put_result", nothing)()

    async def result(self, key: str, /) -> EarlierResult | None:
        await self._before("result")
        known = await super().result(key)
        await self.after.get("result", nothing)()
        return known
