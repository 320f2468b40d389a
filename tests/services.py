"""Real servers for tests: child processes on free ports of 127.0.0.1, with their data in a folder that goes with them.

Load the fixtures with `pytest_plugins = ["tests.services"]`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

POSTGRES = "/usr/lib/postgresql"
INITDB = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")


@pytest.fixture(scope="session")
def redis_service() -> Iterator[RedisServer]:
    """One Redis for all tests that neither stop nor configure it: each takes keys of its own."""
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """One PostgreSQL for all tests: each takes tables of its own. The URL is `postgresql://postgres@127.0.0.1:…`."""
    with postgres() as url:
        yield url


class RedisServer:
    """A Redis that keeps nothing: after `stop` and `start` it is at the same port, and empty."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = _spawn(self._command, self._answers)

    def stop(self) -> None:
        if self._process is not None:
            _end(self._process, signal.SIGTERM)
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the server takes connections and commands, and does not answer before the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(1) != b""


@contextmanager
def redis_server(port: int | None = None, *options: str) -> Iterator[RedisServer]:
    """Run redis-server, with more `options` of its command line."""
    binary = shutil.which("redis-server")
    if binary is None:
        _missing("redis-server is not installed")
    port = port or _free_port()
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder]
        server = RedisServer([*command, "--save", "", "--appendonly", "no", *options], port)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextmanager
def postgres() -> Iterator[str]:
    """Run PostgreSQL; yields the URL of its database `postgres`, which is open to the user of that name."""
    # Version 9 comes before 15.
    found = sorted(Path(POSTGRES).glob("*/bin/initdb"), key=lambda path: [int(n) for n in path.parts[-3].split(".")])
    if not found:
        _missing("PostgreSQL is not installed")
    binaries = found[-1].parent
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        as_user: dict[str, Any] = {"cwd": folder}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            try:
                account = pwd.getpwnam("postgres")
            except KeyError:
                _missing("PostgreSQL does not run as root, and there is no user postgres")
            os.chown(folder, account.pw_uid, account.pw_gid)
            as_user |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        data, port = f"{folder}/data", _free_port()
        subprocess.run(
            [str(binaries / "initdb"), "--pgdata", data, *INITDB],
            check=True,
            stdout=subprocess.DEVNULL,
            **as_user,
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": folder,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
        }
        process = _spawn(
            [str(binaries / "postgres"), "-D", data]
            + [part for name, value in settings.items() for part in ("-c", f"{name}={value}")],
            lambda: (
                subprocess.run([str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode == 0
            ),
            **as_user,
        )
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            _end(process, signal.SIGINT)  # a fast shutdown: it does not wait for clients


def two_processes(program: str, *arguments: str) -> list[str]:
    """What each of two has to tell, which begin at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [process.communicate(timeout=15)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _missing(reason: str) -> NoReturn:
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _spawn(command: Sequence[str], answers: Callable[[], bool], **options: Any) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if answers():
                    return process
            except OSError:
                pass
            time.sleep(0.02)
        _end(process, signal.SIGKILL)
        output.seek(0)
        raise AssertionError(f"{command[0]} did not start: {output.read().decode(errors='replace')}")


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
