"""A raw ASGI driver: no server and no client library in between, so that nothing is buffered or repaired."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import anyio

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateKey, ReplicateProxyMiddleware

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

TOKEN = "r8_Wq4Zk7TnXb2LmRv9JdHs6PyFc3GaQe8Uo1K"
KEY = (b"x-portkey-api-key", b"pk-team-a")


async def host(scope: Any, receive: Any, send: Any) -> None:
    """A host that answers everything with its own name."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"host"})


def proxy(upstream: str, *, app: ASGIApp = host, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
    """The middleware in front of `app`, which knows `pk-team-a` and `pk-team-b`."""
    keywords.setdefault(
        "key_resolver",
        MappingKeyResolver(
            {"pk-team-a": ReplicateKey(TOKEN, tenant="team-a"), "pk-team-b": "r8_1111111111111111111111111111"}
        ),
    )
    return ReplicateProxyMiddleware(app, config=ProxyConfig(upstream=upstream, **(options or {})), **keywords)


def http_scope(
    method: str = "GET", target: str = "/v1/x", headers: Iterable[tuple[bytes, bytes]] = (KEY,), **more: Any
) -> dict[str, Any]:
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(b"host", b"proxy.test"), *headers],
        "client": ("192.0.2.1", 4321),
        "server": ("proxy.test", 80),
        "state": {},
        **more,
    }


@dataclass
class Caller:
    """The caller's end of one exchange: what it sends, when it leaves, and what it has got so far.

    A second `receive()` while one is pending fails, as does a message after the end.
    """

    body: list[bytes] = field(default_factory=lambda: [b""])
    status: int | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False
    received: int = 0
    left: anyio.Event = field(default_factory=anyio.Event)
    started: anyio.Event = field(default_factory=anyio.Event)
    got_chunk: anyio.Event = field(default_factory=anyio.Event)
    hold_upload: anyio.Event | None = None
    _reading: bool = False

    @property
    def content(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    async def receive(self) -> dict[str, Any]:
        assert not self._reading, "two readers of receive()"
        self._reading = True
        try:
            self.received += 1
            if self.hold_upload is not None and self.received > 1:
                async with anyio.create_task_group() as tasks:
                    for event in (self.hold_upload, self.left):
                        tasks.start_soon(self._first, event, tasks.cancel_scope)
            if self.body and not self.left.is_set():
                chunk = self.body.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(self.body)}
            await self.left.wait()
            return {"type": "http.disconnect"}
        finally:
            self._reading = False

    @staticmethod
    async def _first(event: anyio.Event, others: anyio.CancelScope) -> None:
        await event.wait()
        others.cancel()

    async def send(self, message: dict[str, Any]) -> None:
        assert not self.complete, "a message after the end"
        if message["type"] == "http.response.start":
            assert self.status is None
            self.status, self.headers = message["status"], list(message["headers"])
            self.started.set()
        else:
            if message["body"]:
                self.chunks.append(message["body"])
                self.got_chunk.set()
            self.complete = not message.get("more_body", False)

    async def call(self, app: ASGIApp, scope: dict[str, Any]) -> Caller:
        with anyio.fail_after(10):
            await app(scope, self.receive, self.send)
        return self


class Arriving:
    """A body that arrives in chunks and can be read once, as one from upstream."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)

    def __aiter__(self) -> Arriving:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


async def call(app: ASGIApp, scope: dict[str, Any], *body: bytes) -> Caller:
    """One exchange with a caller that stays; closes the proxy's connections afterwards, where `app` is the proxy."""
    try:
        return await Caller(list(body) or [b""]).call(app, scope)
    finally:
        if isinstance(app, ReplicateProxyMiddleware):
            await app.aclose()
