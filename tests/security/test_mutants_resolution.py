from __future__ import annotations

import pytest

from replicate_proxy_mw import KeyRequest, StaticKeyResolver
from replicate_proxy_mw.errors import KeyMissing, KeyUnknown, ProxyError
from replicate_proxy_mw.keys.resolution import resolve

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("api_key", "error"), [("", KeyMissing), ("pk-2", KeyUnknown)])
async def test_no_key_is_told_apart_from_one_that_nobody_knows(api_key: str, error: type[ProxyError]) -> None:
    request = KeyRequest(api_key=api_key, method="GET", path="/account", scope={})
    with pytest.raises(error):
        await resolve(StaticKeyResolver("r8_0123456789", api_keys=["pk-1"]), request, seconds=1)
