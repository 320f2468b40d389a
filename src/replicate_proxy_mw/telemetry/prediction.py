"""What a payload of Replicate's tells of a prediction or training: read once, believed no further than its types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from .scrub import Scrubber

Kind = Literal["prediction", "training"]

# The schema `prediction_response` of Replicate's OpenAPI document; the last four are final.
STATUSES = frozenset(("starting", "processing", "succeeded", "failed", "canceled", "aborted"))
FINAL = frozenset(("succeeded", "failed", "canceled", "aborted"))

MAX_TEXT = 256

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


# Not frozen, which would take three times as long to make.
@dataclass(kw_only=True, slots=True)
class Prediction:
    """A prediction or training as one answer shows it. What that does not tell is None, and until the end all that
    follows `created_at`.

    Attributes:
        id, kind, status, model, version, deployment: as Replicate has them; `model` is `owner/name`.
        created_at, started_at, completed_at: seconds since the epoch.
        run_time: seconds that the model ran, as Replicate measures them (`metrics.predict_time`), else by its times.
        input_tokens, output_tokens: where the metrics count them.
        outputs: how many outputs it has, as long as they are not removed.
        input, output: the content, never printed.
    """

    id: str
    kind: Kind = "prediction"
    status: str
    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    created_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    run_time: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    outputs: int | None = None
    input: Any = field(default=None, repr=False)
    output: Any = field(default=None, repr=False)

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def queue_time(self) -> float | None:
        """Seconds until it was started."""
        return _between(self.created_at, self.started_at)

    @property
    def total_time(self) -> float | None:
        """Seconds from its creation to its end."""
        return _between(self.created_at, self.completed_at)


def read(body: bytes, kind: Kind = "prediction") -> Prediction | None:
    """The prediction or training in `body`; None if there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return of(content, kind) if isinstance(content, dict) else None


def of(content: Mapping[str, Any], kind: Kind = "prediction") -> Prediction | None:
    """The prediction or training that `content` is, parsed already; None if it is none."""
    id, status = content.get("id"), content.get("status")
    if not isinstance(id, str) or not _ID.fullmatch(id) or not isinstance(status, str) or status not in STATUSES:
        return None
    model, version, deployment = content.get("model"), content.get("version"), content.get("deployment")
    seen = Prediction(
        id=id,
        kind=kind,
        status=status,
        model=_text(model),
        version=_text(version),
        deployment=_text(deployment),
        created_at=_time(content.get("created_at")),
    )
    if seen.is_final:
        _end(seen, content)
    return seen


def _end(seen: Prediction, content: Mapping[str, Any]) -> None:
    """Fill in what only the end tells."""
    metrics = content.get("metrics")
    if not isinstance(metrics, dict):
        metrics = {}
    seen.started_at, seen.completed_at = _time(content.get("started_at")), _time(content.get("completed_at"))
    run_time, output = _seconds(metrics.get("predict_time")), content.get("output")
    seen.run_time = _between(seen.started_at, seen.completed_at) if run_time is None else run_time
    seen.input_tokens = _count(metrics.get("input_token_count"))
    seen.output_tokens = _count(metrics.get("output_token_count"))
    seen.outputs = None if output is None else len(output) if isinstance(output, list) else 1
    seen.input, seen.output = content.get("input"), output


def scrubbed(prediction: Prediction, scrub: Scrubber) -> Prediction:
    """`prediction`, whose names become labels and are kept, without what may be on no signal."""
    if scrub.is_clean((prediction.model or "", prediction.version or "", prediction.deployment or "")):
        return prediction
    model, version, deployment = (
        None if name is None else scrub(name) for name in (prediction.model, prediction.version, prediction.deployment)
    )
    return replace(prediction, model=model, version=version, deployment=deployment)


def _between(start: float | None, end: float | None) -> float | None:
    """Seconds, rounded to the microseconds that Replicate's times have."""
    return None if start is None or end is None else round(max(0.0, end - start), 6)


def _text(value: object) -> str | None:
    return value[:MAX_TEXT] if isinstance(value, str) and value else None


def _time(value: object) -> float | None:
    """RFC 3339, as Replicate writes it; without a zone it is UTC."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _count(value: object) -> int | None:
    # 64 bits are what OTLP has.
    return value if type(value) is int and 0 <= value < 2**63 else None
