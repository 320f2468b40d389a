from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.telemetry.prediction import FINAL, STATUSES, Prediction, of, read, scrubbed
from replicate_proxy_mw.telemetry.scrub import Scrubber
from replicate_proxy_mw.testing.predictions import Job

CREATED = 1_700_000_000.25


def _job(**more: Any) -> Job:
    defaults: dict[str, Any] = {
        "id": "gm3qorzdhgbfurvjtvhg6dckhu",
        "kind": "predictions",
        "model": "acme/hello",
        "version": "5c7d5dc6",
        "input": {"prompt": "one two three"},
        "created_at": CREATED,
        "queue_time": 2.0,
        "run_time": 3.5,
        "chunks": ("a", "b"),
        "streams": True,
    }
    return Job(**(defaults | more))


def _read(content: object, **more: Any) -> Prediction | None:
    return read(json.dumps(content).encode(), **more)


def _of(**more: Any) -> Prediction:
    found = of({"id": "p1", "status": "succeeded"} | more)
    assert found is not None
    return found


def test_one_that_succeeded() -> None:
    job = _job(deployment="acme/fast")
    found = _read(job.as_json(job.ended_at))
    assert found == Prediction(
        id="gm3qorzdhgbfurvjtvhg6dckhu",
        status="succeeded",
        model="acme/hello",
        version="5c7d5dc6",
        deployment="acme/fast",
        created_at=CREATED,
        started_at=CREATED + 2,
        completed_at=CREATED + 5.5,
        run_time=3.5,
        input_tokens=3,
        output_tokens=2,
        outputs=2,
        input={"prompt": "one two three"},
        output=["a", "b"],
    )
    assert found.is_final
    assert (found.queue_time, found.total_time) == (2.0, 5.5)


def test_one_that_has_just_been_created() -> None:
    found = _read(_job().as_json(CREATED))
    assert found is not None
    assert (found.status, found.is_final, found.created_at) == ("starting", False, CREATED)
    assert found.started_at is found.completed_at is found.run_time is found.output is found.outputs is None
    assert found.queue_time is found.total_time is None
    assert (found.input_tokens, found.deployment) == (None, None)


def test_one_that_is_under_way() -> None:
    found = _read(_job().as_json(CREATED + 3))
    assert found is not None
    assert (found.status, found.queue_time, found.total_time, found.run_time) == ("processing", None, None, None)


def test_one_that_was_canceled_before_it_was_started() -> None:
    found = _read(_job(canceled_at=CREATED + 1).as_json(CREATED + 9))
    assert found is not None
    assert (found.status, found.is_final, found.total_time) == ("canceled", True, 1.0)
    assert found.run_time is found.queue_time is None


def test_one_whose_output_is_removed() -> None:
    found = _read(_job().as_json(CREATED + 9999))
    assert found is not None
    assert (found.status, found.outputs, found.input) == ("succeeded", None, {})


def test_a_training() -> None:
    job = _job(kind="trainings", streams=False, chunks=({"weights": "w", "version": "acme/hello:1"},))
    found = _read(job.as_json(job.ended_at), kind="training")
    assert found is not None
    assert (found.kind, found.outputs) == ("training", 1)


@pytest.mark.parametrize(
    ("output", "outputs"), [(None, None), ([], 0), (["a"] * 4, 4), ("text", 1), ({"a": 1, "b": 2}, 1), (0, 1)]
)
def test_outputs_are_counted(output: object, outputs: int | None) -> None:
    assert _of(output=output).outputs == outputs


@pytest.mark.parametrize("status", sorted(STATUSES))
def test_a_status_is_final_or_not(status: str) -> None:
    assert _of(status=status).is_final == (status in FINAL)
    assert (status in FINAL) != (status in ("starting", "processing"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe\xfd",
        b"[" * 200_000,
        b'{"id":"p1"}',
        b'{"status":"succeeded"}',
        b'{"id":1,"status":"succeeded"}',
        b'{"id":"p1","status":"unknown"}',
        b'{"id":"p1","status":["succeeded"]}',
        b'{"id":"","status":"succeeded"}',
        b'{"id":"a/b","status":"succeeded"}',
        b'{"id":"p1\\n","status":"succeeded"}',
        b'{"id":"' + b"a" * 65 + b'","status":"succeeded"}',
    ],
    ids=range(15),
)
def test_what_is_none(body: bytes) -> None:
    assert read(body) is None


