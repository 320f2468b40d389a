"""Programs that a page starts, as the page starts them: in a folder of their own, on ports that are free."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# What is installed beside this Python comes first, as in an activated environment.
BINARIES = Path(sys.executable).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """The one of the tests, without what would send their telemetry or requests elsewhere."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return {**own, "PATH": f"{BINARIES}{os.pathsep}{own['PATH']}", "NO_PROXY": "127.0.0.1", **more}


def shell(code: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """What `code` prints; a command in it that fails is an error."""
    done = subprocess.run(
        ["sh", "-ec", code], cwd=folder, env=env or environment(), capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(command: str, folder: Path, port: int, env: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Run the last line of `command` once it listens at `port`, and stop it by SIGTERM; yields what it prints."""
    *first, last = command.rstrip().splitlines()
    code = "\n".join([*first, f"exec {last}"])
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            ["sh", "-ec", code], cwd=folder, env=env or environment(), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 30
            while not _listens(port):
                said = Path(log.name).read_text(errors="replace")
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.02)
            yield Path(log.name)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False
