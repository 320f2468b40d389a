from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import PermissionDenied, Policy, routing
from replicate_proxy_mw.operations import OPERATIONS
from replicate_proxy_mw.policy import SECRET, permit

ALL = frozenset(operation.id for operation in OPERATIONS)
SECRET_PATH = "/webhooks/default/secret"


def _permit(policy: Policy, method: str, path: str) -> None:
    permit(policy, routing.match(method, path), path)


def test_the_default_is_everything_but_the_webhook_secret() -> None:
    assert Policy().operation_ids == ALL - {SECRET}
    assert Policy().unlisted
    assert Policy().allows_model("anybody/anything")


@pytest.mark.parametrize(
    ("operations", "ids"),
    [
        ((), set()),
        (("predictions.create",), {"predictions.create"}),
        (["trainings.*"], {one for one in ALL if one.startswith("trainings.")}),
        (["*.list"], {one for one in ALL if one.endswith(".list")}),
        (["models.*.get", "search"], {"models.readme.get", "models.versions.get", "search"}),
        (["*"], ALL - {SECRET}),
        (["*.get"], {one for one in ALL if one.endswith(".get")} - {SECRET}),
        (["webhook*"], set()),
        (["*", "webhooks.*"], ALL),
        ([SECRET], {SECRET}),
    ],
)
def test_what_patterns_stand_for(operations: Any, ids: set[str]) -> None:
    assert Policy(operations=operations).operation_ids == ids


@pytest.mark.parametrize(
    ("rules", "unlisted"),
    [
        ({}, True),
        ({"operations": ["*", "webhooks.*"]}, True),
        ({"operations": ["*.*", "account.get"]}, False),
        ({"models": ["a/b"]}, False),
        ({"models": []}, False),
        ({"own_predictions": True}, False),
        ({"max_in_flight": 1}, True),
    ],
)
def test_what_the_document_does_not_have_needs_a_policy_without_rules(rules: Any, unlisted: bool) -> None:
    assert Policy(**rules).unlisted is unlisted


@pytest.mark.parametrize(
    ("models", "name", "allowed"),
    [
        (["acme/good"], "acme/good", True),
        (["acme/good"], "acme/good2", False),
        (["acme/good"], "acme/Good", False),
        (["acme/good"], "xacme/good", False),
        (["acme/good"], "deployments/acme/good", False),
        (["a/b", "acme/good"], "acme/good", True),
        (["acme/*"], "acme/good", True),
        (["acme/*"], "acme/", True),
        (["acme/*"], "acme/good/x", False),
        (["acme/g*d"], "acme/good", True),
        (["acme/g.*d"], "acme/good", False),
        (["*/*"], "acme/good", True),
        (["*/*"], "deployments/acme/good", False),
        (["deployments/*/*"], "deployments/acme/good", True),
        (["deployments/*/*"], "acme/good", False),
        (["deployments/*"], "deployments/acme/good", False),
        ([], "acme/good", False),
        ([], "", False),
    ],
)
def test_which_models_a_policy_has(models: list[str], name: str, allowed: bool) -> None:
    assert Policy(models=models).allows_model(name) is allowed


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"operations": "predictions.*"}, "operations: a list of strings"),
        ({"operations": {"predictions.*"}}, "operations: a list of strings"),
        ({"operations": [b"predictions.*"]}, "operations: a list of strings"),
        ({"operations": b"predictions.*"}, "operations: a list of strings"),
        ({"operations": ["prediction.create"]}, "operations: 'prediction.create' stands for no operation"),
        ({"operations": ["predictions.creat"]}, "operations: 'predictions.creat' stands for no operation"),
        ({"operations": ["Predictions.*"]}, r"operations: 'Predictions.\*' stands for no operation"),
        ({"operations": ["[a-z]*"]}, "stands for no operation"),
        ({"operations": [""]}, "operations: '' stands for no operation"),
        ({"models": "acme/good"}, "models: a list of strings"),
        ({"models": [1]}, "models: a list of strings"),
        *(
            ({"models": [name]}, "models: .* is neither owner/name nor deployments/owner/name")
            for name in (
                "acme",
                "acme/",
                "/good",
                "acme/good/x",
                "acme/good:v",
                "*",
                "acme/..",
                "a b/c",
                "deployments/a/",
            )
        ),
        ({"max_in_flight": 0}, "max_in_flight: must be a whole number above 0"),
        ({"max_in_flight": True}, "max_in_flight: must be a whole number above 0"),
        ({"max_in_flight": 1.0}, "max_in_flight: must be a whole number above 0"),
        ({"own_predictions": 1}, "own_predictions: must be true or false"),
        ({"expires_at": datetime(2027, 1, 1)}, "expires_at: must be a date and time with a time zone"),
        ({"expires_at": "2027-01-01"}, "expires_at: must be a date and time with a time zone"),
    ],
)
def test_a_wrong_rule_is_named(rules: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Policy(**rules)


def test_a_policy_is_a_value() -> None:
    policy = Policy(operations=["predictions.*"], models=["a/b"])
    assert policy == Policy(operations=("predictions.*",), models=("a/b",))
    assert len({policy, replace(policy)}) == 1
    assert replace(policy, models=["c/d"]).allows_model("c/d")
    assert repr(policy) == (
        "Policy(operations=('predictions.*',), models=('a/b',), own_predictions=False, max_in_flight=None, "
        "expires_at=None)"
    )


def test_a_key_that_has_expired() -> None:
    now = datetime.now(timezone(timedelta(hours=5)))
    _permit(Policy(expires_at=now + timedelta(hours=1)), "GET", "/account")
    expired = Policy(expires_at=now - timedelta(seconds=1))
    with pytest.raises(PermissionDenied, match=r"expires_at: this key expired at 20\d\d-"):
        _permit(expired, "GET", "/account")
    with pytest.raises(PermissionDenied, match="expires_at: "):
        _permit(expired, "GET", "/nope")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_an_operation_passes_where_it_is_allowed_and_nowhere_else(operation: Any) -> None:
    path = operation.path.replace("{", "an-").replace("}", "")
    _permit(Policy(operations=[operation.id]), operation.method, path)
    others = [one.id for one in OPERATIONS if one is not operation]
    with pytest.raises(PermissionDenied, match=f"operations: this key may not use {operation.id}"):
        _permit(Policy(operations=others), operation.method, path)


RESTRICTED = [
    Policy(operations=["*.get", "*.list", "*.create", "*.cancel"]),
    Policy(models=["a/b"]),
    Policy(own_predictions=True),
]


@pytest.mark.parametrize("policy", RESTRICTED)
@pytest.mark.parametrize(
    "path", ["", "/", "/nope", "/predictions/", "//predictions", "/Predictions", "/accounts", SECRET_PATH]
)
def test_a_restricted_key_has_only_what_the_document_has(policy: Policy, path: str) -> None:
    for method in ("GET", "PUT", "OPTIONS"):
        with pytest.raises(PermissionDenied, match="operations: "):
            _permit(policy, method, path)


@pytest.mark.parametrize("policy", RESTRICTED)
@pytest.mark.parametrize(
    "path",
    [
        "/predictions/%25",
        "/predictions/a%252fcancel",
        "/predictions/a;b=c",
        "/predictions/a%3Bb",
        "/predictions/a%3Fb",
        "/predictions/a+b",
        "/predictions/%C3%BC",
        "/predictions/%ff",
        "/models/..;/predictions",
        "/models/%252e%252e/predictions",
    ],
)
def test_a_restricted_key_writes_paths_plainly(policy: Policy, path: str) -> None:
    assert routing.match("GET", path).operation
    with pytest.raises(PermissionDenied, match=r"operations: .* more than one way"):
        _permit(policy, "GET", path)


@pytest.mark.parametrize(
    "path", ["/predictions/abc", "/models/a%2Fb", "/%6dodels/a/b", "/files/Zm9v-_=", "/models/a/b.c~1"]
)
def test_a_spelling_with_one_meaning_passes(path: str) -> None:
    _permit(Policy(own_predictions=True), "GET", path)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/nope"), ("PUT", "/predictions/a"), ("GET", "/x%20y"), ("GET", "/100%25")]
)
def test_an_open_key_may_ask_for_what_the_document_does_not_have(method: str, path: str) -> None:
    _permit(Policy(), method, path)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "QUERY"])
