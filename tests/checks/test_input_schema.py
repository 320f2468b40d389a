from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from replicate_proxy_mw.checks import ALLOW, Verdict, input_schema
from replicate_proxy_mw.checks.input_schema import valid_input
from replicate_proxy_mw.checks.json_schema import plain
from replicate_proxy_mw.layers.guardrails import guardrails
from replicate_proxy_mw.testing import FakeModel, FakeReplicate
from tests.checks.asking import Replicate, checked
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.tenants import JSON

pytestmark = pytest.mark.anyio

HELLO = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
MINE = FakeModel(
    owner="acme",
    name="mine",
    run=lambda given: "",
    visibility="private",
    input_schema={
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": {"type": "string"}, "n": {"type": "integer", "maximum": 4}},
    },
)


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN: "acme"}, "models": [MINE]}


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def _version(*required: str, id: str = "v1", name: str = "Input", **more: Any) -> dict[str, Any]:
    schemas = {name: {"type": "object", "required": list(required), **more}}
    return {"id": id, "openapi_schema": {"components": {"schemas": schemas}}}


def _model(*required: str) -> dict[str, Any]:
    return {"latest_version": _version(*required)}


async def _create(app: Any, target: str, body: dict[str, Any]) -> Caller:
    return await call(app, http_scope("POST", target, [KEY, JSON]), json.dumps(body).encode())


# --- behind the layer


@pytest.mark.parametrize(
    ("target", "version", "lookups"),
    [
        ("/v1/predictions", "acme/mine", ["models.get"]),
        ("/v1/predictions", f"acme/mine:{(MINE.versions or ())[0].id}", ["models.versions.get"]),
        ("/v1/models/acme/mine/predictions", None, ["models.get"]),
    ],
)
async def test_a_wrong_input_is_told_before_it_is_sent(
    fake_replicate: FakeReplicate, target: str, version: str | None, lookups: list[str]
) -> None:
    app = proxy(fake_replicate.url, layers=[guardrails(input=[valid_input()])])
    body = {"version": version} if version else {}
    for _ in range(2):
        caller = await _create(app, target, {**body, "input": {"n": 9}})
        assert caller.status == 446
        message = json.loads(caller.content)["error"]["message"]
        assert message == "guardrails: valid_input: input.prompt is missing; input.n has to be at most 4"
    assert [one.operation for one in fake_replicate.requests] == lookups
    await _create(app, target, {**body, "input": {"prompt": "x", "n": 4, "more": 1}})
    assert [one.operation for one in fake_replicate.requests[1:]] in (
        ["predictions.create"],
        ["models.predictions.create"],
    )


async def test_a_deployment_s_model_is_looked_up(fake_replicate: FakeReplicate) -> None:
    app = proxy(fake_replicate.url, layers=[guardrails(input=[valid_input()])])
    target = "/v1/deployments/acme/hello/predictions"
    caller = await _create(app, target, {"input": {"text": 7}})
    assert json.loads(caller.content)["error"]["message"].endswith("valid_input: input.text has to be string")
    assert [one.operation for one in fake_replicate.requests] == ["deployments.get", "models.versions.get"]
    assert (await _create(app, target, {"input": {"text": "Ada"}})).status == 201


# --- on its own


@pytest.mark.parametrize(
    ("more", "target"),
    [
        ({}, "/models/a/b"),
        ({"version": "v1"}, "/models/a/b/versions/v1"),
        ({"model": "deployments/a/b"}, "/deployments/a/b"),
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"latest_version": None, "openapi_schema": None, "current_release": None},
        {"latest_version": {"openapi_schema": {"components": []}}, "openapi_schema": {"components": {"schemas": 1}}},
        {"latest_version": {}, "openapi_schema": {"components": {"schemas": {"Input": True}}}},
        {"current_release": {"model": "a/../b", "version": "v1"}},
        {"current_release": {"model": "a/b", "version": ["v1"]}},
    ],
)
async def test_where_there_is_no_schema_all_is_allowed(more: dict[str, Any], target: str, answer: Any) -> None:
    replicate = Replicate({target: answer})
    assert await valid_input()(checked({"x": 1}, at=replicate, **more)) is ALLOW
    assert replicate.asked == [target]


async def test_what_is_not_looked_up_is_allowed() -> None:
    replicate = Replicate({})
    assert await valid_input()(checked({}, at=replicate, model=None, version="v1")) is ALLOW
    assert await valid_input()(checked({}, at=replicate, kind="output")) is ALLOW
    assert replicate.asked == []


async def test_a_missing_input_is_wrong_where_something_is_required() -> None:
    for required, verdict in ((["x"], Verdict.deny("input is missing")), ([], ALLOW)):
        assert await valid_input()(checked(None, at={"/models/a/b": _model(*required)})) == verdict


async def test_it_flags_where_it_is_told_to_and_tells_so_much() -> None:
    verdict = await valid_input(then="flag")(checked({}, at={"/models/a/b": _model(*"123456")}))
    assert verdict == Verdict.flag("; ".join(f"input.{name} is missing" for name in "12345"))


async def test_a_training_has_a_schema_of_its_own() -> None:
    version = _version("x")
    version["openapi_schema"]["components"]["schemas"]["TrainingInput"] = {"required": ["y"]}
    replicate = Replicate({"/models/a/b/versions/v1": version})
    check = valid_input()
    training = checked({}, at=replicate, version="v1", operation="trainings.create")
    assert await check(training) == Verdict.deny("input.y is missing")
    assert await check(checked({}, at=replicate, version="v1")) == Verdict.deny("input.x is missing")


