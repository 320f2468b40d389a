from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import routing
from replicate_proxy_mw.errors import BadRequest, MethodNotAllowed, ProxyError
from replicate_proxy_mw.operations import OPERATIONS, Operation
from tests.raw_asgi import http_scope


@pytest.mark.parametrize(
    ("path", "inside"),
    [("/v1", True), ("/v1/", True), ("/v1/x", True), ("/v1beta", False), ("/v1evil/x", False), ("/V1/x", False)],
)
def test_a_prefix_ends_at_a_segment(path: str, inside: bool) -> None:
    assert routing.within(path, "/v1") is inside


def test_an_empty_prefix_holds_everything() -> None:
    assert routing.within("/predictions", "")


@pytest.mark.parametrize(
    ("raw_path", "path", "root_path", "expected"),
    [
        (b"/v1/x", "/v1/x", "", "/v1/x"),
        (b"/v1/a%2Fb", "/v1/a/b", "", "/v1/a%2Fb"),
        (b"/v1/%ff", "/v1/\ufffd", "", "/v1/%ff"),
        (b"/v1/%zz", "/v1/%zz", "", "/v1/%zz"),
        (None, "/v1/a b/ü", "", "/v1/a%20b/%C3%BC"),
        (None, "/v1/x@y:z", "", "/v1/x@y:z"),
        # uvicorn --root-path and Starlette's mounts keep it in the path, hypercorn and granian do not
        (b"/api/v1/x", "/api/v1/x", "/api", "/v1/x"),
        (b"/v1/x", "/v1/x", "/api", "/v1/x"),
        (b"/apiv1/x", "/apiv1/x", "/api", "/apiv1/x"),
        (b"/v1/x", "/v1/x", "/", "/v1/x"),
        # the root path is decoded, the raw path is not
        (b"/my%20app/v1/x", "/my app/v1/x", "/my app", "/v1/x"),
        (b"/%61pi/v1/a%2Fb", "/api/v1/a/b", "/api", "/v1/a%2Fb"),
        (b"/a%2Fb/v1/x", "/a/b/v1/x", "/a", "/a%2Fb/v1/x"),
        # an outer middleware that rewrote the path alone
        (b"/old/x", "/v1/x", "", "/v1/x"),
        (b"/old/a%20b", "/v1/a b", "", "/v1/a%20b"),
        (b"/v1/a/%EF%BF%BD", "/v1/b/\ufffd", "", "/v1/b/%EF%BF%BD"),
    ],
)
def test_the_path_is_read_as_it_came(raw_path: bytes | None, path: str, root_path: str, expected: str) -> None:
    assert routing.path_of({"raw_path": raw_path, "path": path, "root_path": root_path}) == expected


def test_a_scope_without_raw_path_and_root_path() -> None:
    assert routing.path_of({"path": "/v1/x"}) == "/v1/x"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_every_operation_is_found(operation: Operation) -> None:
    path = operation.path.replace("{", "an-").replace("}", "")
    route = routing.match(operation.method, path)
    assert (route.template, route.operation, route.details) == (operation.path, operation.id, operation)
    assert all(value == f"an-{name}" for name, value in route.params.items())
    assert len(route.params) == operation.path.count("{")


def test_head_is_its_get() -> None:
    assert routing.match("HEAD", "/predictions/p1").operation == "predictions.get"


@pytest.mark.parametrize(
    ("path", "operation"),
    [("/%70redictions", "predictions.create"), ("/predictions%2Fp1%2Fcancel", "predictions.cancel")],
)
def test_no_spelling_hides_an_operation(path: str, operation: str) -> None:
    assert routing.match("POST", path).operation == operation


def test_a_model_in_one_segment() -> None:
    assert routing.match("GET", "/models/a%2Fb").params == {"model_owner": "a", "model_name": "b"}


@pytest.mark.parametrize(
    ("path", "excluded"),
    [
        ("/v1/own", True),
        ("/v1/own/x", True),
        ("/v1/%6fwn", True),
        ("/v1//own", True),
        ("/v1/own%2Fx", True),
        ("/v1/owner", False),
        ("/v1/x/own", False),
    ],
)
def test_no_spelling_takes_from_the_host_what_it_keeps(path: str, excluded: bool) -> None:
    assert routing.is_excluded([path], ["/v1/own", "/v1/a%20b"]) is excluded


PORTKEY = [(b"accept", b"*/*"), (b"x-portkey-provider", b"@replicate")]


@pytest.mark.parametrize(
    ("method", "below", "with_portkey", "without"),
    [
        ("POST", "", "", ""),
        ("POST", "/predictions", "/predictions", "/predictions"),
        ("POST", "predictions", "/predictions", None),
        ("GET", "predictions/p1", "/predictions/p1", None),
        ("POST", "models/a/b/predictions", "/models/a/b/predictions", None),
        ("POST", "beta", None, None),
        ("PUT", "predictions", None, None),
        ("POST", "//predictions", "/predictions", "//predictions"),
        ("POST", "//nope", "//nope", "//nope"),
        ("POST", "[object%20Object]", "[object%20Object]", None),
    ],
)
def test_what_a_caller_meant(method: str, below: str, with_portkey: str | None, without: str | None) -> None:
    assert routing.meant(method, below, PORTKEY) == with_portkey
    assert routing.meant(method, below, []) == without


