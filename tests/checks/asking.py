"""What checks are asked in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replicate_proxy_mw.checks import Checked


class Replicate:
    """What is at which target, and what was asked for."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers, self.asked = dict(answers), list[str]()

    async def get(self, target: str) -> object | None:
        self.asked.append(target)
        return self.answers.get(target)


def checked(value: Any, *, at: Mapping[str, Any] | Replicate | None = None, **more: Any) -> Checked:
    replicate = at if isinstance(at, Replicate) else Replicate(at or {})
    given: dict[str, Any] = {
        "kind": "input",
        "tenant": "team-a",
        "identity": "team-a's token",
        "model": "a/b",
        "version": None,
        "operation": "predictions.create",
        "prediction_id": None,
        "metadata": {},
    }
    return Checked(value=value, get=replicate.get, **(given | more))
