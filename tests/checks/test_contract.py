from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from replicate_proxy_mw.checks import ALLOW, Verdict


def test_a_verdict_reads_like_one() -> None:
    assert Verdict("allow") == ALLOW
    assert Verdict.flag("why") == Verdict("flag", "why", None)
    assert Verdict.deny("why", data={"n": 1}) == Verdict("deny", "why", {"n": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALLOW.word = "deny"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("no",), ValueError),
        (("deny", 1), ValueError),
        (("deny", "why", {"x": object()}), TypeError),
        (("deny", "why", {"x": float("nan")}), ValueError),
        (("deny", "why", [1]), TypeError),
    ],
)
def test_a_verdict_that_cannot_be_told_is_none(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        Verdict(*arguments)


def test_data_is_what_it_was_when_the_verdict_was_given() -> None:
    data: dict[str, Any] = {"x": [1]}
    verdict = Verdict.deny("why", data=data)
    data["x"].append(object())
    assert verdict.data == {"x": [1]}


def test_the_package_and_the_layer_need_no_package_of_the_extra() -> None:
    script = (
        "import sys, replicate_proxy_mw, replicate_proxy_mw.checks, replicate_proxy_mw.layers.guardrails;"
        "print({'re2', 'jsonschema', 'referencing'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
