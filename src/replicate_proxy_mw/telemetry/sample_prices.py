"""Prices of Replicate's hardware to begin with: dated, and to be checked before they are trusted."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .prices import Rates

SAMPLE_PRICES_DATE = "2026-11-21"
"""When the page was looked at."""

SAMPLE_PRICES: Mapping[str, Rates] = MappingProxyType(
    {
        "cpu": Rates(per_second=0.000100),
        "gpu-t4": Rates(per_second=0.000225),
        "gpu-a40-small": Rates(per_second=0.000575),
        "gpu-a40-large": Rates(per_second=0.000725),
        "gpu-a40-large-2x": Rates(per_second=0.001450),
        "gpu-a40-large-4x": Rates(per_second=0.002900),
        "gpu-a40-large-8x": Rates(per_second=0.005800),
        "gpu-l40s": Rates(per_second=0.000975),
        "gpu-2x-l40s": Rates(per_second=0.001950),
        "gpu-4x-l40s": Rates(per_second=0.003900),
        "gpu-8x-l40s": Rates(per_second=0.007800),
        "gpu-a100-large": Rates(per_second=0.001400),
        "gpu-a100-large-2x": Rates(per_second=0.002800),
        "gpu-a100-large-4x": Rates(per_second=0.005600),
        "gpu-a100-large-8x": Rates(per_second=0.011200),
        "gpu-h100": Rates(per_second=0.001525),
        "gpu-h100-2x": Rates(per_second=0.003050),
        "gpu-h100-4x": Rates(per_second=0.006100),
        "gpu-h100-8x": Rates(per_second=0.012200),
    }
)
"""US dollars per second of run time, by hardware: `prices={**SAMPLE_PRICES, "acme/mine": "gpu-l40s"}`.

Copied from Replicate's pricing page (https://replicate.com/pricing), an undated page of the time of the H100, looked at
on 2026-11-21; T4, L40S, A100 and H100 agree with a list of 2026-05-04. Check before trusting. Models that are billed
per token or per image are not in it, and neither is what an idle deployment costs.
"""
