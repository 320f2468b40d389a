from __future__ import annotations

import re

import pytest

from replicate_proxy_mw import KeyRequest, PermissionDenied
from replicate_proxy_mw.keys.accounts import choose


@pytest.mark.parametrize(
    ("provider", "config", "message"),
    [
        ("@other", None, "This key has no provider of that name."),
        (None, "{", "x-portkey-config is not valid JSON."),
    ],
)
def test_a_refusal_says_what_is_wrong(provider: str | None, config: str | None, message: str) -> None:
    request = KeyRequest(api_key="pk-1", method="GET", path="/account", scope={}, provider=provider, config=config)
    with pytest.raises(PermissionDenied, match=f"^{re.escape(message)}$"):
        choose(request, {"main": 1})
