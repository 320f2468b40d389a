from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from replicate_proxy_mw import ProxyConfig


def test_the_defaults_are_valid_and_frozen() -> None:
    config = ProxyConfig()
    assert (config.prefix, config.upstream) == ("/v1", "https://api.replicate.com/v1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prefix = "/v2"  # type: ignore[misc]


def test_held_creates_fit_into_the_read_timeout() -> None:
    assert ProxyConfig().read_timeout > 60.5


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": ""},
        {"prefix": "/replicate/v1", "exclude": ["/replicate/v1/own"]},
        {"prefix": "", "exclude": ["/own"]},
        {"exclude": ["/v1/a%20b"]},
        {"upstream": "http://127.0.0.1:8000/v1"},
        {"upstream": "http://localhost:8000"},
        {"upstream": "http://[::1]:8000/v1"},
        {"forward_headers": ["X-Mine"], "return_headers": ["x-other"]},
        {"trust_traceparent": "link"},
        {"propagate_upstream": True, "capture_content": "SPAN_AND_EVENT"},
        {"webhook_secrets": ["whsec_a", "whsec_b"], "webhook_timeout": 2.5},
        {"public_url": "https://app.example/v1", "safe_retries": 5, "unwrap_data": False},
        {"proxy_streams": True, "stream_key": "k" * 32, "stream_hosts": ["*.replicate.com"]},
    ],
)
def test_what_can_be_set(options: dict[str, Any]) -> None:
    config = ProxyConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefix": "v1"}, "prefix: 'v1' must begin"),
        ({"prefix": "/v1/"}, "prefix"),
        ({"prefix": "/ v1"}, "percent-encoded"),
        ({"exclude": "/v1/own"}, "exclude: a list"),
        ({"exclude": ["/own"]}, "exclude: '/own' is not below"),
        ({"exclude": [""]}, "exclude"),
        ({"upstream": "ftp://api.replicate.com"}, "upstream: must be an http"),
        ({"upstream": "https:///v1"}, "upstream"),
        ({"upstream": "https://u:p@api.replicate.com/v1"}, "user or password"),
        ({"upstream": "https://api.replicate.com/v1/"}, "must end"),
        ({"upstream": "https://api.replicate.com/v1?a=b"}, "must end"),
        ({"upstream": "https://api.replicate.com/v1#a"}, "must end"),
        ({"upstream": "http://api.replicate.com/v1"}, "must be https"),
        ({"upstream": "http://192.0.2.1/v1"}, "must be https"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"read_timeout": -1.0}, "read_timeout"),
        ({"write_timeout": float("nan")}, "write_timeout"),
        ({"connection_wait": 0}, "connection_wait"),
        ({"resolver_timeout": 0}, "resolver_timeout"),
        ({"store_timeout": 0}, "store_timeout"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_streams": 0}, "max_streams"),
        ({"forward_headers": ["Traceparent"], "propagate_upstream": True}, "propagate_upstream"),
        ({"forward_headers": ["Authorization"]}, "forward_headers: 'Authorization' is never"),
        ({"forward_headers": ["x-portkey-api-key"]}, "forward_headers"),
        ({"forward_headers": "x-mine"}, "forward_headers: a list"),
        ({"return_headers": ["set-cookie"]}, "return_headers"),
        ({"trust_traceparent": "maybe"}, "trust_traceparent"),
        ({"public_url": "https://app.example/v1/"}, "public_url"),
        ({"public_url": "app.example"}, "public_url"),
        ({"safe_retries": 6}, "safe_retries"),
        ({"proxy_streams": True}, "stream_key"),
        ({"proxy_streams": True, "stream_key": "short"}, "stream_key"),
        ({"stream_hosts": "stream.replicate.com"}, "stream_hosts: a list"),
        ({"stream_lifetime": 0}, "stream_lifetime"),
        ({"stream_lifetime": 86401}, "stream_lifetime"),
        ({"stream_timeout": 0}, "stream_timeout"),
        ({"webhook_timeout": 0}, "webhook_timeout"),
        ({"webhook_secrets": "whsec_hunter2"}, "webhook_secrets: a list"),
    ],
)
def test_what_cannot(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ProxyConfig(**options)


def test_a_password_in_the_upstream_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="upstream") as raised:
        ProxyConfig(upstream="https://u:hunter2@api.replicate.com/v1")
    assert "hunter2" not in str(raised.value)


def test_secrets_are_neither_printed_nor_repeated() -> None:
    config = ProxyConfig(stream_key="hunter2" * 5, webhook_secrets=["whsec_hunter2"])
    assert "hunter2" not in repr(config)
    with pytest.raises(ValueError, match="webhook_secrets") as raised:
        ProxyConfig(webhook_secrets="whsec_hunter2")
    assert "hunter2" not in str(raised.value)


def test_nothing_of_what_is_nobody_s_business_is_told_by_default() -> None:
    config = ProxyConfig()
    assert (config.propagate_upstream, config.capture_content, list(config.webhook_secrets)) == (False, None, [])


def test_the_fast_transport_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ProxyConfig(fast=True).fast
    monkeypatch.setitem(sys.modules, "httptools", None)
    with pytest.raises(ValueError, match=r"^fast: needs httptools"):
        ProxyConfig(fast=True)
