"""The reference that what leaves is judged by: it sees what it is there to see."""

from __future__ import annotations

import pytest

from tests.security import reference
from tests.security.reference import MARK, Pair

UPSTREAM = reference.Upstream(host=b"u.test", base=b"/v1", token="r8_x")
SENT: list[Pair] = [(b"accept", b"a/b"), (b"prefer", b"wait"), (b"connection", b"close, Prefer"), (b"x-evil", MARK)]
OURS = b"host: u.test\r\nauthorization: Bearer r8_x\r\n"


def leaving(target: bytes = b"/v1/x", headers: bytes = b"", rest: bytes = b"", *, ours: bytes = OURS) -> list[str]:
    recorded = b"POST %b HTTP/1.1\r\n%b%b\r\n%b" % (target, ours, headers, rest)
    return reference.leaving(recorded, SENT, b"ab", UPSTREAM)


LENGTH = b"content-length: 2\r\n"


@pytest.mark.parametrize(
    ("headers", "rest"),
    [
        (LENGTH, b"ab"),
        (b"transfer-encoding: chunked\r\n", b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"),
        (b"accept: a/b\r\naccept-encoding: identity\r\nvia: 1.1 replicate-proxy-mw-0123abcd\r\n" + LENGTH, b"ab"),
    ],
)
def test_what_may_leave(headers: bytes, rest: bytes) -> None:
    assert leaving(headers=headers, rest=rest) == []


@pytest.mark.parametrize("target", [b"/v1", b"/v1/", b"/v1?a=b", b"/v1/a%2Fb?../#"[:-1], b"/v1//x/..a/...", b"/v1/%zz"])
def test_targets_that_may_leave(target: bytes) -> None:
    assert reference.of_target(target, b"/v1") == []


@pytest.mark.parametrize(
    "target",
    b"/ /v2 /v1evil /V1/x http://u.test/v1/x //v1/x /v1/.. /v1/./x /v1/%2e%2e/x /v1/.%2E /v1/a%2f..%2fb /v1/%2e%2e%2fx"
    b" /v1/a\\b /v1/%5c /v1/%00 /v1/%0d%0a /v1/x#y /v1/x?y#z v1/x *".split(),
)
def test_targets_that_may_not_leave(target: bytes) -> None:
    assert reference.of_target(target, b"/v1")


@pytest.mark.parametrize(
    ("headers", "rest"),
    [
        (b"cookie: a=b\r\n" + LENGTH, b"ab"),
        (b"x-portkey-api-key: a\r\n" + LENGTH, b"ab"),
        (b"user_agent: a\r\n" + LENGTH, b"ab"),
        (b"accept: other\r\n" + LENGTH, b"ab"),
        (b"prefer: wait\r\n" + LENGTH, b"ab"),
        (b"via: 1.1 elsewhere\r\n" + LENGTH, b"ab"),
        (b"accept: a/b\nx: y\r\n" + LENGTH, b"ab"),
        (b"accept: a/b \r\n" + LENGTH, b"ab"),
        (b"accept : a/b\r\n" + LENGTH, b"ab"),
        (b"accept: " + MARK + b"\r\n" + LENGTH, b"ab"),
        (b"host: u.test\r\n" + LENGTH, b"ab"),
        (b"authorization: Bearer r8_x\r\n" + LENGTH, b"ab"),
        (LENGTH + LENGTH, b"ab"),
        (LENGTH + b"transfer-encoding: chunked\r\n", b"ab"),
        (LENGTH, b"abc"),
        (LENGTH, b"a"),
        (LENGTH, b"xy"),
        (b"content-length: +2\r\n", b"ab"),
        (b"transfer-encoding: gzip, chunked\r\n", b"2\r\nab\r\n0\r\n\r\n"),
        (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
        (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n"),
        (b"transfer-encoding: chunked\r\n", b"3\r\nab\r\n0\r\n\r\n"),
        (b"", b"ab"),
    ],
)
def test_what_may_not_leave(headers: bytes, rest: bytes) -> None:
    assert leaving(headers=headers, rest=rest)


@pytest.mark.parametrize("ours", [b"", OURS.replace(b"u.test", b"evil.test"), OURS.replace(b"r8_x", b"r8_y")])
def test_host_and_token_have_to_be_right(ours: bytes) -> None:
    assert leaving(headers=LENGTH, rest=b"ab") == []
    assert leaving(headers=LENGTH, rest=b"ab", ours=ours)


@pytest.mark.parametrize(
    "recorded", [b"", b"GET /v1/x HTTP/1.1\r\n", b"GET /v1/x  HTTP/1.1\r\n\r\n", b"GET /v1 x\r\n\r\n"]
)
def test_what_is_no_request_may_not_leave(recorded: bytes) -> None:
    assert reference.leaving(recorded, [], b"", UPSTREAM)


def test_answers() -> None:
    assert reference.answered(400, [(b"a", b"b")], [], "r8_x") == []
    assert reference.answered(508, [], [(b"via", b"1.1 replicate-proxy-mw-0123abcd")], "r8_x") == []
    for status in (None, 500, 502, 508):
        assert reference.answered(status, [], [], "r8_x")
    assert reference.answered(200, [(b"location", b"/r8_x")], [], "r8_x")
