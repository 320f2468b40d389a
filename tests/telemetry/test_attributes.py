from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest

from replicate_proxy_mw import ProxyRequest, ReplicateKey
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from replicate_proxy_mw.telemetry import attributes
from tests.raw_asgi import TOKEN, http_scope


def _attempt(method: str, target: str, upstream: str = "https://api.replicate.com/v1", **more: Any) -> Any:
    request = ProxyRequest(
        method=method,
        target=target,
        route=match(method, target.partition("?")[0]),
        headers=(),
        body=Chunks([]),
        content_length=0,
        key=ReplicateKey(TOKEN),
        scope={},
        **({"portkey": PortkeyContext()} | more),
    )
    return attributes.of_attempt(request, urlsplit(upstream))


def test_a_scope() -> None:
    scope = http_scope(target="/v1/a%2Fb?key=secret", headers=[(b"user-agent", b"x" * 300)])
    assert attributes.of_scope(scope) == {
        "url.scheme": "http",
        "url.path": "/v1/a%2Fb",
        "network.protocol.version": "1.1",
        "server.address": "proxy.test",
        "server.port": 80,
        "client.address": "192.0.2.1",
        "user_agent.original": "x" * 256,
    }


def test_a_scope_of_a_server_that_tells_little() -> None:
    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": []}
    assert attributes.of_scope(scope) == {
        "url.scheme": "http",
        "url.path": "/v1/x",
        "network.protocol.version": "1.1",
    }


def test_a_scope_of_a_unix_socket() -> None:
    scope = http_scope(server=("/run/app.sock", None), client=None)
    assert attributes.of_scope(scope)["server.address"] == "/run/app.sock"
    assert "server.port" not in attributes.of_scope(scope)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nope", {}),
        ("GET", "/account", {"replicate.operation": "account.get"}),
        (
            "POST",
            "/predictions/p1/cancel",
            {"replicate.operation": "predictions.cancel", "replicate.prediction.id": "p1"},
        ),
        ("GET", "/trainings/t1", {"replicate.operation": "trainings.get", "replicate.training.id": "t1"}),
        (
            "GET",
            "/models/o/m/versions/v1",
            {"replicate.operation": "models.versions.get", "replicate.model.version": "v1"},
        ),
        (
            "POST",
            "/deployments/acme/hello/predictions",
            {"replicate.operation": "deployments.predictions.create", "replicate.deployment": "acme/hello"},
        ),
        ("PUT", "/predictions/p1", {"replicate.prediction.id": "p1"}),
    ],
)
def test_a_route(method: str, path: str, expected: dict[str, str]) -> None:
    assert attributes.of_route(match(method, path)) == expected


def test_what_the_caller_says() -> None:
    context = PortkeyContext(
        trace_id="order-42",
        span_id="s",
        parent_span_id="p",
        span_name="n",
        provider="@team",
        metadata={"_user": "u1", "a b.c": "ü"},
    )
    assert attributes.of_portkey(context) == {
        "portkey.trace_id": "order-42",
        "portkey.span_id": "s",
        "portkey.parent_span_id": "p",
        "portkey.span_name": "n",
        "portkey.metadata._user": "u1",
        "portkey.metadata.a_b_c": "ü",
    }
    assert attributes.of_caller(context) == {
        "portkey.provider": "@team",
        "portkey.metadata_json": '{"_user":"u1","a b.c":"\\u00fc"}',
    }
    assert attributes.of_caller(PortkeyContext(metadata_invalid=True)) == {"portkey.metadata_invalid": True}
    assert attributes.of_portkey(PortkeyContext()) == attributes.of_caller(PortkeyContext()) == {}


def test_an_attempt_at_a_create() -> None:
    assert _attempt("POST", "/models/meta/llama/predictions", portkey=PortkeyContext(trace_id="t")) == {
        "http.request.method": "POST",
        "url.full": "https://api.replicate.com/v1/models/meta/llama/predictions",
        "url.template": "/v1/models/{model_owner}/{model_name}/predictions",
        "server.address": "api.replicate.com",
        "server.port": 443,
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "create_prediction",
        "gen_ai.request.model": "meta/llama",
        "portkey.trace_id": "t",
    }


def test_an_attempt_at_a_create_of_a_version_does_not_know_the_model() -> None:
    found = _attempt("POST", "/predictions")
    assert found["gen_ai.operation.name"] == "create_prediction"
    assert "gen_ai.request.model" not in found


def test_an_attempt_at_a_read() -> None:
    found = _attempt("GET", "/predictions/p1", "http://127.0.0.1:81", resend_count=2)
    assert (found["gen_ai.operation.name"], found["gen_ai.response.id"]) == ("fetch_response", "p1")
    assert (found["server.address"], found["server.port"]) == ("127.0.0.1", 81)
    assert found["url.template"] == "/predictions/{prediction_id}"
    assert found["http.request.resend_count"] == 2


@pytest.mark.parametrize("target", ["/account", "/nope"])
def test_an_attempt_at_something_else(target: str) -> None:
    assert not any(name.startswith("gen_ai.") for name in _attempt("GET", target, "http://localhost"))


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/predictions", "/predictions"),
        ("/predictions?cursor=abc&source=web", "/predictions?cursor=abc&source=web"),
        ("/files/f/download?expiry=1&signature=s", "/files/f/download?expiry=REDACTED&signature=REDACTED"),
        ("/search?query=secret+plan&limit=5&flag", "/search?query=REDACTED&limit=5&REDACTED"),
        ("/x?", "/x?"),
        ("/x?pk-team-a", "/x?REDACTED"),
    ],
)
def test_a_query_tells_no_secret(target: str, shown: str) -> None:
    assert attributes.redacted(target) == shown


def test_invented_methods_are_one() -> None:
    assert (attributes.method("FOO"), attributes.span_name("FOO", "/v1/{path}")) == ("_OTHER", "HTTP /v1/{path}")
    assert (attributes.method("QUERY"), attributes.span_name("QUERY", "/v1/models")) == ("QUERY", "QUERY /v1/models")
