"""What happened, as OpenTelemetry spans and metrics. It observes from outside: nothing waits for it, nothing breaks
without it."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand
from .content import Redact
from .request import RequestSpan
from .spans import Telemetry

if TYPE_CHECKING:
    from .prices import PriceRequest, Prices, Rates
    from .sample_prices import SAMPLE_PRICES, SAMPLE_PRICES_DATE
    from .setup import configure_telemetry
else:
    # For hosts with prices, or without OpenTelemetry of their own.
    __getattr__, __dir__ = on_demand(
        __name__,
        {
            "prices": ["PriceRequest", "Prices", "Rates"],
            "sample_prices": ["SAMPLE_PRICES", "SAMPLE_PRICES_DATE"],
            "setup": ["configure_telemetry"],
        },
    )

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
