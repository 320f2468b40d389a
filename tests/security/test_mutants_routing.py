from __future__ import annotations

import re

import pytest

from replicate_proxy_mw import routing
from replicate_proxy_mw.errors import BadRequest
from replicate_proxy_mw.operations import OPERATIONS, Operation


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_a_table_made_anew_has_every_operation(monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    monkeypatch.setattr(routing, "_TEMPLATES", routing._templates())
    segments = operation.path.split("/")
    path = operation.path.replace("{", "an-").replace("}", "")
    names = {text[1:-1]: f"an-{text[1:-1]}" for text in segments if text.startswith("{")}
    found = routing.match(operation.method, path)
    assert found == routing.Route(operation.path, operation.id, operation, names)
    assert (routing.match("HEAD", path) == found) is (operation.method == "GET")
    assert routing.match("TEST", path) == routing.Route(operation.path, params=names)
    for i, text in enumerate(segments[1:], 1):
        other = "" if text in {f"{{{name}}}" for name in names} else "of-tomorrow"
        changed = "/".join([*path.split("/")[:i], other, *path.split("/")[i + 1 :]])
        assert routing.match(operation.method, changed).template != operation.path


@pytest.mark.parametrize(
    ("raw_path", "path", "root_path", "app_root_path", "expected"),
    [
        (b"/team/v1/x", "/team/v1/x", "/api/team", "/api", "/v1/x"),
        (b"/api/team/v1/x", "/api/team/v1/x", "/api/team", "/api", "/v1/x"),
        (b"/api/team/v1/x", "/api/team/v1/x", "/api/team", None, "/v1/x"),
        (b"//v1/x", "//v1/x", "/", None, "//v1/x"),
        (b"/X/v1/x", "/X/v1/x", "/X", None, "/v1/x"),
        (b"/old", "/v1/a@b:c", "", None, "/v1/a@b:c"),
    ],
)
def test_what_a_mount_has_taken_off(
    raw_path: bytes, path: str, root_path: str, app_root_path: str | None, expected: str
) -> None:
    scope = {"raw_path": raw_path, "path": path, "root_path": root_path, "app_root_path": app_root_path}
    assert routing.path_of(scope) == expected


def test_a_host_that_keeps_nothing_for_itself() -> None:
    assert not routing.is_excluded(["/v1/x"], [])


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("get", "/x", "Methods are told apart by case, and are written in capitals."),
        ("G ET", "/x", "The method is none that HTTP has room for."),
        ("POST", "[object%20Object]", 'This SDK takes path and body apart: post("/predictions", {...}).'),
        ("GET", "/a/%2E%2e/b", "The path has a '.' or '..' segment."),
        ("GET", "/a%5Cb", "The path has a backslash or a control character."),
        ("GET", "/a b", "The target has characters that must be percent-encoded."),
    ],
)
def test_a_refusal_says_what_is_wrong(method: str, path: str, message: str) -> None:
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        routing.check(method, path, b"")
