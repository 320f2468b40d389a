from __future__ import annotations

from typing import Any

import pytest

from replicate_proxy_mw.testing import FakeFile
from replicate_proxy_mw.testing.predictions import Job, duration, outcome, prefer_wait, timestamp


def job(**changes: Any) -> Job:
    given: dict[str, Any] = {
        "id": "p",
        "kind": "predictions",
        "model": "acme/toy",
        "version": "hidden",
        "input": {"prompt": "one two"},
        "created_at": 100.0,
        "queue_time": 2.0,
        "run_time": 10.0,
        "chunks": ("done",),
        "files_url": "https://files.example",
    }
    return Job(**given | changes)


@pytest.mark.parametrize(
    ("now", "status"), [(100, "starting"), (101.9, "starting"), (102, "processing"), (112, "succeeded")]
)
def test_status_follows_from_the_time(now: float, status: str) -> None:
    assert job().status(now) == status


def test_an_error_fails_at_the_end() -> None:
    failing = job(error="out of memory", chunks=())
    assert failing.status(111) == "processing"
    assert failing.as_json(111)["error"] is None
    assert (failing.status(112), failing.as_json(112)["error"]) == ("failed", "out of memory")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"canceled_at": 101.0}, "canceled"),
        ({"canceled_at": 102.0}, "canceled"),
        ({"deadline": 101.5}, "aborted"),
        ({"deadline": 105.0}, "canceled"),
        ({"deadline": 105.0, "canceled_at": 101.0}, "canceled"),
        ({"deadline": 101.5, "canceled_at": 105.0}, "aborted"),
        ({"deadline": 112.0}, "succeeded"),
    ],
)
def test_a_deadline_before_the_start_aborts_all_else_cancels(changes: dict[str, float], status: str) -> None:
    assert job(**changes).status(200) == status


def test_what_is_shown_grows() -> None:
    streaming = job(chunks=("a", "b", "c"), streams=True, logs=("one", "two"))
    starting, processing, ended = (streaming.as_json(now) for now in (101, 108, 112))
    assert (starting["output"], starting["logs"]) == (None, "")
    assert "started_at" not in starting
    assert (processing["output"], processing["logs"]) == (["a", "b"], "one\ntwo\n")
    assert processing["started_at"] == "1970-01-01T00:01:42.000000Z"
    assert "metrics" not in processing
    assert "completed_at" not in processing
    assert (ended["output"], ended["completed_at"]) == (["a", "b", "c"], "1970-01-01T00:01:52.000000Z")
    assert ended["metrics"] == {
        "total_time": 12.0,
        "predict_time": 10.0,
        "input_token_count": 2,
        "output_token_count": 3,
        "tokens_per_second": 0.3,
        "time_to_first_token": 3.0,
    }


def test_metrics_of_short_lives() -> None:
    assert job(canceled_at=101.0).metrics() == {"total_time": 1.0}
    silent = job(streams=True, chunks=(), run_time=0.0).metrics()
    assert (silent["tokens_per_second"], silent["output_token_count"]) == (0.0, 0)
    assert "time_to_first_token" not in silent


def test_data_is_removed_after_an_hour() -> None:
    kept, removed = (job(logs=("line",)).as_json(112 + 3600 + later) for later in (-1, 0))
    assert (kept["data_removed"], kept["input"], kept["output"], kept["logs"]) == (
        False,
        {"prompt": "one two"},
        "done",
        "line\n",
    )
    assert (removed["data_removed"], removed["input"], removed["output"], removed["logs"]) == (True, {}, None, "")


def test_files_are_links_or_inside() -> None:
    files = [FakeFile(b"one", "image/png"), FakeFile(b"two")]
    drawing = job(chunks=(files,))
    assert drawing.as_json(112)["output"] == ["https://files.example/p/0", "https://files.example/p/1"]
    early = drawing.as_json(111.5, sync=True)
    assert early["output"] == ["data:image/png;base64,b25l", "data:application/octet-stream;base64,dHdv"]
    assert early["status"] == "processing"
    assert "metrics" not in early
    assert drawing.as_json(112, sync=True)["status"] == "processing"


def test_a_wait_that_ran_out_shows_starting() -> None:
    shown = job(logs=("line",)).as_json(105, sync=True)
    assert (shown["status"], shown["output"], shown["logs"]) == ("starting", None, "")
    assert "started_at" not in shown


def test_a_sync_answer_at_the_end_is_like_any_other() -> None:
    assert job().as_json(112, sync=True) == job().as_json(112)


def test_a_training_has_no_output_before_its_end() -> None:
    training = job(kind="trainings", chunks=({"version": "acme/toy:1"},), deployment=None)
    assert "output" not in training.as_json(105)
    assert training.as_json(112)["output"] == {"version": "acme/toy:1"}
    assert "data_removed" not in training.as_json(112)


def test_what_was_asked_for_comes_back() -> None:
    shown = job(webhook="https://x.example", webhook_events_filter=["start"], deployment="acme/hello", deadline=130.0)
    body = shown.as_json(101)
    assert (body["webhook"], body["webhook_events_filter"]) == ("https://x.example", ["start"])
    assert (body["deployment"], body["deadline"]) == ("acme/hello", "1970-01-01T00:02:10.000000Z")


def test_events_stop_with_the_job() -> None:
    stopped = job(chunks=("a", "b", "c"), streams=True, canceled_at=106.0)
    assert [event.name for event in stopped.events(200)] == ["start", "output", "completed"]
    assert [event.name for event in job(canceled_at=101.0).events(200)] == ["completed"]


def test_webhooks_are_those_asked_for() -> None:
    assert [event.name for event in job(logs=("line",)).webhooks(200)] == ["output", "completed"]
    every = job(logs=("line",), webhook_events_filter=["start", "output", "logs", "completed"])
    assert [event.name for event in every.webhooks(200)] == ["start", "logs", "output", "completed"]
    assert [event.name for event in every.webhooks(103)] == ["start", "logs"]


def test_webhooks_for_output_come_at_most_twice_a_second() -> None:
    chunks = tuple(str(number) for number in range(9))
    fast = job(chunks=chunks, streams=True, run_time=1.0)
    assert [event.data for event in fast.webhooks(200)] == ["0", "5", None]


def test_outcome_of_every_kind_of_model() -> None:
    def failing(given: Any) -> Any:
        yield "first"
        raise ValueError("no more")

    def broken(given: Any) -> Any:
        raise ValueError

    assert outcome(lambda given: given["x"], {"x": 1}) == ((1,), None)
    assert outcome(lambda given: ["a", "b"], {}) == ((["a", "b"],), None)
    assert outcome(lambda given: iter("ab"), {}) == (("a", "b"), None)
    assert outcome(failing, {}) == (("first",), "no more")
    assert outcome(broken, {}) == ((), "ValueError")


def test_timestamps() -> None:
    assert timestamp(1_700_000_000.25) == "2023-11-14T22:13:20.250000Z"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("wait", 60), ("wait=1", 1), ("wait=60", 60), ("wait=99", 60), ("wait=0", None), ("wait=100", None), ("", None)],
)
def test_prefer(header: str, seconds: float | None) -> None:
    assert prefer_wait(header) == seconds


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("5", 5),
        ("30s", 30),
        ("5m", 300),
        ("1h30m45s", 5445),
        ("2h30", 7230),
        ("4", None),
        ("", None),
        ("h", None),
        ("5x", None),
        ("-5", None),
    ],
)
def test_cancel_after(header: str, seconds: float | None) -> None:
    assert duration(header) == seconds
