from __future__ import annotations

import pytest

from replicate_proxy_mw import ProxyResponse
from replicate_proxy_mw.exchange import Chunks

pytestmark = pytest.mark.anyio


async def test_a_json_answer_of_a_layer() -> None:
    response = ProxyResponse.json(429, {"detail": "ü"}, headers=((b"retry-after", b"1"),))
    assert response.status == 429
    assert response.headers == (
        (b"content-type", b"application/json"),
        (b"content-length", b"19"),
        (b"retry-after", b"1"),
    )
    assert [chunk async for chunk in response.body] == [b'{"detail":"\\u00fc"}']
    await response.aclose()


async def test_bytes_at_hand_are_a_body_that_is_read_again() -> None:
    body = Chunks([b"a", b"b"])
    for _ in range(2):
        assert [chunk async for chunk in body] == [b"a", b"b"]
        assert body.at_hand == b"ab"


async def test_bytes_at_hand_and_a_rest() -> None:
    body = Chunks([b"a"], Chunks([b"b", b"c"]).__aiter__())
    assert body.at_hand is None
    assert [chunk async for chunk in body] == [b"a", b"b", b"c"]


async def test_a_body_that_was_begun_can_be_gone_on_with() -> None:
    reading = Chunks([b"a", b"b"]).__aiter__()
    assert await anext(reading) == b"a"
    assert [chunk async for chunk in reading] == [b"b"]
