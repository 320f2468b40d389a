from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import KeyRequest, PermissionDenied
from replicate_proxy_mw.keys.accounts import choose

ACCOUNTS = {"main": 1, "video": 2, "pc-video": 3}


def _request(**said: str | None) -> KeyRequest:
    return KeyRequest(api_key="pk-1", method="GET", path="/account", scope={}, **said)  # type: ignore[arg-type]


def _inline(**content: object) -> str:
    return json.dumps(content)


@pytest.mark.parametrize(
    ("said", "account"),
    [
        ({}, 1),
        ({"provider": "@video"}, 2),
        ({"provider": "video"}, 2),
        ({"provider": "@replicate"}, 1),
        ({"provider": "replicate"}, 1),
        ({"provider": "openai"}, 1),
        ({"provider": ""}, 1),
        ({"virtual_key": "video"}, 2),
        ({"virtual_key": "@video"}, 2),
        ({"virtual_key": "replicate"}, 1),
        ({"config": "pc-video"}, 3),
        ({"config": "pc-other"}, 1),
        ({"config": ""}, 1),
        ({"config": _inline(provider="@video")}, 2),
        ({"config": _inline(provider="video")}, 2),
        ({"config": _inline(provider="openai")}, 1),
        ({"config": _inline(virtual_key="video")}, 2),
        ({"config": _inline(provider="@replicate")}, 1),
        ({"config": "{}"}, 1),
    ],
)
def test_the_account_that_is_named_else_the_first(said: dict[str, str], account: int) -> None:
    assert choose(_request(**said), ACCOUNTS) == account


@pytest.mark.parametrize(
    ("said", "account"),
    [
        ({"provider": "@video", "virtual_key": "main", "config": _inline(provider="@main")}, 2),
        ({"virtual_key": "video", "config": _inline(provider="@main")}, 2),
        ({"config": _inline(provider="@video", virtual_key="main")}, 2),
        # Portkey's SDKs send the vendor's name beside what says which account.
        ({"provider": "replicate", "virtual_key": "video"}, 2),
        ({"provider": "@replicate", "virtual_key": "video"}, 2),
        ({"provider": "replicate", "config": "pc-video"}, 3),
        ({"provider": "replicate", "config": _inline(provider="@video")}, 2),
        ({"provider": "video", "config": "pc-video"}, 2),
        ({"provider": "main", "virtual_key": "video"}, 2),
    ],
)
def test_what_counts_if_several_are_named(said: dict[str, str], account: int) -> None:
    assert choose(_request(**said), ACCOUNTS) == account


def test_an_account_may_be_called_replicate() -> None:
    accounts = {"main": 1, "replicate": 2}
    for said in ({"provider": "@replicate"}, {"provider": "replicate"}, {"virtual_key": "replicate"}):
        assert choose(_request(**said), accounts) == 2
    assert choose(_request(provider="replicate", virtual_key="main"), accounts) == 1


@pytest.mark.parametrize(
    "said",
    [
        {"provider": "@other"},
        {"provider": "@"},
        {"provider": "@Video"},
        {"provider": "@@video"},
        {"virtual_key": "other"},
        {"config": _inline(provider="@other")},
        {"config": _inline(virtual_key="other")},
        {"provider": "@other", "virtual_key": "video"},
        {"provider": "video", "virtual_key": "other"},
    ],
)
def test_a_slug_that_is_not_there(said: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied, match="no provider of that name"):
        choose(_request(**said), ACCOUNTS)


@pytest.mark.parametrize(
    "config", ["{", "{}}", '{"provider": NULL}', "{" * 5, '{"a":' * 100_000, '{"a": ' + "9" * 9999 + "}"]
)
def test_a_config_that_is_no_json(config: str) -> None:
    with pytest.raises(PermissionDenied, match="not valid JSON") as raised:
        choose(_request(config=config), ACCOUNTS)
    assert raised.value.__context__ is None


def test_a_config_that_cannot_be_read_is_in_no_traceback() -> None:
    with pytest.raises(PermissionDenied) as raised:
        choose(_request(config='{"api_key": "hunter2"'), ACCOUNTS)
    report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    inside = [frame.locals for frame in report.stack if frame.filename.endswith("accounts.py")]
    assert inside
    assert "hunter2" not in str(inside)


@pytest.mark.parametrize(
    "content",
    [
        {"strategy": {"mode": "single"}, "targets": [{"provider": "@video"}]},
        {"provider": {"@video": 1}, "virtual_key": ["video"]},
        {"provider": None, "virtual_key": 5},
        {"provider": "", "virtual_key": ""},
    ],
)
def test_what_names_no_account_in_a_config_counts_as_not_there(content: dict[str, Any]) -> None:
    assert choose(_request(config=json.dumps(content)), ACCOUNTS) == 1
    assert choose(_request(config=json.dumps(content), provider="video"), ACCOUNTS) == 2


_names = st.none() | st.sampled_from(["@video", "video", "@replicate", "replicate", "@", "pc-video", "{}"]) | st.text()
_json: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["@video", "main"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["provider", "virtual_key", "targets"]), inner),
    max_leaves=5,
)


@given(provider=_names, virtual_key=_names, config=_names | st.text().map("{{{}".format) | _json.map(json.dumps))
def test_there_is_an_account_or_a_refusal(provider: str | None, virtual_key: str | None, config: str | None) -> None:
    request = _request(provider=provider, virtual_key=virtual_key, config=config)
    try:
        account = choose(request, ACCOUNTS)
    except PermissionDenied:
        return
    assert account in ACCOUNTS.values()
