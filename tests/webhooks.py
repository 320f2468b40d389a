"""The host's end of Replicate's webhooks."""

from __future__ import annotations

from replicate_proxy_mw import WebhookEvent


class Host:
    """The host's callback: what it got. It raises each of `failures` first."""

    def __init__(self, *failures: Exception) -> None:
        self.events: list[WebhookEvent] = []
        self.failures = list(failures)

    async def __call__(self, event: WebhookEvent) -> None:
        self.events.append(event)
        if self.failures:
            raise self.failures.pop(0)
