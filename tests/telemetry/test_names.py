from __future__ import annotations

import re

from opentelemetry.sdk.metrics import MeterProvider

from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.telemetry.names import ATTRIBUTES, METRICS, Attribute, Metric

OWN = ("replicate.", "replicate_proxy.", "portkey.")


def test_every_name_has_its_mark_and_its_meaning() -> None:
    entries: list[Attribute | Metric] = [*ATTRIBUTES.values(), *METRICS.values()]
    for entry in entries:
        assert (entry.mark == "C") is entry.name.startswith(OWN)
        assert entry.mark in ("S", "D", "C")
        assert entry.meaning
    assert all(name.startswith(OWN) and meaning for name, meaning in names.EVENTS.items())


def test_what_a_span_may_carry_stands_on_a_span_and_all_else_is_a_label() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert labels <= set(ATTRIBUTES)
    for attribute in ATTRIBUTES.values():
        assert set(attribute.on) <= {"request", "attempt", "run"}
        assert attribute.on or attribute.name in labels


def test_what_is_known() -> None:
    assert names.known("http.route")
    assert names.known("portkey.metadata._user")
    assert not names.known("http.url")
    assert not names.known("gen_ai.token.type")


def test_only_histograms_have_buckets_and_they_rise() -> None:
    for metric in METRICS.values():
        assert bool(metric.buckets) is (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_names_and_units_are_such_that_the_sdk_takes_them() -> None:
    meter = MeterProvider(shutdown_on_exit=False).get_meter("test")
    for metric in METRICS.values():
        meter.create_counter(metric.name, metric.unit)
    for name in ATTRIBUTES:
        assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*\.?", name)


def test_nothing_that_a_caller_sends_is_a_label() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert not [label for label in labels if label.startswith(("portkey.", "url.full", "url.path", "client.", "user_"))]
    assert labels.isdisjoint({names.PREDICTION_ID, names.TRAINING_ID, names.GEN_AI_RESPONSE_ID})


def test_what_is_never_scrubbed_is_on_the_list() -> None:
    assert set(ATTRIBUTES) >= names.FIXED
    assert not [name for name in names.FIXED if name.startswith(("portkey.", "url.full", "url.path"))]
