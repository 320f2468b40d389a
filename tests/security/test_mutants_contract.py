from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from replicate_proxy_mw import KeyRequest, Policy, ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.keys.contract import LATER, at_once, digest

TOKEN = "r8_0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: ReplicateKey("r8_"), ValueError, "not a Replicate API token: 8 to 256 letters, digits or -._~+/="),
        (lambda: ReplicateKey(TOKEN, tenant=""), ValueError, "tenant: must be a text that can be printed"),
        (
            lambda: ReplicateKey(TOKEN, policy=Policy(max_in_flight=1)),
            ValueError,
            "own_predictions and max_in_flight hold for a tenant: name one",
        ),
        (lambda: copy.copy(ReplicateKey(TOKEN)), TypeError, "a ReplicateKey is neither copied nor pickled"),
        (lambda: ReplicateKey(TOKEN).__getstate__(), TypeError, "a ReplicateKey has no state to give away"),
    ],
)
def test_a_refusal_says_what_is_wrong(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()


def test_a_key_is_printed_as_wide_as_it_is_asked_for() -> None:
    shown = "ReplicateKey('***', tenant=None)"
    assert f"{ReplicateKey(TOKEN):>40}" == shown.rjust(40)


def test_half_a_character_in_a_key_is_a_key_like_any_other() -> None:
    keys = ["pk-\ud800", "pk-\ud801", "pk-?", "pk-"]
    assert len({digest(key) for key in keys}) == len(keys)


class OfTheHost(StaticKeyResolver):
    def _at_once(self, request: KeyRequest) -> ReplicateKey | None:
        raise AssertionError("asked without being awaited")


def test_our_own_resolvers_alone_answer_without_being_awaited() -> None:
    known, unknown = (KeyRequest(api_key=key, method="GET", path="/account", scope={}) for key in ("pk-1", "pk-2"))
    ours = StaticKeyResolver(TOKEN, api_keys=["pk-1"])
    assert isinstance(at_once(ours, known), ReplicateKey)
    assert at_once(ours, unknown) is None
    assert at_once(OfTheHost(TOKEN, api_keys=["pk-1"]), known) is LATER
