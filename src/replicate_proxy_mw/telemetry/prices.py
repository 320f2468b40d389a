"""What a prediction has cost: an estimate, by the host's own prices and by what its payload tells."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ..errors import ProxyError
from ..host_calls import HostFailed, ask
from .prediction import Kind, Prediction

logger = logging.getLogger("replicate_proxy_mw")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_NAME}|{_NAME}/{_NAME}(?::{_NAME})?|deployments/{_NAME}/{_NAME}")
_CURRENCY = re.compile(r"[A-Z]{3}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What something costs; all that are given add up.

    Args:
        per_second: for each second that the model runs, failed and cancelled runs too.
        per_input_token: for each token of the input that the metrics count.
        per_output_token: for each of the output, likewise.
        per_output: for each output of a prediction that succeeded.
        per_run: for a prediction that succeeded.
        currency: ISO 4217.

    Raises:
        ValueError: names the rate and what is wrong with it.
    """

    per_second: float | None = None
    per_input_token: float | None = None
    per_output_token: float | None = None
    per_output: float | None = None
    per_run: float | None = None
    currency: str = "USD"

    def __post_init__(self) -> None:
        for name in _RATES:
            rate = getattr(self, name)
            if rate is not None and not _is_amount(rate):
                raise ValueError(f"{name}: must be a number, at least 0 and finite")
        if all(getattr(self, name) is None for name in _RATES):
            raise ValueError(f"one rate at least: {', '.join(_RATES)}")
        if not isinstance(self.currency, str) or not _CURRENCY.fullmatch(self.currency):
            raise ValueError("currency: must be three capitals (ISO 4217)")


_RATES = ("per_second", "per_input_token", "per_output_token", "per_output", "per_run")


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceRequest:
    """What a callable may look at to find the rates of a prediction or training that has ended.

    Attributes:
        model: `owner/name`, None where Replicate did not say.
        version: the id of the version that ran.
        deployment: `owner/name` of the deployment that it ran on, None where it was none.
        tenant: whose it is, by the resolved key.
        kind: `prediction` or `training`.
        status: `succeeded`, `failed`, `canceled` or `aborted`.
    """

    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    tenant: str | None = None
    kind: Kind = "prediction"
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """An estimate. `basis` names the rates that it is made of, such as `per_input_token,per_output_token`."""

    amount: float
    currency: str
    basis: str


Prices = Mapping[str, Rates | str] | Callable[[PriceRequest], Awaitable[Rates | None]]
"""Rates, or the name of another entry, by model, deployment or hardware; or an async callable that finds them."""


def cost(prediction: Prediction, rates: Rates) -> Cost | None:
    """What `prediction` has cost; None before its end, and where anything that a rate needs is not known."""
    if not prediction.is_final:
        return None
    succeeded = prediction.status == "succeeded"
    quantities = (
        prediction.run_time,
        prediction.input_tokens,
        prediction.output_tokens,
        prediction.outputs if succeeded else None,
        1 if succeeded else None,
    )
    amount = 0.0
    basis: list[str] = []
    for name, quantity in zip(_RATES, quantities, strict=True):
        rate: float | None = getattr(rates, name)
        if rate is None:
            continue
        if quantity is None:
            return None
        amount += float(rate) * quantity
        basis.append(name)
    if not math.isfinite(amount):
        return None
    # Sums of floats end in dust, and no price has so many digits.
    return Cost(amount=float(f"{amount:.12g}"), currency=rates.currency, basis=",".join(basis))


class PriceList:
    """The host's prices: a table, or an async callable from `PriceRequest` to `Rates`, or None where it knows none.

    Args:
        prices: the keys of a table are `owner/name:version`, `owner/name`, `deployments/owner/name` and names of
            hardware such as `gpu-l40s`. A value that is a string is another key of the table: a prediction does not
            name its hardware, so the table says which model runs on which. A prediction is looked up by its deployment,
            then by model and version, then by model; by nothing else.
        timeout: seconds that a callable has.

    Raises:
        ValueError: names the key of the table that is none, or that leads nowhere.
    """

    def __init__(self, prices: Prices, *, timeout: float) -> None:
        self._timeout = timeout
        self._ask: Callable[[PriceRequest], Awaitable[Rates | None]] | None = None
        self._table: dict[str, Rates] = {}
        if isinstance(prices, Mapping):
            self._table = _resolved(prices)
        elif callable(prices):
            self._ask = prices
        else:
            raise ValueError("prices: must be a table or an async callable")

    async def estimate(self, prediction: Prediction, *, tenant: str | None) -> Cost | None:
        """What `prediction` has cost; None where that is not known. A callable that fails is logged."""
        rates = self._found(prediction) if self._ask is None else await self._asked(self._ask, prediction, tenant)
        return None if rates is None else cost(prediction, rates)

    def _found(self, prediction: Prediction) -> Rates | None:
        model, version = prediction.model, prediction.version
        for key in (f"deployments/{prediction.deployment}", f"{model}:{version}", model):
            if key in self._table:
                return self._table[key]
        return None

    async def _asked(
        self, call: Callable[[PriceRequest], Awaitable[Rates | None]], prediction: Prediction, tenant: str | None
    ) -> Rates | None:
        request = PriceRequest(
            model=prediction.model,
            version=prediction.version,
            deployment=prediction.deployment,
            tenant=tenant,
            kind=prediction.kind,
            status=prediction.status,
        )
        try:
            rates: object = await ask(lambda: call(request), seconds=self._timeout)
            if rates is None or isinstance(rates, Rates):
                return rates
            failure = type(rates).__name__
        except HostFailed as error:
            failure = error.name
        except ProxyError as error:
            failure = type(error).__name__
        logger.warning("prices failed: %s", failure)
        return None


def _resolved(prices: Mapping[str, Rates | str]) -> dict[str, Rates]:
    """The rows that a prediction can be found by, hardware not among them."""
    for key, row in prices.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"prices: {key!r} is no model, deployment or hardware")
        if not isinstance(row, (Rates, str)):
            raise ValueError(f"prices: {key!r} has neither rates nor another key")
    table: dict[str, Rates] = {}
    for key in prices:
        row, passed = prices[key], {key}
        while isinstance(row, str):
            if row not in prices:
                raise ValueError(f"prices: {key!r} leads to {row!r}, which is not there")
            if row in passed:
                raise ValueError(f"prices: {key!r} leads in a circle")
            passed.add(row)
            row = prices[row]
        if "/" in key:
            table[key] = row
    return table
