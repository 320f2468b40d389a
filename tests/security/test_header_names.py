"""Credentials are found by the exact name of their header, and there is one of each."""

from __future__ import annotations

import pytest

from tests.raw_asgi import KEY, TOKEN, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = pytest.mark.anyio

BEARER = (b"authorization", b"Bearer pk-team-a")


@row("2.18")
@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        (b"x_portkey_api_key", KEY[1], (400, "bad_request")),
        (b"x-portkey_api-key", KEY[1], (400, "bad_request")),
        # A space before the colon, where a server leaves it in the name.
        (b"x-portkey-api-key ", KEY[1], (401, "key_missing")),
        (b"authorization ", BEARER[1], (401, "key_missing")),
    ],
)
async def test_a_name_that_is_almost_a_key_s_is_none(
    upstream: RawUpstream, name: bytes, value: bytes, answer: tuple[int, str]
) -> None:
    caller = await call(proxy(upstream.url), http_scope(headers=[(name, value)]))
    assert told(caller) == answer
    assert upstream.requests == []


@row("2.18")
@pytest.mark.parametrize("twice", [KEY, BEARER])
@pytest.mark.parametrize("second", [b"pk-team-a", b"pk-team-b"])
async def test_two_of_one_credential_are_refused(
    upstream: RawUpstream, twice: tuple[bytes, bytes], second: bytes
) -> None:
    other = (twice[0], twice[1].replace(b"pk-team-a", second))
    caller = await call(proxy(upstream.url), http_scope(headers=[twice, other]))
    assert told(caller) == (400, "bad_request")
    assert upstream.requests == []


@row("2.18")
async def test_one_of_each_is_normal_and_the_first_kind_counts(upstream: RawUpstream) -> None:
    headers = [(b"authorization", b"Bearer OPENAI_API_KEY"), KEY]
    caller = await call(proxy(upstream.url), http_scope(headers=headers))
    assert caller.status == 200
    assert upstream.requests[0].header(b"authorization") == [f"Bearer {TOKEN}".encode()]
