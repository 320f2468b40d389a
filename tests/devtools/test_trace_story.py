from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer

from replicate_proxy_mw.devtools import TraceBuffer
from replicate_proxy_mw.devtools.trace_story import (
    MAX_LINES,
    MAX_QUERY,
    MAX_ROWS,
    MAX_TEXT,
    Row,
    Story,
    Summary,
    Trace,
    listing,
    seen,
    shown,
    story,
    visible,
)
from replicate_proxy_mw.operations import OPERATIONS
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.telemetry import story as runs
from tests.raw_asgi import KEY, Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry import scenarios
from tests.telemetry.scenarios import CALLER, LLAMA, PRICES, QUEUE, RUN, Stage, stage

MILLISECOND, SECOND = 1_000_000, 1_000_000_000


class Shown:
    """What is shown of a stage's spans."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        self.stage, self.buffer = stage, TraceBuffer(**options)
        stage.tracer_provider.add_span_processor(self.buffer)

    @property
    def traces(self) -> tuple[Trace, ...]:
        return self.buffer.snapshot().traces

    def list(self, query: str = "") -> tuple[Summary, ...]:
        """Of polls that came to the same, the first."""
        found = listing(self.traces, query)
        assert found.total == sum(summary.count for summary in found.requests)
        return found.requests

    def one(self, operation: str) -> Summary:
        [summary] = [summary for summary in self.list() if summary.operation == operation]
        return summary

    def story(self, summary: Summary) -> Story:
        told = story(self.traces, summary.trace_id, summary.span_id)
        assert told is not None
        assert (told.trace_id, told.span_id) == (summary.trace_id, summary.span_id)
        assert len({row.id for row in told.rows}) == len(told.rows)
        return told


@pytest.fixture
def shown_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    monkeypatch.setattr(runs, "GRACE", 0.0)
    with stage() as played:
        yield Shown(played)


def lines(told: Story) -> list[str]:
    """Each row as its kind, further in for each level; with a mark where it belongs to what was asked for."""
    return [f"{'  ' * row.depth}{row.kind}{' *' if row.current else ''}" for row in told.rows]


def seconds(row: Row) -> float | None:
    return None if row.end is None else round((row.end - row.start) / 1000, 1)


async def until(true: Callable[[], object], *, meanwhile: Callable[[], object] = lambda: None) -> None:
    with anyio.fail_after(10):
        while not true():
            meanwhile()
            await anyio.sleep(0.01)


class Recorder:
    """Makes spans of the proxy's and of a host's, with times of its own."""

    def __init__(self) -> None:
        self.buffer = TraceBuffer(max_traces=10_000)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(self.buffer)
        self.proxy: Tracer = provider.get_tracer("replicate_proxy_mw")
        self.host: Tracer = provider.get_tracer("host")

    @property
    def traces(self) -> tuple[Trace, ...]:
        return self.buffer.snapshot().traces

    def request(self, start: int = 0, *, above: Any = None, links: tuple[Link, ...] = (), **told: Any) -> Any:
        attributes = {name if "." in name else name.replace("_", "."): value for name, value in told.items()}
        attributes[names.HTTP_REQUEST_METHOD], attributes[names.HTTP_ROUTE] = "GET", "/v1/predictions/{prediction_id}"
        context = None if above is None else trace.set_span_in_context(above)
        span = self.proxy.start_span(
            "GET", context, SpanKind.SERVER, attributes=attributes, links=links, start_time=start * MILLISECOND
        )
        span.end((start + 1) * MILLISECOND)
        return span

    def story(self, span: Any) -> Story | None:
        return story(self.traces, f"{span.get_span_context().trace_id:032x}")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


pytestmark = pytest.mark.anyio


async def test_the_list_has_the_newest_first_and_the_run_beside_its_create(shown_stage: Shown) -> None:
    await scenarios.official(shown_stage.stage)
    await shown_stage.stage.ask(shown_stage.stage.proxy(), "GET", "/v1/account", None, *CALLER)
    account, poll, create = shown_stage.list()
    assert [summary.operation for summary in (account, poll, create)] == [
        "account.get",
        "predictions.get",
        "models.predictions.create",
    ]
    assert account.start > poll.start > create.start
    assert (create.method, create.route) == ("POST", "/v1/models/{model_owner}/{model_name}/predictions")
    assert (create.status, create.outcome, create.error, create.tenant) == (201, "forwarded", None, "team-a")
    assert (create.model, create.prediction_status) == (LLAMA, "succeeded")
    assert (create.queue_time, create.run_time, create.currency) == (QUEUE, RUN, "USD")
    assert create.cost is not None
    assert create.cost > 0.5 * RUN
    assert create.portkey_trace_id == "order-42"
    assert create.metadata == {"_user": "u1", "team_space": "t"}
    assert create.duration is not None
    assert 0 < create.duration < 60
    assert (poll.prediction_id, poll.prediction_status) == (create.prediction_id, "succeeded")
    assert (poll.cost, poll.currency, poll.queue_time, poll.run_time, poll.metadata) == (None, None, None, None, {})
    assert (account.model, account.prediction_id, account.prediction_status) == (None, None, None)


QUERIES = {
    "": 4,
    "order-42": 1,
    "ORDER-42  Team-A": 1,
    "order-42 team-b": 0,
    "team_space=t": 1,
    "team_space:t": 1,
    "_user=U1 predictions.create": 1,
    "replicate/hello-world": 2,
    "succeeded": 2,
    "predictions.get": 1,
    "/v1/predictions/{prediction_id}": 1,
    "/v1/predictions": 2,
    "bad_request": 1,
    "401": 1,
    "key_unknown": 1,
    "no such thing": 0,
    "nosuchtenant": 0,
}


async def test_each_word_has_to_occur_somewhere(shown_stage: Shown) -> None:
    played = shown_stage.stage
    app = played.proxy()
    id = await played.create(app, *CALLER)
    await played.poll(app, id, seconds=QUEUE + RUN)
    await played.ask(app, "GET", "/v1/a/../b")
    await played.ask(app, "GET", "/v1/account", None, who=(b"x-portkey-api-key", b"pk-nobody"))
    assert {query: len(shown_stage.list(query)) for query in QUERIES} == QUERIES
    create = shown_stage.list("create")[0]
    for query, count in ((id, 2), (id.upper(), 2), (create.trace_id, 1), (f"/v1/predictions/{id}", 1)):
        assert len(shown_stage.list(query)) == count


async def test_a_story_has_the_create_its_run_and_whatever_saw_it(shown_stage: Shown) -> None:
    await scenarios.asynchronous(shown_stage.stage)
    create = shown_stage.one("predictions.create")
    told = shown_stage.story(create)
    polls = ["poll", "  attempt"] * 5
    assert sorted(lines(told)[:4]) == sorted(["create *", "  attempt *", "  queue *", "  run *"])
    assert lines(told)[4:] == polls
    assert (told.prediction_id, told.model, told.tenant) == (create.prediction_id, "replicate/hello-world", "team-a")
    queue, run = (next(row for row in told.rows if row.kind == kind) for kind in ("queue", "run"))
    assert (seconds(queue), seconds(run), queue.end) == (QUEUE, RUN, run.start)
    assert [event.name for event in run.events] == [names.STARTED]
    assert run.events[0].time == run.start
    assert queue.parent == run.parent == create.span_id
    assert dict(queue.attributes) == {names.QUEUE_TIME: "60.0"}
    assert dict(run.attributes)[names.POLLS] == "4"
    assert (told.rows[0].code, told.rows[0].status, told.rows[0].name) == (201, "unset", "POST /v1/predictions")
    assert told.start == min(row.start for row in told.rows)
    assert told.end == max(row.end or 0.0 for row in told.rows)
    first, *_ = [row for row in told.rows if row.kind == "poll"]
    assert first.links == (create.trace_id,)
    assert (first.trace_id, first.parent) == (next(iter(reversed(shown_stage.list("predictions.get")))).trace_id, None)


async def test_it_is_the_same_story_by_whichever_request_it_is_found(shown_stage: Shown) -> None:
    await scenarios.asynchronous(shown_stage.stage)
    create, poll = shown_stage.one("predictions.create"), shown_stage.list("predictions.get")[0]
    of_create, of_poll = shown_stage.story(create), shown_stage.story(poll)
    assert [row.id for row in of_create.rows] == [row.id for row in of_poll.rows]
    assert [row.trace_id for row in of_poll.rows if row.current] == [poll.trace_id] * 2
    assert [row.kind for row in of_poll.rows if row.current] == ["poll", "attempt"]
    by_attempt = story(shown_stage.traces, poll.trace_id, next(row.id for row in of_poll.rows if row.current))
    assert by_attempt is not None
    assert by_attempt.span_id == poll.span_id


@pytest.mark.parametrize(
    ("scenario", "kinds"),
    [
        ("training", {"create", "poll"}),
        ("canceled", {"create", "cancel"}),
        ("streamed", {"create", "stream"}),
        ("delivered", {"create", "webhook"}),
        ("deployment", {"create", "poll"}),
    ],
)
async def test_stories_of_each_kind(shown_stage: Shown, scenario: str, kinds: set[str]) -> None:
    await getattr(scenarios, scenario)(shown_stage.stage)
    create = shown_stage.list()[-1]
    told = shown_stage.story(create)
    assert {row.kind for row in told.rows if row.depth == 0} == kinds
    assert [row.kind for row in told.rows if row.kind in ("queue", "run")][-1] == "run"
    assert told.prediction_id == create.prediction_id is not None
    assert {summary.prediction_id for summary in shown_stage.list()} == {create.prediction_id}
    assert None not in {summary.model for summary in shown_stage.list()}


async def test_a_stream_is_its_creator_s(shown_stage: Shown) -> None:
    """Whoever has its URL may read it without a key."""
    await scenarios.streamed(shown_stage.stage)
    assert [(summary.route, summary.tenant) for summary in shown_stage.list("team-a")] == [
        ("/v1/-/streams/{token}", "team-a"),
        ("/v1/models/{model_owner}/{model_name}/predictions", "team-a"),
    ]


def test_who_was_refused_has_not_polled(recorder: Recorder) -> None:
    create = recorder.request(0, replicate_prediction_id="p1", replicate_operation="predictions.create")
    recorder.request(1, replicate_prediction_id="p1")
    for number, outcome in enumerate(("auth_invalid", "upstream_timeout")):
        told_by: dict[str, Any] = {names.OUTCOME: outcome}
        recorder.request(number + 2, replicate_prediction_id="p1", **told_by)
    told = recorder.story(create)
    assert told is not None
    assert [row.kind for row in told.rows] == ["create", "poll", "request", "poll"]


async def test_of_a_stream_alone_the_run_has_no_queue(shown_stage: Shown) -> None:
    await scenarios.streamed(shown_stage.stage)
    assert "queue" not in [row.kind for row in shown_stage.story(shown_stage.list()[-1]).rows]


async def test_what_never_began_was_only_waiting(shown_stage: Shown) -> None:
    await scenarios.aborted(shown_stage.stage)
    told = shown_stage.story(shown_stage.one("predictions.create"))
    [run] = [row for row in told.rows if row.kind in ("queue", "run")]
    assert (run.kind, run.status, seconds(run)) == ("queue", "error", 30.0)
    assert dict(run.attributes)[names.PREDICTION_STATUS] == "aborted"


async def test_what_failed(shown_stage: Shown) -> None:
    await scenarios.failed(shown_stage.stage)
    create = shown_stage.one("predictions.create")
    assert (create.status, create.error, create.prediction_status) == (201, "prediction_failed", "failed")
    [run] = [row for row in shown_stage.story(create).rows if row.kind == "run"]
    assert (run.status, dict(run.attributes)["error.type"]) == ("error", "prediction_failed")


async def test_a_run_without_its_create_is_told_by_who_saw_it_and_the_create_has_its_status(shown_stage: Shown) -> None:
    await scenarios.restarted(shown_stage.stage)
    create = shown_stage.one("predictions.create")
    assert (create.prediction_status, create.run_time) == ("succeeded", None)
    assert lines(shown_stage.story(create))[:2] == ["create *", "  attempt *"]
    first = shown_stage.list("predictions.get")[-1]
    assert first.run_time == RUN
    assert sorted(line for line in lines(shown_stage.story(first)) if line.endswith("*")) == [
        "  attempt *",
        "  queue *",
        "  run *",
        "poll *",
    ]


async def test_a_create_shows_how_its_prediction_stands(shown_stage: Shown) -> None:
    played = shown_stage.stage
    app = played.proxy()
    id = await played.create(app)
    statuses = []
    for elapsed in (0.0, QUEUE + 1, RUN):
        await played.poll(app, id, seconds=elapsed)
        statuses.append(shown_stage.one("predictions.create").prediction_status)
    assert statuses == ["starting", "processing", "succeeded"]
    assert [summary.prediction_status for summary in shown_stage.list("predictions.get")] == [*reversed(statuses)]


async def test_the_run_of_a_create_that_is_not_held_any_more() -> None:
    with stage() as played:
        app = played.proxy()
        id = await played.create(app)
        shown_then = Shown(played)
        await played.poll(app, id, seconds=QUEUE + RUN)
        [poll] = shown_then.list()
        assert (poll.operation, poll.cost, poll.run_time) == ("predictions.get", None, None)
        told = shown_then.story(poll)
        assert sorted(lines(told)) == ["  attempt *", "poll *", "queue", "run"]
        run = next(row for row in told.rows if row.kind == "run")
        by_run = story(shown_then.traces, run.trace_id)
        assert by_run is not None
        assert (by_run.prediction_id, by_run.span_id, by_run.tenant) == (id, run.id, "team-a")
        assert sorted(lines(by_run)) == ["  attempt", "poll", "queue *", "run *"]


async def test_a_caller_may_have_all_its_requests_in_one_trace(shown_stage: Shown) -> None:
    played = shown_stage.stage
    app = played.proxy()
    caller = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    ids = [await played.create(app, caller) for _ in range(2)]
    played.fake.clock.advance(QUEUE + RUN)
    for id in ids:
        await played.poll(app, id, caller)
    await played.ask(app, "GET", "/v1/account", None, caller)
    assert [held.id for held in shown_stage.traces] == ["0af7651916cd43dd8448eb211c80319c"]
    for id in ids:
        told = shown_stage.story(shown_stage.list(f"create {id}")[0])
        assert sorted(lines(told)) == sorted(["create *", "  attempt *", "  queue *", "  run *", "poll", "  attempt"])
        assert told.prediction_id == id
    first = story(shown_stage.traces, "0af7651916cd43dd8448eb211c80319c")
    assert first is not None
    assert first.prediction_id == ids[0]
    account = shown_stage.story(shown_stage.one("account.get"))
    assert account.prediction_id is None
    assert len([row for row in account.rows if row.kind == "create"]) == 2
    assert [row.kind for row in account.rows if row.current] == ["request", "attempt"]


async def test_a_host_that_asks_twice_in_one_trace(shown_stage: Shown) -> None:
    played = shown_stage.stage
    app, host = played.proxy(), played.tracer_provider.get_tracer("host")
    with host.start_as_current_span("job"):
        for name in ("first", "second"):
            with host.start_as_current_span(name):
                host.start_span("query").end()
                await played.create(app)
    told = shown_stage.story(shown_stage.list()[-1])
    assert lines(told) == ["host", "  host", "    host", "    create *", "      attempt *"]
    assert [row.name for row in told.rows] == [
        "job",
        "first",
        "query",
        "POST /v1/predictions",
        "POST /v1/predictions",
    ]
    assert dict(told.rows[0].attributes)["otel.scope.name"] == "host"


async def test_a_request_that_is_about_no_prediction_has_its_trace(shown_stage: Shown) -> None:
    await scenarios.below_a_host(shown_stage.stage)
    account = shown_stage.one("account.get")
    assert lines(shown_stage.story(account)) == ["host", "  request *", "    attempt *"]


async def test_polls_that_shared_an_answer_are_in_the_story(shown_stage: Shown) -> None:
    await scenarios.layered(shown_stage.stage)
    created = next(one for one in shown_stage.list("predictions.create") if one.outcome == "forwarded")
    told = shown_stage.story(created)
    assert [row.kind for row in told.rows if row.depth == 0] == ["create", "poll", "poll", "poll"]


async def test_what_is_under_way(shown_stage: Shown) -> None:
    """A create that is held, and then a stream that is open: neither has said anything of itself yet."""
    played = shown_stage.stage
    app = played.streaming(prices=PRICES)
    target = f"/v1/models/{LLAMA}/predictions"
    create, stream = Caller([b'{"input": {"prompt": "Ada"}}']), Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(create.call, app, http_scope("POST", target, [KEY, (b"prefer", b"wait=5"), *CALLER]))
        await until(lambda: any(summary.model for summary in shown_stage.list()))
        [held] = shown_stage.list()
        assert (held.status, held.duration, held.outcome) == (None, None, None)
        assert (held.method, held.operation, held.model) == ("POST", "models.predictions.create", LLAMA)
        assert (held.portkey_trace_id, held.metadata) == ("order-42", {"_user": "u1", "team_space": "t"})
        assert lines(shown_stage.story(held)) == ["create *", "  attempt *"]
        assert shown_stage.story(held).end is None
        await until(lambda: create.complete, meanwhile=lambda: played.fake.clock.advance(1))
        tasks.start_soon(stream.call, app, http_scope("GET", scenarios.stream_of(create), [KEY]))
        with anyio.fail_after(5):
            await stream.started.wait()
        streaming, created = shown_stage.list()
        assert (streaming.status, streaming.operation, streaming.model) == (None, None, LLAMA)
        assert streaming.prediction_id == created.prediction_id == scenarios.told(create)["id"]
        told = shown_stage.story(created)
        assert [(row.kind, row.end is None) for row in told.rows if row.depth == 0] == [
            ("create", False),
            ("stream", True),
        ]
        assert told.end is None
        played.fake.clock.advance(QUEUE + RUN)
        await until(lambda: stream.complete)
    await app.aclose()
    assert shown_stage.list()[0].duration is not None


def test_an_answer_that_nobody_can_read_is_found_by_its_links(recorder: Recorder) -> None:
    create = recorder.request(0, replicate_prediction_id="p1")
    about = create.get_span_context()
    recorder.request(10, links=(Link(about),))
    recorder.request(20)
    unreadable = recorder.request(5)
    recorder.request(30, replicate_prediction_id="p1", links=(Link(unreadable.get_span_context()),))
    told = recorder.story(create)
    assert told is not None
    assert [row.start for row in told.rows] == [0, 5, 10, 30]


def test_predictions_that_are_asked_for_often_leave_off_the_oldest_polls(recorder: Recorder) -> None:
    create = recorder.request(0, replicate_prediction_id="p1", replicate_operation="predictions.create")
    asked = recorder.request(1, replicate_prediction_id="p1")
    for number in range(MAX_ROWS):
        recorder.request(number + 2, replicate_prediction_id="p1")
    told = recorder.story(asked)
    assert told is not None
    assert (len(told.rows), told.omitted) == (MAX_ROWS, 2)
    assert [row.start for row in told.rows[:3]] == [0, 1, 4]
    assert told.rows[0].id == f"{create.get_span_context().span_id:016x}"


def test_polls_that_came_to_the_same_are_one_line(recorder: Recorder) -> None:
    """A client that polls each second leaves the creates in the list."""
    recorder.request(0, replicate_prediction_id="p1", replicate_operation="predictions.create")
    alike: dict[str, Any] = {"replicate_prediction_id": "p1", "replicate_prediction_status": "processing"}
    for number in range(300):
        recorder.request(number + 2, **alike)
    others: tuple[dict[str, Any], ...] = (
        {"replicate_prediction_status": "succeeded"},
        {"replicate_prediction_id": "p2"},
        {names.TENANT: "team-b"},
        {names.HTTP_RESPONSE_STATUS_CODE: 503},
        {names.OUTCOME: "limited"},
        {"error_type": "timeout"},
    )
    for number, other in enumerate(others):
        recorder.request(number + 400, **alike | other)
    recorder.request(500, replicate_operation="account.get")
    recorder.request(501, replicate_operation="account.get")
    found = listing(recorder.traces, "")
    assert (found.total, len(found.requests)) == (309, 10)
    polls, create = found.requests[-2:]
    assert (polls.start, polls.until, polls.count, polls.operation) == (2, 301, 300, "predictions.get")
    assert (create.start, create.until, create.count, create.operation) == (0, None, 1, "predictions.create")
    assert {summary.count for summary in found.requests[:-2]} == {1}
    [alone] = listing(recorder.traces, polls.trace_id).requests
    assert (alone.start, alone.until, alone.count) == (2, None, 1)


def test_a_poll_that_is_open_or_tells_the_run_is_a_line_of_its_own(recorder: Recorder) -> None:
    polls = [recorder.request(number, replicate_prediction_id="p1") for number in range(3)]
    run: dict[str, Any] = {names.OBSERVED_BY: "poll", names.COST: 0.5}
    recorder.proxy.start_span("run", trace.set_span_in_context(polls[1]), SpanKind.CLIENT, attributes=run).end()
    told: dict[str, Any] = {names.HTTP_REQUEST_METHOD: "GET", names.HTTP_ROUTE: "/v1/predictions/{prediction_id}"}
    told[names.PREDICTION_ID] = "p1"
    recorder.proxy.start_span("GET", kind=SpanKind.SERVER, attributes=told, start_time=10 * MILLISECOND)
    found = listing(recorder.traces, "").requests
    assert [(summary.start, summary.count, summary.cost) for summary in found] == [
        (10, 1, None),
        (1, 1, 0.5),
        (0, 2, None),
    ]


def test_the_newest_lines_are_listed(recorder: Recorder) -> None:
    for number in range(MAX_LINES + 1):
        recorder.request(number, replicate_operation="account.get")
    found = listing(recorder.traces, "")
    assert (found.total, len(found.requests)) == (MAX_LINES + 1, MAX_LINES)
    assert [found.requests[0].start, found.requests[-1].start] == [MAX_LINES, 1]


def test_a_trace_stands_for_its_first_request_whatever_is_searched_for(recorder: Recorder) -> None:
    above = recorder.host.start_span("page")
    for number, name in enumerate(("one", "two")):
        recorder.request(number, above=above, replicate_prediction_id=name, replicate_operation="predictions.create")
    found = {query: listing(recorder.traces, query).requests for query in ("", "one", "two")}
    assert {query: [summary.first for summary in lines] for query, lines in found.items()} == {
        "": [False, True],
        "one": [True],
        "two": [False],
    }


def test_a_search_is_as_long_as_what_the_page_takes(recorder: Recorder) -> None:
    recorder.request(0, replicate_operation="account.get")
    for query, count in ((f"{'get ':{MAX_QUERY}}nowhere", 1), (f"{'get ':{MAX_QUERY - 7}}nowhere", 0)):
        assert listing(recorder.traces, query).total == count


def test_there_is_no_story_of_what_is_not_there(recorder: Recorder) -> None:
    request, other = recorder.request(), recorder.request()
    own, another = (f"{span.get_span_context().trace_id:032x}" for span in (request, other))
    assert story(recorder.traces, "f" * 32) is None
    assert story(recorder.traces, own, "f" * 16) is None
    assert story(recorder.traces, own, f"{other.get_span_context().span_id:016x}") is None
    assert story(recorder.traces, another, "") is None
    assert story((), own) is None
    assert story([Trace(own, ())], own) is None


def test_spans_that_are_below_each_other_have_no_place(recorder: Recorder) -> None:
    recorder.request()
    [request] = recorder.traces[0].spans
    told = [
        ReadableSpan(name, SpanContext(1, one, is_remote=False), SpanContext(1, other, is_remote=False))
        for name, one, other in (("one", 2, 3), ("other", 3, 2), ("below", 4, 2))
    ]
    circle = Trace("1", tuple(seen(span) for span in told))
    assert circle.requests == ()
    assert story([circle], "1") is None
    both = story([Trace("1", (*circle.spans, request))], "1")
    assert both is not None
    assert lines(both) == ["poll *"]


def test_deep_traces_are_no_recursion(recorder: Recorder) -> None:
    span = recorder.request()
    for number in range(400):
        span = recorder.host.start_span(str(number), trace.set_span_in_context(span), start_time=number)
        span.end(number + 1)
    last = recorder.request(1000, above=span).get_span_context()
    whole = [story(recorder.traces, f"{last.trace_id:032x}", id) for id in (None, f"{last.span_id:016x}")]
    for told, current in zip(whole, ([*range(401)], [401]), strict=True):
        assert told is not None
        assert [row.depth for row in told.rows] == [*range(402)]
        assert [row.depth for row in told.rows if row.current] == current


def test_a_span_that_is_open_is_known_by_method_and_route(recorder: Recorder) -> None:
    for number, operation in enumerate(OPERATIONS):
        known = {names.HTTP_REQUEST_METHOD: operation.method, names.HTTP_ROUTE: f"/any/prefix{operation.path}"}
        recorder.proxy.start_span("request", kind=SpanKind.SERVER, attributes=known, start_time=-number)
    for route in ("/v1/{path}", "/v1/-/streams/{token}", "/v1/-/webhooks"):
        known = {names.HTTP_REQUEST_METHOD: "GET", names.HTTP_ROUTE: route}
        recorder.proxy.start_span("request", kind=SpanKind.SERVER, attributes=known, start_time=-100)
    found = listing(recorder.traces, "").requests
    expected = [operation.id for operation in OPERATIONS]
    assert [summary.operation for summary in found] == [*expected, None, None, None]
    kinds = {
        summary.operation or summary.route: told.rows[0].kind
        for summary in found
        if (told := story(recorder.traces, summary.trace_id)) is not None
    }
    assert {name: kind for name, kind in kinds.items() if kind != "request"} == {
        "predictions.create": "create",
        "models.predictions.create": "create",
        "deployments.predictions.create": "create",
        "trainings.create": "create",
        "predictions.get": "poll",
        "trainings.get": "poll",
        "predictions.cancel": "cancel",
        "trainings.cancel": "cancel",
        "/v1/-/streams/{token}": "stream",
        "/v1/-/webhooks": "webhook",
    }


async def test_an_attempt_that_goes_on_elsewhere(shown_stage: Shown) -> None:
    """A proxy behind a proxy, in one trace: each request has its own attempt."""
    played = shown_stage.stage
    app = played.proxy(options={"propagate_upstream": True})
    with RawUpstream() as raw:
        traceparents: list[str] = []

        def answer(connection: Connection) -> None:
            while request := connection.request():
                traceparents.extend(value.decode() for name, value in request.headers if name == b"traceparent")
                connection.answer(b"{}")

        raw.script = answer
        await played.ask(played.proxy(raw.url, options={"propagate_upstream": True}), "GET", "/v1/account")
    await played.ask(app, "GET", "/v1/hardware", None, (b"traceparent", traceparents[0].encode()))
    told = shown_stage.story(shown_stage.one("hardware.list"))
    assert lines(told) == ["request", "  attempt", "    request *", "      attempt *"]


def test_what_the_host_says_of_its_spans(recorder: Recorder) -> None:
    request = recorder.proxy.start_span("request", kind=SpanKind.SERVER, start_time=0)
    span = recorder.host.start_span("query", trace.set_span_in_context(request), start_time=SECOND)
    span.set_status(Status(StatusCode.ERROR, "no rows"))
    span.add_event("exception", {"exception.type": "KeyError"}, timestamp=2 * SECOND)
    span.end(3 * SECOND)
    request.set_status(StatusCode.OK)
    told = recorder.story(request)
    assert told is not None
    own, query = told.rows
    assert (own.status, own.end, own.code) == ("ok", None, None)
    assert (query.status, query.start, query.end, query.parent) == ("error", 1000.0, 3000.0, own.id)
    assert query.attributes == (("otel.scope.name", "host"), ("otel.status_description", "no rows"))
    [event] = query.events
    assert (event.name, event.time, event.attributes) == ("exception", 2000.0, (("exception.type", "KeyError"),))


def test_spans_of_the_host_are_shown_without_secrets(recorder: Recorder) -> None:
    """Those of the proxy's are without them already."""
    request = recorder.proxy.start_span("request", kind=SpanKind.SERVER)
    told: dict[str, Any] = {
        "url.path": "/v1/-/streams/c2VjcmV0LW9mLWEtc3RyZWFt",
        "url.full": "http://app.example/v1/-/streams/c2VjcmV0?a=1&token=hunter22",
        "http.request.header.x-portkey-api-key": ["pk-of-a-caller"],
        "http.request.header.x_portkey_config": ["pc-of-a-caller"],
        "http.request.header.cookie": "session=of-a-caller",
        "http.request.header.user-agent": ["client/1.0"],
        "http.response.header.etag": "W/1",
        "aws.s3.key": "pictures/1.png",
        "count": 3,
    }
    span = recorder.host.start_span("GET /-/streams/c2Vjcm", trace.set_span_in_context(request), attributes=told)
    span.set_status(Status(StatusCode.ERROR, "Bearer of-a-caller-1 was refused"))
    span.add_event("exception", {"exception.message": "no such token: r8_OfACaller"})
    span.end()
    request.end()
    story = recorder.story(request)
    assert story is not None
    _, row = story.rows
    assert row.name == "GET /-/streams/REDACTED"
    assert dict(row.attributes) == {
        "url.path": "/v1/-/streams/REDACTED",
        "url.full": "http://app.example/v1/-/streams/REDACTED?a=1&token=REDACTED",
        "http.request.header.x-portkey-api-key": "REDACTED",
        "http.request.header.x_portkey_config": "REDACTED",
        "http.request.header.cookie": "REDACTED",
        "http.request.header.user-agent": '["client/1.0"]',
        "http.response.header.etag": "W/1",
        "aws.s3.key": "pictures/1.png",
        "count": "3",
        "otel.scope.name": "host",
        "otel.status_description": "Bearer REDACTED was refused",
    }
    assert row.events[0].attributes == (("exception.message", "no such token: REDACTED"),)


