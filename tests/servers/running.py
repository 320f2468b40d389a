"""Starts an ASGI server as a program of its own, the way it is deployed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

APP = "tests.servers.app:app"

SERVERS = {
    "uvicorn-h11": ["uvicorn", APP, "--http", "h11", "--port", "{port}"],
    "uvicorn-httptools": ["uvicorn", APP, "--http", "httptools", "--port", "{port}"],
    "hypercorn-asyncio": ["hypercorn", APP, "--bind", "127.0.0.1:{port}"],
    "hypercorn-trio": ["hypercorn", APP, "--worker-class", "trio", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", APP, "--interface", "asgi", "--port", "{port}"],
}


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Return once `process` listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"the server did not start: {process.communicate()[0].decode()}") from None
            time.sleep(0.05)


@contextmanager
def running(server: str, upstream: str, transport: str = "default") -> Iterator[int]:
    """Run one of `SERVERS` with the proxy in front of `upstream`; yields its port once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *(part.format(port=port) for part in SERVERS[server])]
    process = subprocess.Popen(
        command,
        env=os.environ | {"UPSTREAM": upstream, "TRANSPORT": transport},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGINT if server.startswith("hypercorn") else signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
