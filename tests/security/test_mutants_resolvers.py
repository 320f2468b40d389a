from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from replicate_proxy_mw import FirstOf, KeyRequest, MappingKeyResolver, ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.keys.contract import LATER

TOKEN = "r8_0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (FirstOf, "FirstOf needs at least one resolver"),
        (
            lambda: MappingKeyResolver({}),
            "a resolver needs a list of keys, at least one key and none that is empty",
        ),
        (
            lambda: MappingKeyResolver({"pk-1": {}}),
            "accounts by slug: a key needs at least one, and a slug is not empty and written without @",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


async def _of_the_host(request: KeyRequest) -> None:
    raise AssertionError("asked without being awaited")


def test_several_answer_without_being_awaited_as_far_as_they_can() -> None:
    first, second = (StaticKeyResolver(ReplicateKey(TOKEN, tenant=one), api_keys=[f"pk-{one}"]) for one in "ab")
    known, unknown = (KeyRequest(api_key=key, method="GET", path="/account", scope={}) for key in ("pk-b", "pk-c"))
    answer = FirstOf(first, second)._at_once(known)
    assert isinstance(answer, ReplicateKey)
    assert answer.tenant == "b"
    assert FirstOf(first, second)._at_once(unknown) is None
    assert FirstOf(first, _of_the_host, second)._at_once(known) is LATER
