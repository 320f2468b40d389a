from __future__ import annotations

import re
from typing import Any

import pytest

from replicate_proxy_mw import PermissionDenied, Policy, policy, routing
from replicate_proxy_mw.policy import SECRET, permit


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    policy._operation_ids.cache_clear()
    policy._any_of.cache_clear()


def _permit(rules: Policy, method: str, path: str) -> None:
    permit(rules, routing.match(method, path), path)


def test_a_star_in_the_middle_stands_for_any_text() -> None:
    assert Policy(operations=["predictions.c*"]).operation_ids == {"predictions.create", "predictions.cancel"}
    assert SECRET in Policy(operations=["webhooks.*.get"]).operation_ids
    assert Policy(models=["acme/a*c"]).allows_model("acme/abc")
    assert not Policy(models=["acme/a*c"]).allows_model("acme/abd")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_in_flight": 0}, "max_in_flight: must be a whole number above 0"),
        ({"own_predictions": 1}, "own_predictions: must be true or false"),
    ],
)
def test_rules_that_are_none_are_named(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Policy(**rules)


@pytest.mark.parametrize(
    ("operations", "method", "path", "message"),
    [
        (["*"], "GET", "/webhooks%2Fdefault%252Fsecret", "the path of this request can be read in more than one way."),
        (
            ["predictions.*"],
            "GET",
            "/of-tomorrow",
            "Replicate's API has no such operation, and this key is restricted.",
        ),
        (["predictions.*"], "GET", "/account", "this key may not use account.get."),
    ],
)
def test_a_refusal_says_which_rule_it_was(operations: list[str], method: str, path: str, message: str) -> None:
    with pytest.raises(PermissionDenied, match=f"^{re.escape('operations: ' + message)}$"):
        _permit(Policy(operations=operations), method, path)


@pytest.mark.parametrize("between", ["%00", ";", "%20", "-", "%E2%80%8B", "1"])
def test_the_secret_s_path_is_known_through_what_stands_between_its_letters(between: str) -> None:
    with pytest.raises(PermissionDenied, match="more than one way"):
        _permit(Policy(), "GET", f"/web{between}hooks/default/sec{between}ret")


@pytest.mark.parametrize("path", ["/webhooks/of-tomorrow", "/secrets", "/hooks/%73ecret"])
def test_half_of_its_path_is_not_the_secret(path: str) -> None:
    _permit(Policy(), "GET", path)


def test_a_model_with_the_secret_s_name_is_a_model() -> None:
    _permit(Policy(), "GET", "/models/webhooks/secret")
