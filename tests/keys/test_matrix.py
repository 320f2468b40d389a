"""Every resolver, in every host, with all that can come of a key: what the caller, Replicate and the span see."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from replicate_proxy_mw import (
    KeyRequest,
    KeyResolver,
    MappingKeyResolver,
    PermissionDenied,
    Policy,
    ProxyConfig,
    ReplicateKey,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
)
from replicate_proxy_mw.keys import CachedKeyResolver, EnvKeyResolver, FileKeyResolver, FirstOf
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.telemetry.names import OUTCOME, TENANT
from replicate_proxy_mw.testing import FakeReplicate
from tests.raw_asgi import Caller, host, http_scope

pytestmark = pytest.mark.anyio

TOKEN, OTHER_TOKEN = "r8_00000000000000000000000000000000000", "r8_11111111111111111111111111111111111"
KNOWN, UNKNOWN = "pk-known-0123456789abcdef", "pk-unknown-0123456789abcdef"
SECRETS = (TOKEN, OTHER_TOKEN, KNOWN, UNKNOWN, "hunter2")

# What a resolver does before it answers; it may raise, hang, or answer by itself.
Step = Callable[[], Awaitable[Any]]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(tokens={TOKEN: "acme", OTHER_TOKEN: "ada"}).serve() as fake:
        yield fake


@pytest.fixture
async def transport() -> AsyncIterator[httpx.AsyncHTTPTransport]:
    async with httpx.AsyncHTTPTransport(verify=False) as transport:  # of no CA list, which takes a while to read
        yield transport


# --- resolvers: each knows one key, of team-a


def _key(policy: Policy, token: str = TOKEN) -> ReplicateKey:
    return ReplicateKey(token, tenant="team-a", policy=policy)


def _static(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    return _after(step, StaticKeyResolver(_key(policy), api_keys=[KNOWN]))


def _mapping(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    return _after(step, MappingKeyResolver({KNOWN: _key(policy)}))


def _slugs(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    return _after(step, MappingKeyResolver({KNOWN: {"main": _key(policy), "video": _key(policy, OTHER_TOKEN)}}))


def _env(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    environ = {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_PROXY_KEYS": f"team-a={KNOWN}"}
    return _after(step, EnvKeyResolver(environ=environ, policy=policy))


def _file(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    limit = "" if policy.max_in_flight is None else f"max_in_flight = {policy.max_in_flight}"
    expiry = "" if policy.expires_at is None else f"expires_at = {policy.expires_at.isoformat()}"
    path = folder / "keys.toml"
    path.write_text(f"""
        [providers.main]
        token = "env:MAIN"
        [providers.video]
        token = "env:VIDEO"
        [policies.all]
        operations = {json.dumps(policy.operations)}
        {limit}
        {expiry}
        [tenants.team-a]
        providers = ["main", "video"]
        policy = "all"
        [keys.one]
        digest = "sha256:{sha256(KNOWN.encode()).hexdigest()}"
        tenant = "team-a"
    """)
    return _after(step, FileKeyResolver(path, environ={"MAIN": TOKEN, "VIDEO": OTHER_TOKEN}))


def _first_of(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    others = MappingKeyResolver({"pk-of-somebody-else": OTHER_TOKEN})
    return FirstOf(others, _function(policy, folder, step), StaticKeyResolver(OTHER_TOKEN, api_keys=["pk-of-a-third"]))


def _cached(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    return CachedKeyResolver(_function(policy, folder, step))


def _function(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    async def key_of_team(request: KeyRequest) -> Any:
        answer = None if step is None else await step()
        return answer or (_key(policy) if request.api_key == KNOWN else None)

    return key_of_team


def _session(policy: Policy, folder: Path, step: Step | None) -> KeyResolver:
    async def key_of_session(request: KeyRequest) -> Any:
        answer = None if step is None else await step()
        return answer or (_key(policy) if request.scope["session"].get("team") == "team-a" else None)

    return key_of_session


def _after(step: Step | None, inner: KeyResolver) -> KeyResolver:
    """These never fail by themselves, but something of the host may around them."""

    async def resolver(request: KeyRequest) -> Any:
        answer = None if step is None else await step()
        return answer or await inner(request)

    return resolver if step else inner


RESOLVERS = {
    "static": _static,
    "mapping": _mapping,
    "accounts by slug": _slugs,
    "env": _env,
    "file": _file,
    "first of": _first_of,
    "cached": _cached,
    "function": _function,
    "session": _session,
}


# --- hosts


def _bare(**keywords: Any) -> Any:
    return ReplicateProxyMiddleware(host, **keywords)


def _fastapi(**keywords: Any) -> Any:
    app = FastAPI()
    app.add_middleware(ReplicateProxyMiddleware, **keywords)
    return app


def _litestar(**keywords: Any) -> Any:
    return Litestar(plugins=[ReplicateProxyPlugin(**keywords)], logging_config=None)


HOSTS = {"bare": _bare, "fastapi": _fastapi, "litestar": _litestar}


# --- outcomes


async def _denies() -> None:
    raise PermissionDenied("This team reads the archive only.")


async def _raises() -> None:
    raise RuntimeError(f"hunter2 {TOKEN} {KNOWN}")


async def _answers_rubbish() -> str:
    return "hunter2 is no token"


@dataclass(frozen=True)
class Outcome:
    """`status`, `code` and `outcome` of one request; with a `tenant` where it is known by then."""

    status: int
    code: str
    outcome: str
    tenant: str | None = "team-a"
    says: str = ""
    policy: Policy = field(default_factory=Policy)
    step: Step | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    known: bool = True
    under_way: bool = False
    only: frozenset[str] = frozenset(RESOLVERS)
    logs: tuple[str, ...] = ()


BY_SLUG = frozenset(("accounts by slug", "file"))

OUTCOMES = {
    "known": Outcome(201, "", "forwarded"),
    "another account": Outcome(201, "", "forwarded", headers=((b"x-portkey-provider", b"@video"),), only=BY_SLUG),
    "unknown": Outcome(401, "key_unknown", "auth_invalid", None, known=False),
    "denied": Outcome(403, "permission_denied", "denied", None, "the archive only", step=_denies),
    "no such account": Outcome(
        403,
        "permission_denied",
        "denied",
        None,
        "no provider of that name",
        headers=((b"x-portkey-provider", b"@nope"),),
        only=BY_SLUG,
    ),
    "raises": Outcome(
        503, "resolver_failed", "resolver_error", None, step=_raises, logs=("key resolver failed: RuntimeError",)
    ),
    "hangs": Outcome(
        503,
        "resolver_failed",
        "resolver_error",
        None,
        step=anyio.sleep_forever,
        logs=("key resolver failed: TimeoutError",),
    ),
    "answers rubbish": Outcome(
        503, "resolver_failed", "resolver_error", None, step=_answers_rubbish, logs=("key resolver failed: ValueError",)
    ),
    "expired": Outcome(
        403,
        "permission_denied",
        "denied",
        says="expires_at: ",
        policy=Policy(expires_at=datetime(2026, 1, 1, tzinfo=UTC)),
    ),
    "operation refused": Outcome(
        403,
        "permission_denied",
        "denied",
        says="operations: ",
        policy=Policy(operations=["predictions.get", "account.*"]),
    ),
    "one too many": Outcome(
        429, "limit_exceeded", "limited", says="max_in_flight: ", policy=Policy(max_in_flight=1), under_way=True
    ),
}
CELLS = [(resolver, outcome) for resolver in RESOLVERS for outcome in OUTCOMES if resolver in OUTCOMES[outcome].only]

BODY = b'{"version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa", "input": {"text": "Ada"}}'


def _scope(outcome: Outcome, *, has_key: bool) -> dict[str, Any]:
    """With a key, or with the session of a host that goes without."""
    key = [(b"x-portkey-api-key", (KNOWN if outcome.known else UNKNOWN).encode())] if has_key else []
    headers, session = [*key, *outcome.headers], {"team": "team-a"} if outcome.known and not has_key else {}
    return http_scope("POST", "/v1/predictions", [*headers, (b"content-type", b"application/json")], session=session)


@pytest.mark.parametrize("framework", HOSTS)
@pytest.mark.parametrize(("resolver", "expected"), CELLS)
async def test_what_comes_of_a_key(
    resolver: str,
    expected: str,
    framework: str,
    fake: FakeReplicate,
    transport: httpx.AsyncHTTPTransport,
    tmp_path: Path,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcome, has_key = OUTCOMES[expected], resolver != "session"
    if expected == "unknown" and not has_key:
        outcome = replace(outcome, code="key_missing", outcome="auth_missing")
    timeout = 0.02 if expected == "hangs" else 2.0
    fake.requests.clear()
    app = HOSTS[framework](
        key_resolver=RESOLVERS[resolver](outcome.policy, tmp_path, outcome.step),
        config=ProxyConfig(upstream=fake.url, resolver_timeout=timeout, require_key=has_key),
        transport=transport,
        tracer_provider=tracer_provider,
    )
    caller, before = Caller([BODY]), 0
    with caplog.at_level(logging.DEBUG):
        if outcome.under_way:
            before = 1
            async with _under_way(app, _scope(outcome, has_key=has_key)):
                await caller.call(app, _scope(outcome, has_key=has_key))
        else:
            await caller.call(app, _scope(outcome, has_key=has_key))

    content = json.loads(caller.content)
    assert caller.complete
    assert caller.status == outcome.status
    assert content.get("error", {}).get("code", "") == outcome.code if outcome.code else content["id"]
    assert outcome.says in content.get("detail", "")
    token = OTHER_TOKEN if expected == "another account" else TOKEN
    sent = [(one.operation, one.header("authorization")) for one in fake.requests]
    assert sent == [("predictions.create", f"Bearer {token}")] * (before + (outcome.status == 201))
    assert not fake.violations

    spans = exporter.get_finished_spans()
    span = next(one for one in spans if one.kind is SpanKind.SERVER)  # that of the other, if there is one, ends later
    assert span.attributes is not None
    assert (span.attributes[OUTCOME], span.attributes.get(TENANT)) == (outcome.outcome, outcome.tenant)
    ours = [record.message for record in caplog.records if record.name == "replicate_proxy_mw"]
    assert ours == list(outcome.logs)

    told = [caller.content.decode(), repr(caller.headers), caplog.text, *(one.to_json() for one in spans)]
    assert [(secret, text) for secret in SECRETS for text in told if secret in text] == []


class _under_way:
    """A request whose caller does not read its answer, as long as the context lasts."""

    def __init__(self, app: Any, scope: dict[str, Any]) -> None:
        self._app, self._scope = app, scope

    async def __aenter__(self) -> None:
        caller, self._reads = Caller([BODY]), anyio.Event()

        async def send(message: dict[str, Any]) -> None:
            await caller.send(message)
            if not caller.complete:
                await self._reads.wait()

        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._app, self._scope, caller.receive, send)
        await caller.started.wait()

    async def __aexit__(self, *raised: Any) -> None:
        self._reads.set()
        await self._tasks.__aexit__(*raised)
