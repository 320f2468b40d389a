"""Who is compared, and how each is started: one worker on the proxy's core."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .processes import PROXY_CORE, Process, free_port, started
from .traffic import TOKEN
from .upstream import nginx


@dataclass(frozen=True)
class Contestant:
    """`app` is a factory in `apps.py`, and `needs` what has to be importable for it."""

    name: str
    label: str
    app: str = ""
    needs: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.label.startswith("replicate_proxy_mw")

    @property
    def forwards(self) -> bool:
        return self.name != "uvicorn"


CONTESTANTS = (
    Contestant("nginx", "nginx, `proxy_pass`"),
    Contestant("uvicorn", "uvicorn, answering by itself", "bare"),
    Contestant("fast", "replicate_proxy_mw, fast", "fast"),
    Contestant("fast+sdk", "replicate_proxy_mw, fast, OpenTelemetry SDK", "fast_sdk", ("opentelemetry.sdk",)),
    Contestant("default", "replicate_proxy_mw", "default"),
    Contestant("default+sdk", "replicate_proxy_mw, OpenTelemetry SDK", "default_sdk", ("opentelemetry.sdk",)),
    Contestant("httpx", "httpx.AsyncClient in 30 lines of ASGI", "stock_httpx"),
    Contestant("starlette", "Starlette and httpx", "starlette_recipe", ("starlette",)),
    Contestant("fastapi-proxy-lib", "fastapi-proxy-lib", "fastapi_proxy_lib", ("fastapi_proxy_lib",)),
)


@contextmanager
def running(contestant: Contestant, upstream: Process, folder: Path, loop: str) -> Iterator[Process]:
    if contestant.name == "nginx":
        with nginx(folder / "proxy", PROXY_CORE, *_proxy_pass(upstream.port)) as proxy:
            yield proxy
        return
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"benchmarks.compare.apps:{contestant.app}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--loop", loop, "--http", "httptools", "--no-access-log"]
    command += ["--log-level", "warning", "--backlog", "4096", "--timeout-keep-alive", "300", "--no-server-header"]
    with started(
        command,
        core=PROXY_CORE,
        port=port,
        log=folder / f"{contestant.name}.log",
        environment={"UPSTREAM": f"http://127.0.0.1:{upstream.port}"},
    ) as proxy:
        yield proxy


def _proxy_pass(port: int) -> tuple[str, str]:
    dropped = "".join(
        f"proxy_set_header x-portkey-{name} ''; " for name in ("api-key", "provider", "trace-id", "metadata")
    )
    location = f"""
        location /v1/ {{
            proxy_pass http://upstream; proxy_http_version 1.1; proxy_read_timeout 300s;
            proxy_set_header connection ''; proxy_set_header host 127.0.0.1:{port}; {dropped}
            proxy_set_header authorization 'Bearer {TOKEN}'; proxy_buffering off; proxy_request_buffering off;
        }}"""
    upstream = f"server 127.0.0.1:{port}; keepalive 4096; keepalive_requests 1000000000;"
    return location, f"upstream upstream {{ {upstream} }}"