def test_an_object_that_became_a_path_is_told_the_right_call() -> None:
    with pytest.raises(BadRequest, match="post"):
        routing.check("POST", "[object%20Object]", b"")


@pytest.mark.parametrize("method", ["trace", "post", "Get", "connect"])
def test_methods_in_small_letters_are_refused(method: str) -> None:
    with pytest.raises(BadRequest, match="capitals"):
        routing.check(method, "/x", b"")


def test_a_method_that_a_path_does_not_have() -> None:
    route = routing.match("PUT", "/predictions/p1")
    assert (route.template, route.operation, route.params) == (
        "/predictions/{prediction_id}",
        None,
        {"prediction_id": "p1"},
    )


@pytest.mark.parametrize(
    "path", ["", "/", "/predictions/", "/predictions//cancel", "/models/a%252Fb", "/nope", "/a/b/c/d/e/f/g"]
)
def test_what_the_api_does_not_have(path: str) -> None:
    assert routing.match("GET", path) == routing.UNKNOWN


@pytest.mark.parametrize("method", ["", "G ET", "GET\x00", "(GET)", "GET\tX", "\xdcBER", "GET\n"])
def test_what_is_no_method_is_refused(method: str) -> None:
    with pytest.raises(BadRequest, match="method"):
        routing.check(method, "/x", b"")


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "TRACK"])
def test_methods_that_are_refused(method: str) -> None:
    with pytest.raises(MethodNotAllowed):
        routing.check(method, "/x", b"")


@pytest.mark.parametrize("method", ["GET", "QUERY", "PATCH", "FOO", "M-SEARCH"])
def test_every_other_method_passes(method: str) -> None:
    assert routing.check(method, "/x", b"") == "/x"


@pytest.mark.parametrize(
    "path",
    ["/..", "/../x", "/a/./b", "/.", "/%2e%2e/x", "/a%2F..%2Fb", "/a%2f%2E"],
)
def test_dot_segments_are_refused(path: str) -> None:
    with pytest.raises(BadRequest):
        routing.check("GET", path, b"")


@pytest.mark.parametrize("path", ["/a\\b", "/a%5Cb", "/%00", "/a%0d%0ab", "/a\x7fb", "/a#b", "/a b", "/ü", "/%2e?"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(BadRequest):
        routing.check("GET", path, b"")


@pytest.mark.parametrize("query", [b"a=b#c", b"a=\xff", b"a=b c", b"a=\r\nb"])
def test_queries_that_are_refused(query: bytes) -> None:
    with pytest.raises(BadRequest):
        routing.check("GET", "/x", query)


@pytest.mark.parametrize(
    ("path", "query", "target"),
    [
        ("/a%2Fb", b"", "/a%2Fb"),
        ("/a%252e%252e/b", b"", "/a%252e%252e/b"),
        ("/...", b"", "/..."),
        ("//evil", b"", "//evil"),
        ("/%zz/a+b;,:@", b"foo=a%20b&foo=c", "/%zz/a+b;,:@?foo=a%20b&foo=c"),
        ("/x", b"cursor=cD0yMDIy%2Babc%3D%3D", "/x?cursor=cD0yMDIy%2Babc%3D%3D"),
        ("/a%23b", b"a=..", "/a%23b?a=.."),
        ("", b"a", "?a"),
    ],
)
def test_targets_pass_byte_for_byte(path: str, query: bytes, target: str) -> None:
    assert routing.check("GET", path, query) == target


@given(st.text(st.characters(max_codepoint=0x17F), max_size=40), st.binary(max_size=40))
def test_any_target_is_passed_on_or_refused(path: str, query: bytes) -> None:
    scope = http_scope(target="/v1/x")
    scope["path"] = "/v1/" + path
    scope["raw_path"] = None
    try:
        target = routing.check("GET", routing.path_of(scope), query)
    except ProxyError:
        return
    assert target.isascii()
    assert target.isprintable()
    assert "/../" not in target


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_an_empty_parameter_is_none_and_no_method_is_another_s(operation: Operation) -> None:
    path = operation.path.replace("{", "").replace("}", "")
    assert routing.match(operation.method, path).operation == operation.id
    other = routing.match("OPTIONS", path)
    assert (other.template, other.operation, other.details) == (operation.path, None, None)
    for name in {part for part in operation.path.split("/") if part.startswith("{")}:
        assert routing.match(operation.method, path.replace(name[1:-1], "", 1)) is routing.UNKNOWN


@given(st.text(alphabet="/.a-%2eE~_", max_size=12))
def test_what_is_ordinary_is_what_no_rule_has_anything_against(path: str) -> None:
    def checked(query: bytes) -> str | None:
        try:
            return routing.check("GET", path, query).removesuffix("?a")
        except BadRequest:
            return None

    # A query takes the long way.
    assert checked(b"") == checked(b"a")
