"""Every option of `ProxyConfig`: type, default and reason from its source, what is refused by trying it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import replicate_proxy_mw.config
from replicate_proxy_mw import KeyRequest, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.portkey import MAX_ATTEMPTS

GROUPS: Mapping[str, Sequence[str]] = {
    "Where requests come from and go to": ("prefix", "upstream", "exclude", "public_url"),
    "Keys and models": ("require_key", "lookup_versions"),
    "What passes": ("unwrap_data", "safe_retries", "forward_headers", "return_headers", "fast"),
    "Times": (
        *("connect_timeout", "connection_wait", "write_timeout", "read_timeout", "body_timeout", "total_timeout"),
        *("resolver_timeout", "store_timeout"),
    ),
    "Numbers and sizes": ("max_in_flight", "max_connections", "max_body_size"),
    "Streams": ("proxy_streams", "stream_key", "stream_lifetime", "stream_timeout", "max_streams", "stream_hosts"),
    "Webhooks": ("webhook_secrets", "webhook_timeout"),
    "Telemetry": ("trust_traceparent", "propagate_upstream", "capture_content"),
}

UNITS = {
    "safe_retries": "attempts",
    "max_in_flight": "requests",
    "max_connections": "connections",
    "max_body_size": "bytes",
    "max_streams": "streams",
}

# What the table of defaults has no room for, or what the value alone does not tell.
DEFAULTS = {"stream_hosts": f"{len(STREAM_HOSTS)} hosts", "capture_content": "`None`: as the environment says"}

KEY = "a secret of at least 32 characters"

# Values that are refused, by the option that the error names: with the options that are needed beside it.
REFUSED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "prefix": ({"prefix": "v1/"}, {"prefix": "/my api"}),
    "upstream": (
        {"upstream": "api.replicate.com/v1"},
        {"upstream": "http://replicate.internal/v1"},
        {"upstream": "https://user:password@replicate.internal/v1"},
        {"upstream": "https://api.replicate.com/v1/"},
    ),
    "exclude": ({"exclude": "/v1/own"}, {"exclude": ["/own"]}),
    "public_url": ({"public_url": "https://app.example/v1/"},),
    "safe_retries": ({"safe_retries": MAX_ATTEMPTS + 1},),
    "forward_headers": ({"forward_headers": "x-mine"}, {"forward_headers": ["Authorization"]}),
    "return_headers": ({"return_headers": ["Set-Cookie"]},),
    "stream_key": ({"proxy_streams": True, "stream_key": "too short"},),
    "stream_lifetime": ({"stream_lifetime": 0}, {"stream_lifetime": 172800}),
    "stream_hosts": (
        {"stream_hosts": "stream.replicate.com"},
        {"proxy_streams": True, "stream_key": KEY, "stream_hosts": ["https://stream.replicate.com"]},
    ),
    "webhook_secrets": ({"webhook_secrets": "whsec_…"}, {"webhook_secrets": ["a password"]}),
    "trust_traceparent": ({"trust_traceparent": "maybe"},),
    "propagate_upstream": ({"propagate_upstream": True, "forward_headers": ["traceparent"]},),
    "capture_content": ({"capture_content": "ALL"},),
    **{
        name: ({name: 0},)
        for name in (*GROUPS["Times"], "stream_timeout", "webhook_timeout", "max_streams", *GROUPS["Numbers and sizes"])
    },
}


def lines() -> Iterator[str]:
    """What the page has between its marks."""
    fields = {field.name: field for field in dataclasses.fields(ProxyConfig)}
    reasons = docstrings(ProxyConfig)
    yield "| option | type | default | unit |"
    yield "| --- | --- | --- | --- |"
    for names in GROUPS.values():
        for name in names:
            yield f"| [`{name}`](#{name}) | {type_of(fields[name])} | {default_of(fields[name])} | {unit_of(name)} |"
    for group, names in GROUPS.items():
        yield f"\n## {group}"
        for name in names:
            unit = unit_of(name)
            yield f"\n### `{name}`"
            yield f"\n{type_of(fields[name])}, by default {default_of(fields[name])}{f'; in {unit}' if unit else ''}"
            yield f"\n{reasons[name]}"
            if name == "stream_hosts":
                yield f"\nThe {DEFAULTS[name]}: {', '.join(f'`{host}`' for host in STREAM_HOSTS)}."
            if name == "fast":
                [text] = [text for text in templates() if text.startswith("fast:")]
                yield f"\nRefused with a `ValueError` where that package is not installed: `{text}`."
            if name in REFUSED:
                yield "\nRefused with a `ValueError`:\n"
                yield from (f"- `{shown(options)}`: `{refusal(options)}`" for options in REFUSED[name])


def docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a class, in one line."""
    [tree] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def type_of(field: dataclasses.Field[Any]) -> str:
    """Without a `|`, which would end the cell of a table."""
    text = str(field.type)
    if text.startswith("Literal["):
        return " or ".join(f"`{word}`" for word in re.findall(r"'\w+'", text.replace('"', "'")))
    return " or ".join(f"`{one}`" for one in text.split(" | "))


def default_of(field: dataclasses.Field[Any]) -> str:
    value = field.default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:,}".removesuffix(".0") if is_number else repr(value).replace("'", '"')
    return DEFAULTS.get(field.name, f"`{text}`")


def unit_of(name: str) -> str:
    return "seconds" if name in GROUPS["Times"] or name.endswith(("_timeout", "_lifetime")) else UNITS.get(name, "")


def shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()).replace("'", '"')


def refusal(options: Mapping[str, Any]) -> str:
    """What is said where an app is made with such options."""
    try:
        ReplicateProxyMiddleware(_host, key_resolver=_nobody, config=ProxyConfig(**options))
    except ValueError as error:
        return str(error)
    raise AssertionError(f"taken: {options}")


def templates() -> list[str]:
    """The text of each error in the source of the options, with `…` for what differs."""
    tree = ast.parse(inspect.getsource(replicate_proxy_mw.config))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return [text_of(error.args[0]) or "" for error in raised if isinstance(error, ast.Call)]


def text_of(node: ast.expr) -> str | None:
    """A text of the source, with `…` for what differs; None for anything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr):
        return None
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


async def _host(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not called")


async def _nobody(request: KeyRequest) -> None:
    raise AssertionError("not called")
