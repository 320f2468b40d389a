from __future__ import annotations

import logging
import math
from datetime import date
from typing import Any

import anyio
import pytest

from replicate_proxy_mw import PermissionDenied
from replicate_proxy_mw.telemetry.prediction import Prediction
from replicate_proxy_mw.telemetry.prices import Cost, PriceList, PriceRequest, Prices, Rates, cost
from replicate_proxy_mw.telemetry.sample_prices import SAMPLE_PRICES, SAMPLE_PRICES_DATE

pytestmark = pytest.mark.anyio

SECOND = Rates(per_second=0.5)


def _prediction(status: str = "succeeded", **more: Any) -> Prediction:
    return Prediction(id="p1", status=status, **more)


async def _estimate(prices: Prices, prediction: Prediction, tenant: str | None = None) -> Cost | None:
    return await PriceList(prices, timeout=0.05).estimate(prediction, tenant=tenant)


@pytest.mark.parametrize(
    ("rates", "amount", "basis"),
    [
        ({"per_second": 0.000975}, 0.00195, "per_second"),
        ({"per_input_token": 1e-6, "per_output_token": 3e-6}, 0.0013, "per_input_token,per_output_token"),
        ({"per_output": 0.04}, 0.16, "per_output"),
        ({"per_run": 0.1}, 0.1, "per_run"),
        ({"per_run": 0.1, "per_second": 0.1}, 0.3, "per_second,per_run"),
        ({"per_run": 0}, 0.0, "per_run"),
    ],
)
async def test_a_cost_is_the_sum_of_all_rates(rates: dict[str, float], amount: float, basis: str) -> None:
    prediction = _prediction(run_time=2.0, input_tokens=1000, output_tokens=100, outputs=4)
    assert cost(prediction, Rates(**rates)) == Cost(amount=amount, currency="USD", basis=basis)  # type: ignore[arg-type]


async def test_a_cost_has_the_currency_of_its_rates() -> None:
    assert cost(_prediction(), Rates(per_run=1, currency="EUR")) == Cost(amount=1.0, currency="EUR", basis="per_run")


@pytest.mark.parametrize("name", ["per_second", "per_input_token", "per_output_token", "per_output"])
async def test_no_cost_where_a_quantity_is_not_known(name: str) -> None:
    rates: Any = {name: 0.1}
    assert cost(_prediction(), Rates(**rates)) is None
    assert cost(_prediction(), Rates(per_run=1.0, **rates)) is None


@pytest.mark.parametrize("status", ["failed", "canceled", "aborted"])
async def test_only_time_is_paid_where_nothing_came_of_it(status: str) -> None:
    ended = _prediction(status, run_time=2.0, outputs=1)
    found = cost(ended, SECOND)
    assert found is not None
    assert found.amount == 1.0
    assert cost(ended, Rates(per_output=1.0)) is None
    assert cost(ended, Rates(per_run=1.0)) is None


async def test_no_cost_before_the_end() -> None:
    assert cost(_prediction("processing", run_time=2.0), SECOND) is None


async def test_no_cost_beyond_all_numbers() -> None:
    assert cost(_prediction(run_time=1e308), Rates(per_second=1e308)) is None


