from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from replicate_proxy_mw import headers
from replicate_proxy_mw.errors import BadRequest

CONNECTION = [(b"connection", b"x-one, Etag,x-two"), (b"connection", b"close")]


@pytest.mark.parametrize("order", [CONNECTION, CONNECTION[::-1]], ids=["first", "last"])
def test_what_any_connection_line_names_goes_nowhere(order: list[tuple[bytes, bytes]]) -> None:
    sent = [*order, (b"x-one", b"1"), (b"x-two", b"2"), (b"accept", b"*/*")]
    assert headers.up(sent, {b"x-one", b"x-two"}) == ((b"accept", b"*/*"),)
    came = [*order, (b"x-one", b"1"), (b"x-two", b"2"), (b"etag", b"e"), (b"age", b"1")]
    assert headers.down(came, 200, {b"x-one", b"x-two"}) == ((b"age", b"1"),)


def test_chunks_take_nothing_back_that_connection_has_named() -> None:
    came = [(b"connection", b"etag"), (b"transfer-encoding", b"chunked"), (b"etag", b"e"), (b"content-length", b"1")]
    assert headers.down(came, 200) == ()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: headers.up([(b"range", b"1"), (b"range", b"2")]), "There is more than one range header."),
        (lambda: headers.up([(b"content_type", b"a/b")]), "A header name has '_' where '-' is meant."),
        (
            lambda: headers.up([(b"accept", b"a\0")]),
            "A header value has a control character, or white space around it.",
        ),
        (lambda: headers.length([(b"content-length", b"+1")]), "The content-length header is not a number."),
    ],
)
def test_a_refusal_says_what_is_wrong(read: Callable[[], Any], message: str) -> None:
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        read()


def test_the_longest_number_that_a_length_may_have() -> None:
    assert headers.length([(b"content-length", b"9" * 18)]) == int("9" * 18)
    with pytest.raises(BadRequest):
        headers.length([(b"content-length", b"1" * 19)])


def test_a_name_is_read_alike_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_NAMES", headers._Names())
    for _ in range(2):
        assert headers.down([(b"ETag", b"e"), (b"X-Other", b"1")], 200) == ((b"etag", b"e"),)


def test_so_many_names_are_remembered_and_no_more() -> None:
    names = headers._Names()
    for count in range(headers.MAX_NAMES + 5):
        assert names[b"X-%d" % count] == (b"x-%d" % count, False)
    assert len(names) == headers.MAX_NAMES


def test_without_a_body_nothing_says_what_it_is() -> None:
    kept = ((b"accept", b"*/*"), (b"content-language", b"en"))
    dropped = ((b"content-type", b"a/b"), (b"content-encoding", b"gzip"))
    assert headers.without_content((*dropped, *kept)) == kept