@pytest.mark.parametrize("value", [None, 1, "", [], {}, True])
def test_a_text_of_another_type_is_not_believed(value: object) -> None:
    found = _of(model=value, version=value, deployment=value)
    assert found.model is found.version is found.deployment is None


def test_a_long_text_is_cut() -> None:
    assert _of(version="v" * 300).version == "v" * 256


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2023-11-14T22:13:20.250000Z", CREATED),
        ("2023-11-14T22:13:20.25Z", CREATED),
        ("2023-11-14T22:13:20.250000123Z", CREATED),
        ("2023-11-14T22:13:20.250000", CREATED),
        ("2023-11-15T00:13:20.25+02:00", CREATED),
        ("2023-11-14T22:13:20Z", CREATED - 0.25),
        ("1969-12-31T23:59:59Z", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("yesterday", None),
        ("", None),
        (1_700_000_000, None),
        (None, None),
    ],
)
def test_times(written: object, seconds: float | None) -> None:
    assert _of(created_at=written).created_at == seconds


@pytest.mark.parametrize("value", [None, "1", True, -1, float("nan"), float("inf"), 10**400, [1]])
def test_a_run_time_that_is_none_is_taken_from_the_times(value: object) -> None:
    found = _of(
        metrics={"predict_time": value}, started_at="2023-11-14T22:13:20Z", completed_at="2023-11-14T22:13:21.5Z"
    )
    assert found.run_time == 1.5
    assert _of(metrics={"predict_time": value}).run_time is None


def test_the_measured_run_time_goes_before_the_times() -> None:
    times = {"started_at": "2023-11-14T22:13:20Z", "completed_at": "2023-11-14T22:13:21.5Z"}
    assert _of(metrics={"predict_time": 1}, **times).run_time == 1.0
    assert _of(metrics={"predict_time": 0}, **times).run_time == 0.0


def test_clocks_that_disagree_give_no_negative_times() -> None:
    found = _of(
        created_at="2023-11-14T22:13:21Z", started_at="2023-11-14T22:13:20Z", completed_at="2023-11-14T22:13:19Z"
    )
    assert (found.queue_time, found.run_time, found.total_time) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("value", "count"), [(0, 0), (7, 7), (2**63, None), (-1, None), (True, None), (7.0, None)])
def test_only_whole_numbers_are_counts(value: object, count: int | None) -> None:
    found = _of(metrics={"input_token_count": value, "output_token_count": value})
    assert found.input_tokens == found.output_tokens == count


@pytest.mark.parametrize("metrics", [None, [], "text", 5])
def test_metrics_that_are_no_object(metrics: object) -> None:
    assert _of(metrics=metrics).run_time is None


def test_the_content_is_not_printed() -> None:
    assert "hunter2" not in repr(_of(input={"a": "hunter2"}, output="hunter2"))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
FIELDS = ("model", "version", "deployment", "created_at", "started_at", "completed_at", "metrics", "output")


@settings(deadline=None)
@given(st.fixed_dictionaries({name: ANY for name in FIELDS}))
def test_no_content_is_too_strange(content: dict[str, Any]) -> None:
    found = _of(**content)
    for seconds in (found.queue_time, found.run_time, found.total_time):
        assert seconds is None or seconds >= 0


def test_its_names_are_told_without_secrets() -> None:
    scrub = Scrubber(["canary-0123456789"])
    named = Prediction(id="canary-0123456789", status="starting", model="acme/canary-0123456789", version="v1")
    shown = scrubbed(named, scrub)
    # The id is what the store knows it by.
    assert (shown.id, shown.model, shown.version, shown.deployment) == (named.id, "acme/REDACTED", "v1", None)
    clean = Prediction(id="p1", status="starting", model="acme/hello", deployment="acme/d")
    assert scrubbed(clean, scrub) is clean
