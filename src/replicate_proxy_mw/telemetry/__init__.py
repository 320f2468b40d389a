"""What happened, as OpenTelemetry spans. It observes from outside: nothing waits for it, nothing breaks without it."""

from .spans import RequestSpan, Telemetry

__all__ = ["RequestSpan", "Telemetry"]
