from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import model_names, routing
from replicate_proxy_mw.headers import HeaderList
from replicate_proxy_mw.model_names import Named, NotUnderstood

ID = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
JSON: HeaderList = ((b"content-type", b"application/json"),)

CREATE = ("POST", "/predictions")
BY_MODEL = ("POST", "/models/a/b/predictions")
BY_DEPLOYMENT = ("POST", "/deployments/a/b/predictions")
TRAIN = ("POST", f"/models/a/b/versions/{ID}/trainings")
DEPLOY = ("POST", "/deployments")
UPDATE = ("PATCH", "/deployments/a/b")
MAKE = ("POST", "/models")


def _in_body(request: tuple[str, str], body: Any, headers: HeaderList = JSON) -> list[Named]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return list(model_names.in_body(routing.match(*request), headers, content))


@pytest.mark.parametrize(
    ("method", "target", "named"),
    [
        ("GET", "/models/a/b", [Named("a/b")]),
        ("GET", "/models/a%2Fb", [Named("a/b")]),
        ("HEAD", "/models/a/b/readme", [Named("a/b")]),
        ("GET", f"/models/a/b/versions/{ID}", [Named("a/b")]),
        ("GET", "/models/a/b/versions?x=y", [Named("a/b")]),
        (*BY_MODEL, [Named("a/b")]),
        (*TRAIN, [Named("a/b", ID)]),
        ("GET", "/deployments/a/b", [Named("deployments/a/b")]),
        (*BY_DEPLOYMENT, [Named("deployments/a/b")]),
        ("GET", "/predictions?x=y", []),
        (*CREATE, []),
    ],
)
def test_what_a_path_names(method: str, target: str, named: list[Named]) -> None:
    route = routing.match(method, target.partition("?")[0])
    assert list(model_names.in_path(route, target)) == named


@pytest.mark.parametrize("name", ["a/b;c", "a/b%3A" + ID, "a/b%20", "-a/b", "a/%2e%2e", "a/" + "b" * 129, "\u00fc/b"])
def test_a_name_in_a_path_that_is_none(name: str) -> None:
    route = routing.match("GET", "/models/" + name)
    assert route.operation == "models.get"
    with pytest.raises(NotUnderstood, match="a model is named as owner/name"):
        list(model_names.in_path(route, "/models/" + name))


def test_a_version_in_a_path_that_is_none() -> None:
    route = routing.match("POST", "/models/a/b/versions/x;y/trainings")
    with pytest.raises(NotUnderstood, match="a version is"):
        list(model_names.in_path(route, ""))


@pytest.mark.parametrize("request_", [CREATE, BY_MODEL, BY_DEPLOYMENT, TRAIN, DEPLOY, UPDATE, MAKE])
def test_where_the_body_names_there_is_no_query(request_: tuple[str, str]) -> None:
    route = routing.match(*request_)
    assert model_names.has_body(route)
    with pytest.raises(NotUnderstood, match="no query"):
        list(model_names.in_path(route, request_[1] + "?version=x"))


@pytest.mark.parametrize(
    "request_", [("GET", "/models"), ("POST", "/predictions/p/cancel"), ("POST", "/files"), ("PUT", "/x")]
)
def test_other_bodies_name_nothing(request_: tuple[str, str]) -> None:
    assert not model_names.has_body(routing.match(*request_))


@pytest.mark.parametrize(
    ("request_", "body", "named"),
    [
        (CREATE, {"version": ID}, [Named(None, ID)]),
        (CREATE, {"version": "a/b"}, [Named("a/b")]),
        (CREATE, {"version": f"a/b:{ID}", "input": {"version": 1}}, [Named("a/b", ID)]),
        (CREATE, {"version": "hidden"}, [Named(None, "hidden")]),
        (CREATE, b' {"\\u0076ersion" : "a\\/b" } ', [Named("a/b")]),
        # what is no field there does not say whose the version is
        (CREATE, {"version": ID, "model": "a/b"}, [Named("a/b"), Named(None, ID)]),
        (CREATE, {"version": "a/b", "deployment": "c/d"}, [Named("a/b"), Named("deployments/c/d")]),
        (CREATE, {"version": "a/b", "owner": 1, "name": []}, [Named("a/b")]),
        (BY_MODEL, {"input": {}}, []),
        (BY_MODEL, b"", []),
        (BY_MODEL, {"version": ID}, [Named(None, ID)]),
        (BY_DEPLOYMENT, {"destination": "c/d"}, [Named("c/d")]),
        (TRAIN, {"destination": "c/d", "input": {}}, [Named("c/d")]),
        (DEPLOY, {"name": "n", "model": "c/d", "version": ID}, [Named("c/d", ID)]),
        (DEPLOY, {"model": "c/d"}, [Named("c/d")]),
        (UPDATE, {"min_instances": 1}, []),
        (UPDATE, {"version": ID}, [Named(None, ID)]),
        (UPDATE, {"version": f"a/b:{ID}"}, [Named("a/b", ID)]),
        (MAKE, {"owner": "a", "name": "b"}, [Named("a/b")]),
    ],
)
def test_what_a_body_names(request_: tuple[str, str], body: Any, named: list[Named]) -> None:
    assert _in_body(request_, body) == named


