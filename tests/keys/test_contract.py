from __future__ import annotations

import copy
import json
import pickle
import pprint
import traceback
from typing import Any

import pytest

from replicate_proxy_mw import KeyRequest, Policy, ReplicateKey

TOKEN = "r8_0123456789abcdefghijklmnopqrstuvwxyz"


def test_a_key_shows_its_tenant_and_never_its_token() -> None:
    key = ReplicateKey(TOKEN, tenant="team-a")
    for shown in (repr(key), str(key), f"{key}", f"{key:>60}", f"{key!r}", pprint.pformat([key])):
        assert "team-a" in shown
        assert "0123" not in shown


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy, json.dumps])
def test_a_key_cannot_be_copied_out(copying: object) -> None:
    with pytest.raises(TypeError) as raised:
        copying(ReplicateKey(TOKEN))  # type: ignore[operator]
    assert "0123" not in str(raised.value)


def test_a_key_has_no_state_to_look_at() -> None:
    key = ReplicateKey(TOKEN)
    with pytest.raises(TypeError):
        vars(key)
    with pytest.raises(TypeError):
        key.__getstate__()


def test_the_value_of_the_header() -> None:
    assert ReplicateKey(TOKEN).authorization() == b"Bearer " + TOKEN.encode()


@pytest.mark.parametrize(
    "token", ["", "r8_", "r8_012345\n6789", "r8_ü2345678", "r8 012345678", "x" * 257, None, b"r8_0123456789"]
)
def test_what_is_no_token(token: str) -> None:
    with pytest.raises(ValueError, match="not a Replicate API token"):
        ReplicateKey(token)


def test_a_refused_token_is_in_no_traceback() -> None:
    try:
        ReplicateKey(TOKEN + "\n")
    except ValueError as error:
        report = traceback.TracebackException.from_exception(error, capture_locals=True)
        frames = "".join(frame.locals["self"] for frame in report.stack if frame.locals and "self" in frame.locals)
        assert "0123" not in frames
        assert "0123" not in "".join(report.format_exception_only())


def test_printing_a_request_shows_no_secret() -> None:
    scope = {"headers": [(b"authorization", b"secret")]}
    request = KeyRequest(
        api_key="secret", virtual_key="secret", config="secret", method="GET", path="/predictions", scope=scope
    )
    assert "secret" not in repr(request)
    assert "/predictions" in repr(request)


def test_the_same_token_for_another_tenant() -> None:
    policy = Policy(own_predictions=True)
    key = ReplicateKey(TOKEN, tenant="team-a").of(tenant="team-b", policy=policy)
    assert (key.authorization(), key.tenant, key.policy) == (b"Bearer " + TOKEN.encode(), "team-b", policy)


def test_answers_are_shared_only_between_those_of_one_tenant_and_one_token() -> None:
    keys = [ReplicateKey(token, tenant=tenant) for token in (TOKEN, TOKEN + "0") for tenant in (None, "0", "team-a")]
    assert len({key.identity() for key in keys}) == len(keys)
    again = ReplicateKey(TOKEN, tenant="team-a", policy=Policy(operations=["*"]))
    assert again.identity() == keys[2].identity()
    assert TOKEN not in again.identity()


@pytest.mark.parametrize("tenant", ["", 42, {"id": 1}, b"team-a", "team\n-a"])
def test_a_tenant_is_a_name(tenant: Any) -> None:
    with pytest.raises(ValueError, match="tenant"):
        ReplicateKey("r8_aaaaaaaaaaaaaaaa", tenant=tenant)


@pytest.mark.parametrize("policy", [Policy(own_predictions=True), Policy(max_in_flight=1)])
def test_a_rule_that_counts_by_tenant_needs_one(policy: Policy) -> None:
    with pytest.raises(ValueError, match="name one"):
        ReplicateKey("r8_aaaaaaaaaaaaaaaa", policy=policy)
    assert ReplicateKey("r8_aaaaaaaaaaaaaaaa", tenant="team-a", policy=policy).policy is policy
