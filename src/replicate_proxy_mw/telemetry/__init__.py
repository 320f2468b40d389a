"""What happened, as OpenTelemetry spans and metrics. It observes from outside: nothing waits for it, nothing breaks
without it."""

from .content import Redact
from .prices import PriceRequest, Prices, Rates
from .request import RequestSpan
from .sample_prices import SAMPLE_PRICES, SAMPLE_PRICES_DATE
from .setup import configure_telemetry
from .spans import Telemetry

__all__ = [
    "SAMPLE_PRICES",
    "SAMPLE_PRICES_DATE",
    "PriceRequest",
    "Prices",
    "Rates",
    "Redact",
    "RequestSpan",
    "Telemetry",
    "configure_telemetry",
]