@pytest.mark.parametrize(
    ("request_", "body", "text"),
    [
        (CREATE, {}, "the body has no version"),
        (CREATE, b"", "the body has no version"),
        (TRAIN, {"input": {}}, "the body has no destination"),
        (DEPLOY, {"version": ID}, "the body has no model"),
        (MAKE, {"owner": "a"}, "the body has no name"),
        (CREATE, {"version": None}, "a version is"),
        (CREATE, {"version": [ID]}, "a version is"),
        (CREATE, {"version": ""}, "a version is"),
        (CREATE, {"version": " a/b"}, "a version is"),
        (CREATE, {"version": "a/b\n"}, "a version is"),
        (CREATE, {"version": "a/b/c"}, "a version is"),
        (CREATE, {"version": "a/b:"}, "a version is"),
        (CREATE, {"version": f"a/b:{ID}:{ID}"}, "a version is"),
        (CREATE, {"version": "a/\u0431"}, "a version is"),
        (CREATE, {"version": "x" * 129}, "a version is"),
        (CREATE, {"version": "a/b", "model": None}, "a model is named"),
        (DEPLOY, {"model": None}, "a model is named"),
        (DEPLOY, {"model": f"a/b:{ID}"}, "a model is named"),
        (DEPLOY, {"model": "a/b", "version": f"c/d:{ID}"}, "a version is"),
        (TRAIN, {"destination": f"a/b:{ID}"}, "a model is named"),
        (TRAIN, {"destination": 1}, "a model is named"),
        (BY_MODEL, {"deployment": "a"}, "a model is named"),
        (MAKE, {"owner": "a/b", "name": "c"}, "a model is named"),
        (MAKE, {"owner": ["a"], "name": "b"}, "a model is named"),
        *(
            (BY_MODEL, body, f"the body has {name} twice, in another spelling")
            for name, body in (
                ("version", b'{"version": "a/b", "version": "a/b"}'),
                ("version", b'{"version": "a/b", "\\u0076ersion": "a/b"}'),
                ("version", {"Version": "a/b"}),
                ("version", {"ver\u017fion": "a/b"}),
                ("version", {"version\0": "a/b"}),
                ("version", {"version\ud800": "a/b"}),
                ("model", {" model": "a/b"}),
                ("name", {"name[]": "a"}),
                ("data", {"data": {"version": "a/b"}}),
                ("data", {"DATA": 1}),
            )
        ),
        *(
            (BY_MODEL, body, "the body is not a JSON object")
            for body in (
                b"[]",
                b'"version"',
                b"{",
                b"{} {}",
                b"{}x",
                b'{"version": "a/b",}',
                b"\xef\xbb\xbf{}",
                "{}".encode("utf-16"),
                b'{"x": "\xff"}',
                b'{"x": ' + b"[" * 100_000,
            )
        ),
    ],
)
def test_a_body_that_is_not_understood(request_: tuple[str, str], body: Any, text: str) -> None:
    with pytest.raises(NotUnderstood, match=text):
        _in_body(request_, body)


@pytest.mark.parametrize(
    "value",
    [
        b"application/json",
        b"Application/JSON",
        b'application/json; charset="UTF-8"',
        b"application/json ;charset=utf-8",
    ],
)
def test_plain_json(value: bytes) -> None:
    assert _in_body(BY_MODEL, {"version": "a/b"}, ((b"content-type", value),)) == [Named("a/b")]


@pytest.mark.parametrize(
    "value",
    [
        *(
            b"",
            b"text/plain",
            b"application/json; charset=utf8",
            b"application/jsonp",
            b"application/problem+json",
            b"application/json; charset=utf-16",
        ),
        *(
            b"application/json, text/plain",
            b"application/json; x=y",
            b"application/json; charset=utf-8; charset=utf-16",
        ),
        *(b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=application/json"),
    ],
)
def test_other_content_types(value: bytes) -> None:
    with pytest.raises(NotUnderstood, match="application/json in UTF-8"):
        _in_body(BY_MODEL, {"version": "a/b"}, ((b"content-type", value),))


def test_no_content_type() -> None:
    with pytest.raises(NotUnderstood, match="application/json in UTF-8"):
        _in_body(BY_MODEL, {"version": "a/b"}, ())


@pytest.mark.parametrize("coding", [b"gzip", b"identity", b""])
def test_an_encoded_body(coding: bytes) -> None:
    with pytest.raises(NotUnderstood, match="without content-encoding"):
        _in_body(BY_MODEL, {}, (*JSON, (b"content-encoding", coding)))


_texts = st.text(max_size=4) | st.sampled_from(["a/b", ID, "a/b:" + ID])


@given(st.dictionaries(_texts | st.sampled_from(["version", "Version", "data", "input"]), _texts), st.booleans())
def test_a_body_that_is_understood_names_what_a_plain_parser_reads(body: dict[str, str], ascii: bool) -> None:
    named: list[Named] = []
    understood = False
    with suppress(NotUnderstood):
        named = _in_body(BY_MODEL, json.dumps(body, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))
        understood = True
    name, _, version = body.get("version", "").rpartition(":")
    expected = Named(name, version) if name else Named(version) if "/" in version else Named(None, version)
    assert named == ([expected] if understood and "version" in body else [])
    assert not (understood and {"Version", "data"} & body.keys())
