from __future__ import annotations

from typing import Any

import pytest

from replicate_proxy_mw import Forward, PermissionDenied, ProxyRequest, ProxyResponse
from replicate_proxy_mw.errors import ProxyError, UpstreamFailed, UpstreamUnreachable
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.rereading import made, read_again
from tests.requests import request_of
from tests.tenants import JSON

pytestmark = pytest.mark.anyio

CREATE = request_of(
    "POST", "/predictions", headers=(JSON, (b"prefer", b"wait")), body=Chunks([b"{}"]), content_length=2
)


def answering(status: int) -> Forward:
    async def forward(request: ProxyRequest) -> ProxyResponse:
        headers = (JSON, (b"ratelimit-remaining", b"7"), (b"content-encoding", b"identity"))
        return ProxyResponse(status=status, headers=headers, body=Chunks([b'{"id":', b'"p1"}']))

    return forward


@pytest.mark.parametrize("kind", ["prediction", "training"])
async def test_nothing_of_the_create_is_in_the_read(kind: Any) -> None:
    asked: list[ProxyRequest] = []

    async def forward(request: ProxyRequest) -> ProxyResponse:
        asked.append(request)
        return await answering(200)(request)

    await read_again(forward, CREATE, kind, "p1")
    [read] = asked
    assert (read.method, read.target, read.operation) == ("GET", f"/{kind}s/p1", f"{kind}s.get")
    assert (read.headers, read.content_length) == (((b"accept-encoding", b"identity"),), 0)
    assert read.key is CREATE.key


async def test_nothing_but_the_body_is_said_of_in_the_answer() -> None:
    response, body, whole = await read_again(answering(200), CREATE, "prediction", "p1")
    assert (body, whole) == (b'{"id":"p1"}', True)
    assert response.headers == (JSON, (b"content-encoding", b"identity"), (b"content-length", b"11"))


async def test_what_was_made_has_the_status_of_the_create() -> None:
    assert (await made(answering(200), CREATE, "prediction", "p1", status=202)).status == 202
    with pytest.raises(UpstreamFailed, match=r"has made p1, which could not be read \(404\); nothing was created"):
        await made(answering(404), CREATE, "prediction", "p1", status=202)


@pytest.mark.parametrize(
    ("error", "told"), [(UpstreamUnreachable(), UpstreamFailed), (PermissionDenied("no"), PermissionDenied)]
)
async def test_a_refusal_is_told_and_a_failure_names_what_was_made(error: ProxyError, told: type[ProxyError]) -> None:
    async def forward(request: ProxyRequest) -> ProxyResponse:
        raise error

    with pytest.raises(told):
        await made(forward, CREATE, "prediction", "p1", status=201)