def test_times_are_those_that_a_browser_has_dates_for(recorder: Recorder) -> None:
    request = recorder.proxy.start_span("request", kind=SpanKind.SERVER, start_time=-(10**400))
    request.end(10**400)
    wrong: Any = "yesterday"
    recorder.host.start_span("no time", trace.set_span_in_context(request), start_time=wrong)
    story = recorder.story(request)
    assert story is not None
    assert [(row.start, row.end) for row in story.rows] == [(-8.64e15, 8.64e15)]
    assert listing(recorder.traces, "").requests[0].start == -8.64e15


def test_attributes_are_told_in_the_order_in_which_they_are_looked_for(recorder: Recorder) -> None:
    ordered = (
        "error.type",
        "replicate_proxy.outcome",
        "replicate_proxy.tenant",
        "replicate.operation",
        "portkey.trace_id",
        "gen_ai.response.id",
        "a",
        "z",
        "http.request.method",
        "http.route",
        "url.path",
    )
    span = recorder.proxy.start_span(
        "request", kind=SpanKind.SERVER, attributes=dict.fromkeys(sorted(ordered), "x"), start_time=0
    )
    told = recorder.story(span)
    assert told is not None
    assert [name for name, _ in told.rows[0].attributes] == [*ordered]


TEXTS: list[tuple[Any, str]] = [
    ("text\n\tas it is é 👩‍👩‍👧", "text\n\tas it is é 👩‍👩‍👧"),
    ("\x00\x1b[2J\r\x7f\x9b", r"\x00\x1b[2J\r\x7f\x9b"),
    ("\u202eevil\u2066\u200f", r"\u202eevil\u2066\u200f"),
    ("\ud800 and \udfff", r"\ud800 and \udfff"),
    ("x" * (MAX_TEXT + 1), "x" * MAX_TEXT + f"… (cut, {MAX_TEXT + 1} characters)"),
    ("x" * MAX_TEXT, "x" * MAX_TEXT),
    (True, "true"),
    (42, "42"),
    (3.8e-06, "0.0000038"),
    (1.0, "1.0"),
    (math.nan, "NaN"),
    (-math.inf, "-Infinity"),
    (None, "null"),
    (["x", 1, None, math.nan], '["x", 1, null, NaN]'),
    (("é", "\ud800"), r'["é", "\ud800"]'),
    (b"\xff", r'"b' + r"'\\xff'" + '"'),
    ({"a": {1, 2}}, '{"a": "{1, 2}"}'),
    (["x" * MAX_TEXT], '["' + "x" * (MAX_TEXT - 2) + f"… (cut, {MAX_TEXT + 4} characters)"),
    (10**5000, "<class 'int'>"),
    ({("no", "name"): 1}, "<class 'dict'>"),
]


