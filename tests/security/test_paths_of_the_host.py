"""The prefix is a segment, not a text, and a mount point is taken off once."""

from __future__ import annotations

import pytest

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio


@row("2.19")
@pytest.mark.parametrize("headers", [[], [KEY]])
@pytest.mark.parametrize(
    "target", ["/v1evil", "/v1beta/predictions", "/V1/predictions", "/v1%2fpredictions", "/%76%31/predictions"]
)
async def test_what_only_looks_like_the_prefix_is_the_host_s(
    upstream: RawUpstream, target: str, headers: list[tuple[bytes, bytes]]
) -> None:
    caller = await call(proxy(upstream.url), http_scope(target=target, headers=headers))
    assert (caller.status, caller.content) == (200, b"host")
    assert upstream.requests == []


@row("2.19")
@pytest.mark.parametrize(
    ("root_path", "target", "line"),
    [
        ("/api", "/api/v1/x", b"GET /v1/x HTTP/1.1"),
        ("/v1", "/v1/v1/x", b"GET /v1/x HTTP/1.1"),
        ("/v1", "/v1/v1/v1/x", b"GET /v1/v1/x HTTP/1.1"),
        ("/api", "/apiary/v1/x", None),
        ("/v1", "/v1/x", None),
    ],
)
async def test_a_mount_point_is_taken_off_once(
    upstream: RawUpstream, root_path: str, target: str, line: bytes | None
) -> None:
    caller = await call(proxy(upstream.url), http_scope(target=target, root_path=root_path))
    assert [received.line for received in upstream.requests] == ([] if line is None else [line])
    assert (caller.content == b"host") == (line is None)
