"""Apps of pages, in front of a fake Replicate, and what is asked of them."""

from __future__ import annotations

from typing import Any

import httpx

from replicate_proxy_mw.testing import FakeReplicate
from tests.documents import execute

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
BODY = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
KEY = {"x-portkey-api-key": "pk-team-a"}


def with_upstream(code: str, fake: FakeReplicate) -> str:
    """`code` of an app, which asks `fake` in Replicate's place."""
    if "ProxyConfig(" in code:
        return code.replace("ProxyConfig(", f"ProxyConfig(upstream={fake.url!r}, ")
    code = code.replace("key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=")
    return "from replicate_proxy_mw import ProxyConfig\n" + code


def app_of(code: str, fake: FakeReplicate, name: str = "app") -> Any:
    return execute(with_upstream(code, fake))[name]


def create(client: httpx.Client, path: str = "/v1", **headers: str) -> str:
    """Create a prediction, and follow the link of the answer; returns that link."""
    made = client.post(f"{path}/predictions", json=BODY, headers=KEY | headers)
    assert made.status_code == 201, made.text
    link = made.json()["urls"]["get"]
    assert link == f"{str(client.base_url).rstrip('/')}{path}/predictions/{made.json()['id']}"
    assert client.get(link, headers=KEY | headers).json()["id"] == made.json()["id"]
    return str(link)
