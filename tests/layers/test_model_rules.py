from __future__ import annotations

import json
from typing import Any

import pytest

from replicate_proxy_mw import Forward, Policy, ProxyRequest, ProxyResponse, ReplicateKey, StaticKeyResolver, routing
from replicate_proxy_mw import portkey as portkey_headers
from replicate_proxy_mw.errors import PermissionDenied, UpstreamFailed
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.layers import model_rules
from replicate_proxy_mw.layers.model_rules import check_models
from replicate_proxy_mw.testing import FakeModel, FakeReplicate
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

JSON = (b"content-type", b"application/json")
HELLO = "replicate/hello-world"
HELLO_ID = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
PRIVATE = FakeModel(owner="other", name="private", run=str, visibility="private")
OWN = FakeModel(owner="acme", name="own", run=str, visibility="private")
PRIVATE_ID, OWN_ID = ((model.versions or ())[0].id for model in (PRIVATE, OWN))


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN: "acme", "r8_" + "1" * 37: "other"}, "models": [PRIVATE, OWN]}


def _app(upstream: str, models: list[str] | None, *, lookup: bool = False, **options: Any) -> Any:
    key = ReplicateKey(TOKEN, tenant="team-a", policy=Policy(models=models))
    resolver = StaticKeyResolver(key, api_keys=["pk-team-a"])
    return proxy(upstream, key_resolver=resolver, options={"lookup_versions": lookup, **options})


async def _create(app: Any, version: str, **more: Any) -> Caller:
    return await _post(app, "/predictions", {"version": version, "input": {"text": "x"}, **more})


async def _post(app: Any, target: str, body: Any, method: str = "POST") -> Caller:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await call(app, http_scope(method, "/v1" + target, [KEY, JSON]), content)


def _refusal(caller: Caller) -> tuple[int | None, str]:
    error = json.loads(caller.content)["error"]
    assert error["code"] == "permission_denied"
    return caller.status, error["message"]


# --- without lookups


async def test_a_key_without_the_rule_may_name_anything_in_any_way(upstream: RawUpstream) -> None:
    app = _app(upstream.url, None)
    body = b'{"data" : not JSON'
    assert (await _post(app, "/predictions?version=x", body)).status == 200
    assert upstream.requests[0].body == body


@pytest.mark.parametrize(
    ("models", "version"),
    [([HELLO], f"{HELLO}:{HELLO_ID}"), (["meta/*"], "meta/meta-llama-3-8b-instruct"), (["*/*"], f"{HELLO}:{HELLO_ID}")],
)
async def test_an_allowed_model(fake_replicate: FakeReplicate, models: list[str], version: str) -> None:
    body = {"version": version, "input": {"text": "\u00fc", "prompt": "x"}}
    content = json.dumps(body, indent=1, ensure_ascii=False).encode()
    caller = await _post(_app(fake_replicate.url, models), "/predictions", content)
    assert caller.status == 201
    [arrived] = fake_replicate.requests
    assert arrived.body == content


@pytest.mark.parametrize(
    ("method", "target", "body", "message"),
    [
        ("POST", "/predictions", {"version": "meta/x"}, "models: this key may not use meta/x."),
        ("POST", "/predictions", {"version": HELLO_ID}, "models: write owner/name:id; "),
        ("POST", "/predictions", {"version": HELLO_ID, "model": HELLO}, "models: write owner/name:id; "),
        ("POST", "/predictions", {}, "models: the body has no version, since this key is restricted"),
        ("POST", "/predictions?x=y", {"version": HELLO}, "models: this operation takes no query, since"),
        ("POST", "/models/meta/x/predictions", {}, "models: this key may not use meta/x."),
        ("GET", "/models/meta/x/readme", b"", "models: this key may not use meta/x."),
        ("GET", "/models/me%20ta/x", b"", "operations: "),
        (
            "POST",
            "/deployments/replicate/hello-world/predictions",
            {},
            "may not use deployments/replicate/hello-world.",
        ),
        ("PATCH", "/deployments/acme/hello", {"version": HELLO_ID}, "models: write owner/name:id; "),
        ("PATCH", "/deployments/acme/hello", {"version": f"meta/x:{HELLO_ID}"}, "models: this key may not use meta/x."),
        ("POST", "/deployments", {"model": "meta/x", "version": HELLO_ID}, "models: this key may not use meta/x."),
        (
            *("POST", f"/models/{HELLO}/versions/{HELLO_ID}/trainings"),
            *({"destination": "acme/x"}, "models: this key may not use acme/x."),
        ),
        ("POST", "/models", {"owner": "acme", "name": "x"}, "models: this key may not use acme/x."),
    ],
)
async def test_what_is_refused_does_not_go_up(
    upstream: RawUpstream, method: str, target: str, body: Any, message: str
) -> None:
    app = _app(upstream.url, [HELLO, "deployments/acme/hello"])
    status, said = _refusal(await _post(app, target, body, method))
    assert status == 403
    assert message in said
    assert upstream.connections == []


