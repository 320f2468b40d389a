"""The checks of one exchange: what they are asked, and what its span says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ProxyError
from ..exchange import Forward, ProxyRequest
from ..model_names import Named
from ..telemetry.names import GUARDRAIL_CHECK, GUARDRAIL_VERDICT
from .contract import Check, Checked, Kind
from .reading import got, model_of
from .running import Result, run

_WORST = ("allow", "flag", "deny")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Guard:
    """Asks checks on behalf of `request`; `timeout` is in seconds."""

    def __init__(self, request: ProxyRequest, forward: Forward, *, timeout: float, fail_open: bool) -> None:
        self._request, self._forward = request, forward
        self.timeout, self.fail_open = timeout, fail_open
        self._if_failed = "allow" if fail_open else "deny"

    async def input(self, checks: Sequence[Check], value: object, named: Named) -> list[Result]:
        return await self._asked(checks, "input", value, named, None, self.timeout)

    async def output(self, checks: Sequence[Check], prediction: Mapping[str, Any], *, seconds: float) -> list[Result]:
        value, named, id = prediction["output"], model_of(prediction), id_of(prediction)
        return await self._asked(checks, "output", value, named, id, seconds)

    def failed(self, check: str, error: ProxyError) -> None:
        """What is to be checked could not be.

        Raises:
            ProxyError: `error`, unless that is let pass.
        """
        self._note(self._if_failed, check)
        if not self.fail_open:
            raise error

    async def _asked(
        self, checks: Sequence[Check], kind: Kind, value: object, named: Named, id: str | None, seconds: float
    ) -> list[Result]:
        checked = Checked(
            kind=kind,
            value=value,
            tenant=self._request.key.tenant,
            identity=self._request.key.identity(),
            model=named.name,
            version=named.version,
            operation=self._request.operation or "",
            prediction_id=id,
            metadata=self._request.portkey.metadata or {},
            get=partial(got, self._request, self._forward),
        )
        results = await run(checks, checked, seconds=seconds)
        for one in results:
            word = self._if_failed if one.word == "failed" else one.word
            self._note(word, None if one.word == "allow" else one.check)
        return results

    def _note(self, word: str, check: str | None) -> None:
        """Note the worst verdict and the first check that is the reason for it."""
        notes = self._request.notes
        is_worse = _WORST.index(word) > _WORST.index(str(notes.setdefault(GUARDRAIL_VERDICT, "allow")))
        if is_worse:
            notes[GUARDRAIL_VERDICT] = word
        if check is not None and (is_worse or GUARDRAIL_CHECK not in notes):
            notes[GUARDRAIL_CHECK] = check


def id_of(prediction: Mapping[str, Any]) -> str | None:
    id = prediction.get("id")
    return id if isinstance(id, str) and _ID.fullmatch(id) else None
