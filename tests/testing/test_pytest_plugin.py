from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from replicate_proxy_mw.testing import Clock, FakeReplicate


def test_the_fixture_serves(fake_replicate: FakeReplicate) -> None:
    answer = httpx.get(f"{fake_replicate.url}/account", headers={"authorization": f"Bearer {fake_replicate.token}"})
    assert answer.json()["username"] == "acme"
    assert type(fake_replicate.clock) is Clock
    assert httpx.get(fake_replicate.streams_url).status_code == 404
    assert len(fake_replicate.requests) == len(fake_replicate.stream_requests) == 1


OUTER = """
import httpx, pytest

@pytest.fixture
def fake_replicate_options():
    return {"tokens": {"r8_mine": "me"}}

def test_options(fake_replicate):
    assert fake_replicate.token == "r8_mine"

def test_violation(fake_replicate):
    assert httpx.get(fake_replicate.url, headers={"cookie": "a=b"}).status_code == 400
"""


def test_options_and_violations(tmp_path: Path) -> None:
    path = tmp_path / "test_inner.py"
    path.write_text(OUTER)
    plugin = _Results()
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "replicate_proxy_mw.testing.pytest_plugin",
        f"--rootdir={tmp_path}",
    ]
    pytest.main([*options, "-c", "/dev/null", str(path)], plugins=[plugin])
    assert plugin.outcomes == {"test_options": {"passed"}, "test_violation": {"passed", "failed"}}
    assert "headers that must not reach Replicate: ['cookie']" in plugin.text


class _Results:
    def __init__(self) -> None:
        self.outcomes: dict[str, set[str]] = {}
        self.text = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcomes.setdefault(report.location[2], set()).add(report.outcome)
        if report.failed:
            self.text = str(report.longrepr.reprcrash.message).split("\n")[0]  # type: ignore[union-attr]
