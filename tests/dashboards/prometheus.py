"""Debian's Prometheus on a free port of 127.0.0.1, and its `promtool`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.services import _end, _free_port, _missing, _spawn


class Prometheus:
    """`moment` is when queries are answered for, in seconds of the epoch; now, if it is None."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.moment: float | None = None
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=20)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series at the moment; broken PromQL fails with Prometheus' own words."""
        when = {} if self.moment is None else {"time": f"{self.moment:.3f}"}
        result: list[dict[str, Any]] = self._get("/query", query=expr, **when)["result"]
        return result

    def values(self, label: str, selector: str) -> list[str]:
        """Of a label, on the series of `selector`."""
        values: list[str] = self._get(f"/label/{label}/values", **{"match[]": selector})
        return values

    def rules(self) -> list[str]:
        """The names of the rules that it has."""
        return [rule["name"] for group in self._get("/rules")["groups"] for rule in group["rules"]]

    def close(self) -> None:
        self._client.close()

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]


@contextmanager
def prometheus(config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Run it with `config`, which is JSON and so YAML."""
    binary = _found("prometheus")
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="prometheus-") as folder:
        path = Path(folder, "prometheus.yml")
        path.write_text(json.dumps(config))
        process = _spawn(
            [
                binary,
                f"--config.file={path}",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            lambda: _ready(port),
        )
        server = Prometheus(f"http://127.0.0.1:{port}")
        try:
            yield server
        finally:
            server.close()
            _end(process, signal.SIGTERM)


def promtool(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_found("promtool"), *arguments], capture_output=True, text=True, cwd=cwd)


def _found(program: str) -> str:
    binary = shutil.which(program)
    if binary is None:
        _missing(f"{program} is not installed")
    return binary


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