async def test_what_names_no_model_passes(fake_replicate: FakeReplicate) -> None:
    app = _app(fake_replicate.url, [HELLO])
    for target in ("/predictions", "/models?cursor=", "/account"):
        assert (await call(app, http_scope("GET", "/v1" + target))).status == 200
    made = await _create(app, f"{HELLO}:{HELLO_ID}")
    path = f"/predictions/{json.loads(made.content)['id']}/cancel"
    assert (await _post(app, path, {"version": "meta/x"})).status == 200


async def test_the_wrap_of_portkey_s_sdk_comes_off_before(fake_replicate: FakeReplicate) -> None:
    wrapped = {"data": {"version": f"{HELLO}:{HELLO_ID}", "input": {"text": "x"}}}
    assert (await _post(_app(fake_replicate.url, [HELLO]), "/predictions", wrapped)).status == 201
    caller = await _post(_app(fake_replicate.url, [HELLO], unwrap_data=False), "/predictions", wrapped)
    assert _refusal(caller)[0] == 403
    assert len(fake_replicate.requests) == 1


async def test_a_body_that_comes_in_pieces(upstream: RawUpstream) -> None:
    app = _app(upstream.url, [HELLO])
    scope = http_scope("POST", "/v1/predictions", [KEY, JSON])
    assert (await call(app, scope, b'{"version"', b': "', HELLO.encode(), b'"}')).status == 200
    assert b'{"version": "%s"}' % HELLO.encode() in upstream.requests[0].body


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 403)])
async def test_a_body_is_searched_up_to_its_bound(upstream: RawUpstream, more: int, status: int) -> None:
    body = b'{"version": "%s"}' % HELLO.encode()
    body += b" " * (model_rules.MAX_SIZE - len(body) + more)
    caller = await _post(_app(upstream.url, [HELLO]), "/predictions", body)
    assert caller.status == status
    assert len(upstream.requests) == (status == 200)


# --- with lookups

VERSION = "/v1/models/{}/versions/{}"


def _targets(fake: FakeReplicate) -> list[str]:
    return [f"{one.method} {one.target.decode()}" for one in fake.requests]


async def test_a_version_is_looked_up_once(fake_replicate: FakeReplicate) -> None:
    app = _app(fake_replicate.url, ["meta/*", "acme/own", HELLO, "deployments/acme/hello"], lookup=True)
    for _ in range(2):
        assert (await _create(app, HELLO_ID)).status == 201
    assert _targets(fake_replicate) == [
        "GET " + VERSION.format("acme/own", HELLO_ID),
        "GET " + VERSION.format(HELLO, HELLO_ID),
        "POST /v1/predictions",
        "POST /v1/predictions",
    ]
    looked_up = fake_replicate.requests[1]
    assert looked_up.body == b""
    assert looked_up.header("content-type") is None
    assert looked_up.header("accept-encoding") == "identity"


async def test_a_model_s_own_version(fake_replicate: FakeReplicate) -> None:
    app = _app(fake_replicate.url, ["*/*"], lookup=True)
    assert (await _create(app, f"{HELLO}:{HELLO_ID}")).status == 201
    assert (await _create(app, "meta/meta-llama-3-8b-instruct", input={"prompt": "x"})).status == 201
    message = "models: this version id is none of a model that this key may use."
    assert _refusal(await _create(app, f"{HELLO}:{OWN_ID}")) == (403, message)
    # Globs name nothing to look a bare id up in.
    assert _refusal(await _create(app, HELLO_ID)) == (403, message)
    assert [target for target in _targets(fake_replicate) if "POST" not in target] == [
        "GET " + VERSION.format(HELLO, HELLO_ID),
        "GET " + VERSION.format(HELLO, OWN_ID),
    ]


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/deployments", {"name": "n", "model": HELLO, "version": OWN_ID}),
        ("PATCH", "/deployments/acme/hello", {"version": OWN_ID}),
        ("POST", f"/models/{HELLO}/versions/{OWN_ID}/trainings", {"destination": HELLO, "input": {}}),
        ("POST", "/predictions", {"version": OWN_ID, "model": HELLO}),
    ],
)
async def test_another_model_s_version(fake_replicate: FakeReplicate, method: str, target: str, body: Any) -> None:
    app = _app(fake_replicate.url, [HELLO, "deployments/acme/hello"], lookup=True)
    status, message = _refusal(await _post(app, target, body, method))
    assert (status, message) == (403, "models: this version id is none of a model that this key may use.")
    assert _targets(fake_replicate) == ["GET " + VERSION.format(HELLO, OWN_ID)]


async def test_a_private_model_of_another_account(fake_replicate: FakeReplicate) -> None:
    app = _app(fake_replicate.url, ["other/private", "acme/own"], lookup=True)
    assert _refusal(await _create(app, PRIVATE_ID))[0] == 403
    assert (await _create(app, OWN_ID)).status == 201


