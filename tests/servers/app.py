"""A bare host behind the proxy, for servers that are started as programs; its upstream is named by the environment."""

from __future__ import annotations

import os
from typing import Any

from tests.raw_asgi import host, proxy


async def _host(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await host(scope, receive, send)


app = proxy(os.environ["UPSTREAM"], app=_host)
