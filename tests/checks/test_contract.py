from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from replicate_proxy_mw.checks import ALLOW, Verdict


def test_a_verdict_reads_like_one() -> None:
    assert Verdict("allow") == ALLOW
    assert Verdict.flag("why") == Verdict("flag", "why")
    assert Verdict.deny("why") == Verdict("deny", "why")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALLOW.word = "deny"  # type: ignore[misc]


@pytest.mark.parametrize("arguments", [("no",), ("deny", 1)])
def test_a_verdict_that_cannot_be_told_is_none(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="a verdict is"):
        Verdict(*arguments)


def test_the_package_and_the_layer_need_no_package_of_the_extra() -> None:
    script = (
        "import sys, replicate_proxy_mw, replicate_proxy_mw.checks, replicate_proxy_mw.layers.guardrails;"
        "print({'re2', 'jsonschema', 'referencing'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
