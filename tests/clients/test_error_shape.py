"""What the clients make of an answer that is the proxy's own."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from replicate_proxy_mw.errors import KeyUnknown, UpstreamFailed
from replicate_proxy_mw.testing import serve
from tests.clients.drivers import Client, Refused
from tests.raw_asgi import proxy
from tests.raw_upstream import Connection, RawUpstream

STATUS_ERRORS = {401: "AuthenticationError", 502: "InternalServerError"}
REPLICATE_ERROR = {401: "ReplicateError", 502: "ReplicateError"}
API_ERROR = {401: "ApiError", 502: "ApiError"}
CURL = {401: "curl", 502: "curl"}

# The class of the error by status, and a pattern of the text that a user sees.
SHOWN = {
    "portkey-python": (STATUS_ERRORS, "Error code: {status} - {message}"),
    "portkey-node": (STATUS_ERRORS, "{message}"),
    "openai-python": (STATUS_ERRORS, "Error code: {status} - {message}"),
    "openai-node": (STATUS_ERRORS, "{status} {message}"),
    "replicate-python": (REPLICATE_ERROR, "*\nstatus: {status}\ndetail: {message}\n*"),
    "replicate-node": (API_ERROR, '* failed with status {status} *"detail":"{message}"*'),
    "curl-x-portkey-api-key": (CURL, '*"detail":"{message}"*'),
    "curl-bearer": (CURL, '*"detail":"{message}"*'),
}


def refusal(client: Client, upstream: RawUpstream, key: str) -> Refused:
    with serve(proxy(upstream.url), lifespan="off") as served, pytest.raises(Refused) as caught:
        client.run(f"{served.url}/v1", key, "any", "any")
    return caught.value


def check(refused: Refused, client: Client, expected: type[KeyUnknown | UpstreamFailed]) -> None:
    classes, pattern = SHOWN[client.name]
    assert refused.status == expected.status
    assert refused.kind == classes[expected.status]
    assert fnmatchcase(refused.message, pattern.format(status=expected.status, message=expected.message))
    # Replicate's client for Node keeps nothing of the answer's body but its text.
    assert refused.code == expected.code or f'"code":"{expected.code}"' in refused.message
    assert refused.request_id


def test_a_wrong_key_is_said_in_the_clients_own_error(client: Client, upstream: RawUpstream) -> None:
    check(refusal(client, upstream, "pk-wrong"), client, KeyUnknown)
    assert upstream.requests == []


def test_no_client_repeats_a_create_that_replicate_may_have_received(client: Client, upstream: RawUpstream) -> None:
    def take_and_hang_up(connection: Connection) -> None:
        connection.request()

    upstream.script = take_and_hang_up
    check(refusal(client, upstream, "pk-team-a"), client, UpstreamFailed)
    assert [request.line for request in upstream.requests] == [b"POST /v1/predictions HTTP/1.1"]
