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


async def test_bytes_at_hand_are_a_body_that_is_read_once() -> None:
    body = Chunks([b"a", b"b"])
    assert [chunk async for chunk in body] == [b"a", b"b"]
    assert [chunk async for chunk in body] == []