@pytest.mark.parametrize(("value", "text"), TEXTS, ids=range(len(TEXTS)))
def test_values_as_they_are_shown(value: Any, text: str) -> None:
    assert shown(value) == text
    text.encode()


def test_a_value_within_itself() -> None:
    value: list[Any] = []
    value.append(value)
    assert shown(value) == "<class 'list'>"
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "<class 'list'>"


def test_names_are_shorter() -> None:
    assert visible("x" * 300, 256) == "x" * 256 + "… (cut, 300 characters)"


def test_what_a_host_may_say_is_bounded_and_never_an_error(recorder: Recorder) -> None:
    remote = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(1))
    attributes: dict[str, Any] = {
        names.HTTP_RESPONSE_STATUS_CODE: "200",
        names.COST: math.nan,
        names.QUEUE_TIME: True,
        names.RUN_TIME: 10**400,
        names.TENANT: 7,
        names.PREDICTION_ID: ["p", "1"],
        f"{names.PORTKEY_METADATA}\u202ename": "\ud800",
        **{f"more.{number}": number for number in range(200)},
    }
    strange = ReadableSpan(
        "x" * 1000,
        recorder.request().get_span_context(),
        remote,
        attributes=attributes,
        links=[Link(remote)] * 200,
        kind=SpanKind.SERVER,
        instrumentation_scope=recorder.proxy.start_span("one").instrumentation_scope,  # type: ignore[attr-defined]
    )
    span = seen(strange)
    assert (len(span.attributes), len(span.links), len(span.name) < 300, span.start) == (128, 128, True, 0)
    [request] = Trace(span.trace_id, (span,)).requests
    summary = request.summary
    assert (summary.status, summary.cost, summary.queue_time, summary.run_time) == (None, None, None, None)
    assert (summary.tenant, summary.prediction_id) == ("7", '["p", "1"]')
    assert summary.metadata == {r"\u202ename": r"\ud800"}
    told = story([Trace(span.trace_id, (span,))], span.trace_id)
    json.dumps([told, summary], default=vars, allow_nan=False)
    assert told is not None
    assert told.rows[0].links == (f"{0xABC:032x}",)


def test_a_caller_elsewhere_is_no_row(recorder: Recorder) -> None:
    remote = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(1))
    request = recorder.request(above=NonRecordingSpan(remote))
    told = recorder.story(request)
    assert told is not None
    assert [(row.parent, row.depth) for row in told.rows] == [(None, 0)]