async def test_an_unknown_version_has_so_many_candidates(
    fake_replicate: FakeReplicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_rules, "MAX_CANDIDATES", 2)
    app = _app(fake_replicate.url, ["a/a", "b/b", HELLO], lookup=True)
    assert _refusal(await _create(app, HELLO_ID))[0] == 403
    assert len(fake_replicate.requests) == 2


class Replicate:
    """What is below the layer: answers lookups with `status`, anything else with 201."""

    def __init__(self, *known: str, status: int = 404) -> None:
        self.known, self.status = set(known), status
        self.asked: list[str] = []
        self.closed = 0
        self.now = 0.0
        self.layer: Forward = check_models(lookup_versions=True, now=lambda: self.now)(self.forward)

    async def forward(self, request: ProxyRequest) -> ProxyResponse:
        self.asked.append(f"{request.method} {request.target}")

        async def aclose() -> None:
            self.closed += 1

        status = 201 if request.method == "POST" else 200 if request.target in self.known else self.status
        return ProxyResponse(status=status, headers=(JSON,), body=Chunks([b"{", b"}"]), aclose=aclose)

    async def create(self, version: str, *, tenant: str | None = "team-a") -> int:
        request = ProxyRequest(
            method="POST",
            target="/predictions",
            route=routing.match("POST", "/predictions"),
            headers=(JSON, (b"prefer", b"wait")),
            body=Chunks([json.dumps({"version": version}).encode()]),
            content_length=None,
            key=ReplicateKey(TOKEN, tenant=tenant, policy=Policy(models=["a/b"])),
            portkey=portkey_headers.read([KEY]),
            scope=http_scope(),
        )
        return (await self.layer(request)).status


async def test_what_was_not_found_is_looked_up_again_after_a_while() -> None:
    replicate = Replicate()
    for replicate.now in (0.0, 59.9):
        with pytest.raises(PermissionDenied, match="models: this version id is none"):
            await replicate.create("v1")
    assert len(replicate.asked) == 1
    replicate.known.add("/models/a/b/versions/v1")
    for replicate.now in (60.0, 1e9):
        assert await replicate.create("v1") == 201
    assert replicate.asked == ["GET /models/a/b/versions/v1"] * 2 + ["POST /predictions"] * 2
    assert replicate.closed == 2


async def test_what_one_tenant_s_token_sees_says_nothing_of_another_s() -> None:
    replicate = Replicate("/models/a/b/versions/v1")
    for tenant in ("team-a", "team-b", None):
        assert await replicate.create("v1", tenant=tenant) == 201
    assert replicate.asked.count("GET /models/a/b/versions/v1") == 3


async def test_the_version_that_was_not_asked_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_rules, "MAX_REMEMBERED", 2)
    replicate = Replicate(*(f"/models/a/b/versions/{version}" for version in "123"))
    for version in "121323":
        assert await replicate.create(version) == 201
    looked_up = [target[-1] for target in replicate.asked if target.startswith("GET")]
    assert looked_up == ["1", "2", "3", "2"]


@pytest.mark.parametrize("status", [403, 404])
async def test_what_cannot_be_seen_is_not_there(status: int) -> None:
    with pytest.raises(PermissionDenied):
        await Replicate(status=status).create("v1")


@pytest.mark.parametrize("status", [204, 302, 401, 429, 500, 503])
async def test_a_lookup_that_fails_creates_nothing_and_is_not_remembered(status: int) -> None:
    replicate = Replicate(status=status)
    for _ in range(2):
        with pytest.raises(UpstreamFailed, match="could not be looked up at Replicate; nothing was created"):
            await replicate.create("v1")
    assert replicate.asked == ["GET /models/a/b/versions/v1"] * 2
    assert replicate.closed == 2
    replicate.status = 404
    replicate.known.add("/models/a/b/versions/v1")
    assert await replicate.create("v1") == 201


async def test_replicate_failing_during_the_lookup(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")

    upstream.script = script
    caller = await _create(_app(upstream.url, [HELLO], lookup=True), HELLO_ID)
    assert caller.status == 502
    assert [one.line[:4] for one in upstream.requests] == [b"GET "]


async def test_the_connection_of_a_lookup_is_used_again(upstream: RawUpstream) -> None:
    app = _app(upstream.url, [HELLO], lookup=True)
    assert (await _create(app, HELLO_ID)).status == 200
    assert [one.line.split()[0] for one in upstream.requests] == [b"GET", b"POST"]
    assert len(upstream.connections) == 1


async def test_nothing_of_the_request_but_the_version_is_on_the_lookup(upstream: RawUpstream) -> None:
    await _create(_app(upstream.url, [HELLO], lookup=True), HELLO_ID)
    lookup = upstream.requests[0]
    assert {name for name, _ in lookup.headers} == {b"host", b"via", b"authorization", b"accept-encoding"}
    assert lookup.body == b""
