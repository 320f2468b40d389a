"""Child processes on cores of their own: what they cost in CPU and memory, and that none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

# The proxy under measurement has a core for itself; load and upstream share the other.
PROXY_CORE, LOAD_CORE = (sorted(os.sched_getaffinity(0)) * 2)[:2]


class Process:
    """A child that answers at `port`, with all that it starts in turn."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.port = port

    def cpu(self) -> float:
        """Seconds so far, of all threads."""
        spent = 0
        for pid in self._tree():
            for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                spent += int(schedstat.read_text().split()[0])
        return spent / 1e9

    def memory(self, what: str = "VmRSS") -> float:
        """KiB that are resident, or with `VmHWM` the most since `forget_peak`."""
        lines = [line for pid in self._tree() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(what))

    def forget_peak(self) -> None:
        for pid in self._tree():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _tree(self) -> list[int]:
        found = [self._process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    def end(self) -> None:
        tree = self._tree() if self._process.poll() is None else []
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            for pid in tree:
                os.kill(pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def started(
    command: Sequence[str], *, core: int, port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run `command`, which listens at `port` of 127.0.0.1.

    Raises:
        RuntimeError: it does not; with the end of what it said.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    running = Process(process, port)
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield running
    finally:
        running.end()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
