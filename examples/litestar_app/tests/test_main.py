"""`python -m examples.litestar_app`, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    own = {name: value for name, value in os.environ.items() if name != "REPLICATE_API_TOKEN"}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.litestar_app"],
        env={**own, "PORT": str(port), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def status(port: int) -> httpx.Response:
    transport = httpx.HTTPTransport(retries=10)  # it says where it is just before it listens
    with httpx.Client(transport=transport) as client:
        return client.get(f"http://127.0.0.1:{port}/v1/status")


def test_it_runs_on_a_fake_and_shows_each_request_as_a_tree() -> None:
    port = free_port()
    with running(port) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        assert status(port).json() == {"service": "illustration desk", "pictures": 0}
        hardware = httpx.get(f"http://127.0.0.1:{port}/v1/hardware", headers={"x-portkey-api-key": "pk-team-b"})
        assert hardware.status_code == 200
        created = httpx.post(
            f"http://127.0.0.1:{port}/v1/predictions",
            headers={"x-portkey-api-key": "pk-team-b", "prefer": "wait"},
            json={"version": HELLO_WORLD, "input": {"text": "Alice"}},
        )
        assert created.json()["status"] == "succeeded"
        assert "<html" in httpx.get(f"http://127.0.0.1:{port}/traces", follow_redirects=True).text
        listed = httpx.get(f"http://127.0.0.1:{port}/traces/requests.json?q=team-b").json()["requests"]
        assert [one["operation"] for one in listed] == ["predictions.create", "hardware.list"]
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "outcome=forwarded  tenant=team-b  operation=hardware.list" in shown
    assert "generate_content replicate/hello-world" in shown
    assert "prediction.queue_time=0.2" in shown
    assert "prediction.run_time=0.6" in shown
    assert "prediction.cost=0.00006  prediction.cost.currency=USD" in shown
    assert "/traces" not in shown  # what the viewer asks for is no span
    assert "Traceback" not in shown


def test_with_a_token_it_runs_on_replicate_itself() -> None:
    port = free_port()
    with running(port, REPLICATE_API_TOKEN="r8_not_a_real_token") as process:
        assert process.stdout is not None
        assert "(https://api.replicate.com/v1)" in process.stdout.readline()
        assert status(port).status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0