@pytest.mark.parametrize("name", ["per_second", "per_input_token", "per_output_token", "per_output", "per_run"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400, True, "0.1"])
async def test_a_rate_that_is_no_amount(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Rates(**{name: value})


@pytest.mark.parametrize("currency", ["usd", "US", "EURO", "", None])
async def test_a_currency_that_is_none(currency: Any) -> None:
    with pytest.raises(ValueError, match=r"^currency: "):
        Rates(per_run=1, currency=currency)


async def test_one_rate_at_least() -> None:
    with pytest.raises(ValueError, match="per_second, per_input_token"):
        Rates()


TABLE: dict[str, Rates | str] = {
    **SAMPLE_PRICES,
    "acme/mine": "gpu-t4",
    "acme/mine:v2": Rates(per_second=2),
    "deployments/acme/fast": "here",
    "here": "gpu-h100",
    "acme/open": Rates(per_run=3),
}


@pytest.mark.parametrize(
    ("subject", "amount"),
    [
        ({"model": "acme/mine"}, 0.00225),
        ({"model": "acme/mine", "version": "v1"}, 0.00225),
        ({"model": "acme/mine", "version": "v2"}, 20.0),
        ({"model": "acme/mine", "version": "v2", "deployment": "acme/fast"}, 0.01525),
        ({"model": "acme/mine", "version": "v2", "deployment": "acme/other"}, 20.0),
        ({"deployment": "acme/fast"}, 0.01525),
        ({"model": "acme/open", "version": "hidden"}, 3.0),
    ],
)
async def test_a_prediction_is_found_by_deployment_then_version_then_model(
    subject: dict[str, str], amount: float
) -> None:
    found = await _estimate(TABLE, _prediction(run_time=10.0, **subject))
    assert found is not None
    assert found.amount == amount


@pytest.mark.parametrize(
    "subject", [{}, {"model": "gpu-t4"}, {"model": "here"}, {"model": "acme/other"}, {"version": "v2"}]
)
async def test_a_prediction_is_found_by_nothing_else(subject: dict[str, str]) -> None:
    assert await _estimate(TABLE, _prediction(run_time=10.0, **subject)) is None


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"acme/mine": "gpu-t5"}, "'acme/mine' leads to 'gpu-t5'"),
        ({"acme/a": "acme/b", "acme/b": "acme/a"}, "'acme/a' leads in a circle"),
        ({"acme/a": "acme/a"}, "'acme/a' leads in a circle"),
        ({"acme/a": 0.1}, "'acme/a' has neither"),
        ({1: SECOND}, "1 is no model"),
        ({"a/b/c": SECOND}, "'a/b/c' is no model"),
        ({"": SECOND}, "'' is no model"),
    ],
)
async def test_a_table_that_is_wrong(table: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^prices: {named}"):
        PriceList(table, timeout=1)


async def test_a_table_is_read_once() -> None:
    table = dict(TABLE)
    prices = PriceList(table, timeout=1)
    table.clear()
    assert await prices.estimate(_prediction(model="acme/open"), tenant=None) is not None


async def test_prices_that_are_neither_a_table_nor_a_callable() -> None:
    with pytest.raises(ValueError, match=r"^prices: must be"):
        PriceList(0.1, timeout=1)  # type: ignore[arg-type]


async def test_a_callable_is_asked() -> None:
    asked: list[PriceRequest] = []

    async def prices(request: PriceRequest) -> Rates | None:
        asked.append(request)
        return SECOND if request.tenant == "team-a" else None

    prediction = _prediction("failed", kind="training", model="a/b", version="v", deployment="a/d", run_time=2.0)
    assert await _estimate(prices, prediction, "team-a") == Cost(amount=1.0, currency="USD", basis="per_second")
    assert await _estimate(prices, prediction) is None
    assert asked[0] == PriceRequest(
        model="a/b", version="v", deployment="a/d", tenant="team-a", kind="training", status="failed"
    )


async def _raises(request: PriceRequest) -> Any:
    raise KeyError("hunter2")


async def _denies(request: PriceRequest) -> Any:
    raise PermissionDenied("hunter2")


async def _hangs(request: PriceRequest) -> Any:
    await anyio.sleep_forever()


async def _guesses(request: PriceRequest) -> Any:
    return "hunter2"


def _is_not_async(request: PriceRequest) -> Any:
    return SECOND


@pytest.mark.parametrize(
    ("prices", "name"),
    [
        (_raises, "KeyError"),
        (_denies, "PermissionDenied"),
        (_hangs, "TimeoutError"),
        (_guesses, "str"),
        (_is_not_async, "TypeError"),
    ],
)
async def test_a_callable_that_fails_is_logged_by_class_name(
    prices: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert await _estimate(prices, _prediction(run_time=1.0)) is None
    assert caplog.record_tuples == [("replicate_proxy_mw", logging.WARNING, f"prices failed: {name}")]


async def test_the_sample_prices_are_those_of_hardware() -> None:
    assert date.fromisoformat(SAMPLE_PRICES_DATE)
    assert not any("/" in name for name in SAMPLE_PRICES)
    assert all(rates == Rates(per_second=rates.per_second) for rates in SAMPLE_PRICES.values())


@pytest.mark.parametrize(
    ("times", "name"),
    [
        (n, name)
        for one in ("gpu-a40-large{}", "gpu-a100-large{}", "gpu-h100{}")
        for n, name in ((n, one.format(f"-{n}x")) for n in (2, 4, 8))
    ]
    + [(n, f"gpu-{n}x-l40s") for n in (2, 4, 8)],
)
async def test_several_devices_cost_as_many_times_as_one(times: int, name: str) -> None:
    one = SAMPLE_PRICES[name.replace(f"-{times}x", "")].per_second
    assert one is not None
    assert SAMPLE_PRICES[name].per_second == pytest.approx(times * one)