@pytest.mark.parametrize(
    "path",
    [
        SECRET_PATH,
        SECRET_PATH + "/",
        SECRET_PATH + ".json",
        SECRET_PATH + ";x",
        SECRET_PATH + "%3Fx",
        SECRET_PATH + "%2500",
        "/" + SECRET_PATH,
        "/v1" + SECRET_PATH,
        "/Webhooks/Default/SECRET",
        "/webhooks%2Fdefault%2Fsecret",
        "/webhooks%252Fdefault%25252Fsecret",
        "/webhooks/x/..;/default/secret",
        "/x%253F/%252e%252e" + SECRET_PATH,
        "/%EF%BD%97ebhooks/default/%C5%BFecret",
        "/predictions/%252e%252e%252fwebhooks%252fdefault%252fsecret",
        "/x" + "%25" * 2 + "25" * 20,
    ],
)
def test_no_spelling_reaches_the_webhook_secret(method: str, path: str) -> None:
    with pytest.raises(PermissionDenied, match="operations: "):
        _permit(Policy(), method, path)


def test_a_path_that_needs_more_decoding_than_any_chain_of_servers_does() -> None:
    deep = "%" + "25" * 12 + "41"
    with pytest.raises(PermissionDenied, match="more than one way"):
        _permit(Policy(), "GET", "/" + deep)


def test_a_key_that_may_read_the_secret_may_spell_it_as_it_likes() -> None:
    policy = Policy(operations=["*", "webhooks.*"])
    for path in (SECRET_PATH, SECRET_PATH + "/", "/webhooks%2Fdefault/secret", "/x%2525"):
        _permit(policy, "GET", path)


@given(st.text(max_size=20).map(lambda text: "/" + text), st.sampled_from(["GET", "POST", "DELETE"]))
def test_only_the_document_s_plain_paths_pass_a_restriction(path: str, method: str) -> None:
    for policy in RESTRICTED:
        with suppress(PermissionDenied):
            _permit(policy, method, path)
            assert routing.match(method, path).operation in policy.operation_ids
            assert re.fullmatch(r"[\w.~=/-]*", unquote(path), re.ASCII)