async def test_a_version_is_looked_up_once() -> None:
    clock, replicate = _Clock(), Replicate({"/models/a/b/versions/v1": _version("x")})
    check = valid_input(now=clock)
    for value in ({"x": 1}, {}, {"x": 1}):
        await check(checked(value, at=replicate, version="v1"))
        clock.now += 1e9
    assert len(replicate.asked) == 1


async def test_the_latest_version_is_remembered_for_minutes() -> None:
    clock, replicate = _Clock(), Replicate({"/models/a/b": _model("x")})
    check = valid_input(now=clock)
    for seconds, asked in ((0, 1), (299, 1), (2, 2), (299, 2)):
        clock.now += seconds
        assert await check(checked({"x": 1}, at=replicate)) is ALLOW
        assert len(replicate.asked) == asked


async def test_nothing_is_denied_by_a_schema_that_may_be_an_old_one() -> None:
    clock, replicate = _Clock(), Replicate({"/models/a/b": _model("old")})
    check = valid_input(now=clock)
    assert await check(checked({"old": 1}, at=replicate)) is ALLOW
    replicate.answers["/models/a/b"] = _model("new")
    clock.now += 60
    assert await check(checked({"new": 1}, at=replicate)) is ALLOW
    assert await check(checked({}, at=replicate)) == Verdict.deny("input.new is missing")
    assert len(replicate.asked) == 2
    replicate.answers.clear()
    clock.now += 60
    assert await check(checked({}, at=replicate)) is ALLOW


async def test_a_deployment_s_new_release_is_seen() -> None:
    clock = _Clock()
    release = {"model": "a/b", "version": "v1"}
    replicate = Replicate(
        {
            "/deployments/a/d": {"current_release": release},
            "/models/a/b/versions/v1": _version("old"),
            "/models/a/b/versions/v2": _version("new"),
        }
    )
    check = valid_input(now=clock)
    assert await check(checked({"old": 1}, at=replicate, model="deployments/a/d")) is ALLOW
    replicate.answers["/deployments/a/d"] = {"current_release": {**release, "version": "v2"}}
    clock.now += 60
    assert await check(checked({"new": 1}, at=replicate, model="deployments/a/d")) is ALLOW


async def test_what_is_unknown_is_looked_up_again_after_a_minute() -> None:
    clock, replicate = _Clock(), Replicate({})
    check = valid_input(now=clock)
    for more in ({}, {"version": "v1"}, {"model": "deployments/a/b"}):
        replicate.asked.clear()
        for seconds, asked in ((0, 1), (59, 1), (2, 2)):
            clock.now += seconds
            assert await check(checked({}, at=replicate, **more)) is ALLOW
            assert len(replicate.asked) == asked


async def test_what_one_key_may_see_is_not_remembered_for_another() -> None:
    check = valid_input()
    for version in (None, "v1"):
        mine = Replicate({"/models/a/b": _model("private"), "/models/a/b/versions/v1": _version("private")})
        other = Replicate({})
        assert (await check(checked({}, at=mine, version=version))).word == "deny"
        assert await check(checked({}, at=other, version=version, identity="another token")) is ALLOW
        assert len(other.asked) == 1


class _Waiting(Replicate):
    go_on: anyio.Event

    async def get(self, target: str) -> object | None:
        answer = await super().get(target)
        await self.go_on.wait()
        return answer


async def test_of_many_at_the_same_time_one_looks_it_up_and_if_it_leaves_the_next() -> None:
    replicate = _Waiting({"/models/a/b": _model("x")})
    replicate.go_on = anyio.Event()
    check, verdicts, leaves = valid_input(), list[Verdict](), anyio.CancelScope()

    async def one() -> None:
        verdicts.append(await check(checked({}, at=replicate)))

    async def first() -> None:
        with leaves:
            await one()

    async with anyio.create_task_group() as tasks:
        for call in (first, *[one] * 5):
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            assert len(replicate.asked) == 1
        leaves.cancel()
        await anyio.wait_all_tasks_blocked()
        assert len(replicate.asked) == 2
        replicate.go_on.set()
    assert verdicts == [Verdict.deny("input.x is missing")] * 5
    assert len(replicate.asked) == 2


async def test_only_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = Replicate({f"/models/a/b/versions/v{n}": _version("x") for n in range(4)})
    _, nodes = plain({"Input": {"type": "object", "required": ["x"]}}, "Input")
    monkeypatch.setattr(input_schema, "MAX_REMEMBERED", 3 * nodes)
    check = valid_input()
    for version in (0, 1, 2, 0, 3, 0):
        await check(checked({"x": 1}, at=replicate, version=f"v{version}"))
    assert [target[-1] for target in replicate.asked] == ["0", "1", "2", "3"]
    await check(checked({"x": 1}, at=replicate, version="v1"))
    assert replicate.asked[-1] == "/models/a/b/versions/v1"


async def test_looking_the_same_up_again_takes_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = Replicate({"/models/a/b": _model("x"), "/models/a/b/versions/v1": _version("x")})
    _, nodes = plain({"Input": {"type": "object", "required": ["x"]}}, "Input")
    monkeypatch.setattr(input_schema, "MAX_REMEMBERED", 2 * nodes)
    clock = _Clock()
    check = valid_input(now=clock)
    for version in ("v1", None, None, None, "v1"):
        await check(checked({"x": 1}, at=replicate, version=version))
        clock.now += 300
    assert replicate.asked == ["/models/a/b/versions/v1", *["/models/a/b"] * 3]


def test_an_option_that_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"^then: "):
        valid_input(then="allow")  # type: ignore[arg-type]
