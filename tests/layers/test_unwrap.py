from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw.layers import unwrap
from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream

JSON = (b"content-type", b"application/json; charset=utf-8")


@pytest.mark.parametrize(
    ("body", "inner"),
    [
        (b'{"data":{"version":"v","input":{}}}', b'{"version":"v","input":{}}'),
        (b' {\n "data" :\t{ "a": 12345678901234567890, "a": 1.0 } \n} ', b'{ "a": 12345678901234567890, "a": 1.0 }'),
        (b'{"data":{}}', b"{}"),
        ('{"data":{"p":"ü}"}}'.encode(), '{"p":"ü}"}'.encode()),
        (b'{"data":{"data":{}}}', b'{"data":{}}'),
        (b'{"data":[]}', None),
        (b'{"data":"{}"}', None),
        (b'{"data":{},"version":"v"}', None),
        (b'{"version":"v","data":{}}', None),
        (b'{"data":{},"data":{}}', None),
        (b'{"data":{}', None),
        (b'{"data":{}}}', None),
        (b'{"data":' + b'{"a":' * 5000, None),
        (b'[{"data":{}}]', None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_what_is_within(body: bytes, inner: bytes | None) -> None:
    assert unwrap.inner(body) == inner


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), _VALUES), st.sampled_from([None, 1]), st.booleans())
def test_the_bytes_within_stay_as_they_are(content: dict[str, object], indent: int | None, ascii: bool) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    wrapped = b'{"data": ' + text + b"\n}"
    assert unwrap.inner(wrapped) in (text, None if b"\xed" in text else text)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "chunks", "sent"),
    [
        ([JSON], [b'{"da', b'ta": {"a"', b": 1}}"], b'{"a": 1}'),
        ([JSON], [b'{"a":', b" 1.0 }"], b'{"a": 1.0 }'),
        ([], [b'{"data":{}}'], b'{"data":{}}'),
        ([(b"content-type", b"text/plain")], [b'{"data":{}}'], b'{"data":{}}'),
        ([JSON, (b"content-encoding", b"gzip")], [b'{"data":{}}'], b'{"data":{}}'),
        ([JSON], [b'{"a":"' + b"x" * 100, b'"}'], b'{"a":"' + b"x" * 100 + b'"}'),
    ],
)
async def test_what_goes_up(
    upstream: RawUpstream, headers: list[tuple[bytes, bytes]], chunks: list[bytes], sent: bytes
) -> None:
    length = (b"content-length", str(len(b"".join(chunks))).encode())
    await call(proxy(upstream.url), http_scope("POST", headers=[KEY, length, *headers]), *chunks)
    [received] = upstream.requests
    assert received.body == sent
    assert received.header(b"content-length") == [str(len(sent)).encode()]


@pytest.mark.anyio
async def test_a_body_too_long_to_be_looked_at(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwrap, "MAX_SIZE", 16)
    body = [b'{"data":{"a":"', b"x" * 20, b'"}}']
    length = (b"content-length", b"37")
    await call(proxy(upstream.url), http_scope("POST", headers=[KEY, JSON, length]), *body)
    assert upstream.requests[0].body == b"".join(body)


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_other_methods_pass(upstream: RawUpstream, method: str) -> None:
    await call(proxy(upstream.url), http_scope(method, headers=[KEY, JSON]), b'{"data":{}}')
    assert upstream.requests[0].body == b'{"data":{}}'


@pytest.mark.anyio
async def test_a_post_with_no_body_and_a_json_type_passes(upstream: RawUpstream) -> None:
    scope = http_scope("POST", "/v1/predictions/p1/cancel", [KEY, JSON, (b"content-length", b"0")])
    assert (await call(proxy(upstream.url), scope)).status == 200
    assert upstream.requests[0].header(b"content-length") == [b"0"]
