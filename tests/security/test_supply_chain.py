"""What we are made of: few packages, and pinned. The rest is checked by `scripts/check` and in the release workflow."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.documents import ROOT
from tests.security.rows import row


@row("2.34")
def test_dependencies_are_few() -> None:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^a-z0-9-]", dependency)[0] for dependency in project["dependencies"]]
    assert names == ["anyio", "asgiref", "h11", "httpx", "opentelemetry-api"]


@row("2.34")
@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements/*.txt")), ids=lambda path: path.stem)
def test_every_package_we_install_is_pinned_with_hashes(path: object) -> None:
    text = ROOT.joinpath(str(path)).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+ ", line), line
        assert "--hash=sha256:" in line, line
