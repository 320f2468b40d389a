"""A bare host behind the proxy, for servers that are started as programs; its upstream is named by the environment."""

from __future__ import annotations

import os

from tests.raw_asgi import proxy

app = proxy(os.environ["UPSTREAM"])
