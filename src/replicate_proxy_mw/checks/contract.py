"""What a check is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

Kind = Literal["input", "output"]
Word = Literal["allow", "flag", "deny"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What a check looks at: one input on its way up, or one output on its way to the caller.

    Attributes:
        kind: `input` of a create, or `output` of a prediction.
        value: the member of that name as parsed JSON, None where a create has none. Not what is sent, and not to be
            changed: other checks get the same.
        tenant: whose key this is, None where it has no name.
        identity: a digest of tenant and token. What was had by `get` is kept for it alone.
        model: `owner/name`, or `deployments/owner/name` where a create names a deployment; None where a create names a
            version alone, since that does not say whose it is.
        version: the version's id where it is named, and `hidden` for the outputs of official models.
        operation: the operation id of Replicate's OpenAPI document.
        prediction_id: the prediction whose output this is.
        metadata: what the caller sent as `x-portkey-metadata`.
        get: asks Replicate for a target such as `/models/owner/name`, with the caller's key: parsed JSON, None for
            anything but a 200 that can be read. It counts as time that the check takes.
    """

    kind: Kind
    value: Any = field(repr=False)
    tenant: str | None
    identity: str = field(repr=False)
    model: str | None
    version: str | None
    operation: str
    prediction_id: str | None
    metadata: Mapping[str, str]
    get: Callable[[str], Awaitable[object | None]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ALLOW`, `Verdict.flag("reason")` or `Verdict.deny("reason")`.

    The reason reaches the caller.

    Raises:
        ValueError: this is no verdict.
    """

    word: Word
    reason: str = ""

    def __post_init__(self) -> None:
        if self.word not in get_args(Word) or not isinstance(self.reason, str):
            raise ValueError("a verdict is allow, flag or deny, with a text as reason")

    @classmethod
    def flag(cls, reason: str) -> Self:
        """Let it pass; the answer's status is 246 and its `hook_results` have the reason."""
        return cls("flag", reason)

    @classmethod
    def deny(cls, reason: str) -> Self:
        """Answer 446 with the reason in its place."""
        return cls("deny", reason)


ALLOW = Verdict("allow")
"""Nothing to object to."""

Check = Callable[[Checked], Awaitable[Verdict]]
"""Any async callable. It is known by its attribute `name`, else by that of the function."""
