"""A bare host behind the proxy, for servers started as programs; the environment names its upstream and transport."""

from __future__ import annotations

import os

from tests.raw_asgi import proxy

app = proxy(os.environ["UPSTREAM"], options={"fast": os.environ.get("TRANSPORT") == "fast"})
