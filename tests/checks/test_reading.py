from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw.checks.reading import parsed
from replicate_proxy_mw.model_names import NotUnderstood

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(_values, st.booleans(), st.none() | st.integers(0, 2))
def test_what_has_one_reading_is_read(value: Any, ascii: bool, indent: int | None) -> None:
    assert parsed(json.dumps(value, ensure_ascii=ascii, indent=indent).encode()) == value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"a":1,"a":1}',
        b'[{"b":{"a":1,"\\u0061":2}}]',
        b"NaN",
        b"[-Infinity]",
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b"1" * 5000,
        b"{} {}",
    ],
)
def test_what_has_two_readings_or_none_is_not(body: bytes) -> None:
    with pytest.raises(NotUnderstood):
        parsed(body)
