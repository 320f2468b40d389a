"""The Python SDKs: reads one call per line, makes it as a user would write it, prints what came of it as one line.

A process of its own, so that what the SDKs leave open ends with it, and cannot reach beyond the loopback interface.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import httpx
import openai
import portkey_ai
from replicate.client import Client
from replicate.pagination import async_paginate, paginate

_getaddrinfo = socket.getaddrinfo


def _loopback_only(host: Any, *more: Any, **options: Any) -> Any:
    if host not in ("127.0.0.1", b"127.0.0.1"):
        raise OSError(f"left the proxy for {host}")
    return _getaddrinfo(host, *more, **options)


def clients(url: str, key: str) -> dict[str, Any]:
    """The names that a call finds, bound to one proxy and one key."""
    headers = portkey_ai.createHeaders(provider="@replicate", api_key=key)  # type: ignore[no-untyped-call]
    return {
        "portkey": portkey_ai.Portkey(api_key=key, provider="@replicate", base_url=url),
        "async_portkey": portkey_ai.AsyncPortkey(api_key=key, provider="@replicate", base_url=url),
        "openai": openai.OpenAI(api_key="unused", base_url=url, default_headers=headers),
        "async_openai": openai.AsyncOpenAI(api_key="unused", base_url=url, default_headers=headers),
        "replicate": Client(api_token=key, base_url=url.removesuffix("/v1")),
        "Client": Client,
        "OpenAI": openai.OpenAI,
        "Portkey": portkey_ai.Portkey,
        "async_paginate": async_paginate,
        "createHeaders": portkey_ai.createHeaders,
        "paginate": paginate,
    }


def evaluate(call: str, names: dict[str, Any], runner: asyncio.Runner) -> Any:
    """Run the statements of `call`; its value is that of the last one."""
    *statements, last = ast.parse(call).body
    assert isinstance(last, ast.Expr), call
    parts: list[ast.Module | ast.Expression] = [ast.Module(statements, []), ast.Expression(last.value)]
    value: Any = None
    for part in parts:
        mode = "eval" if isinstance(part, ast.Expression) else "exec"
        value = eval(compile(part, call, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.iscoroutine(value):
            value = runner.run(value)
    return value


def plain(value: Any) -> Any:
    """As JSON; what JSON cannot say has a word for it."""
    if isinstance(value, httpx.Response):
        content = plain(value.json()) if "json" in value.headers.get("content-type", "") else value.text or None
        return {"$response": value.status_code, "body": content}
    for to_dict in ("model_dump", "dict"):
        if hasattr(value, to_dict):
            return plain(getattr(value, to_dict)())
    if isinstance(value, bytes):
        return {"$bytes": len(value)}
    if isinstance(value, dict):
        # A page of Replicate's SDK has its own type among its fields.
        return {name: plain(item) for name, item in value.items() if not name.startswith("__")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def answer(make: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": plain(make())}
    except Exception as error:
        status = getattr(error, "status_code", getattr(error, "status", None))
        return {"error": type(error).__name__, "status": status, "message": str(error)}


def main() -> None:
    socket.getaddrinfo = _loopback_only
    os.environ["REPLICATE_POLL_INTERVAL"] = "0.02"
    known: dict[tuple[str, str], dict[str, Any]] = {}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            given = json.loads(line)
            place = (given["url"], given["key"])
            if place not in known:
                known[place] = clients(*place)
            names = {**known[place], **given["names"]}
            call = given["call"]
            print(json.dumps(answer(lambda call=call, names=names: evaluate(call, names, runner))), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    main()
