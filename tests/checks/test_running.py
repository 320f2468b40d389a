from __future__ import annotations

import json
from datetime import datetime
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw import PermissionDenied
from replicate_proxy_mw.checks import ALLOW, Check, Checked, Verdict
from replicate_proxy_mw.checks.running import Result, first, hook_results, name_of, run, with_hook_results
from replicate_proxy_mw.errors import LimitExceeded
from tests.checks.asking import checked

pytestmark = pytest.mark.anyio


async def allows(_: Checked) -> Verdict:
    return ALLOW


class Named:
    name = "my own"

    async def __call__(self, _: Checked) -> Verdict:
        return ALLOW


def test_a_check_is_known_by_its_name() -> None:
    assert [name_of(one) for one in (allows, Named(), partial(allows))] == ["allows", "my own", "partial"]


async def test_all_are_asked_at_once_and_answer_in_their_order() -> None:
    both = anyio.Event()

    async def waits(_: Checked) -> Verdict:
        await both.wait()
        return Verdict.flag("waited")

    async def lets_go(_: Checked) -> Verdict:
        both.set()
        return ALLOW

    results = await run([waits, lets_go], checked(1), seconds=5)
    assert [(one.check, one.word) for one in results] == [("waits", "flag"), ("lets_go", "allow")]
    assert all(datetime.fromisoformat(one.created_at).tzinfo for one in results)


async def test_one_that_hangs_takes_no_time_of_the_others() -> None:
    async def slow(_: Checked) -> Verdict:
        await anyio.sleep(0.05)
        return ALLOW

    async def hangs(_: Checked) -> Verdict:
        await anyio.sleep_forever()
        raise AssertionError

    results = await run([hangs, slow], checked(1), seconds=0.5)
    assert [one.word for one in results] == ["failed", "allow"]


async def test_the_first_refusal_in_their_order_is_raised() -> None:
    async def second(_: Checked) -> Verdict:
        raise LimitExceeded("second")

    async def refuses(_: Checked) -> Verdict:
        await anyio.lowlevel.checkpoint()
        raise PermissionDenied("first")

    with pytest.raises(PermissionDenied, match=r"^first$"):
        await run([allows, refuses, second], checked(1), seconds=5)


async def test_a_caller_who_leaves_ends_the_checks() -> None:
    ended: list[str] = []
    begun = anyio.Event()

    async def waits(_: Checked) -> Verdict:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            ended.append("ended")
        raise AssertionError

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(run, [waits, waits], checked(1), seconds=60))
        await begun.wait()
        tasks.cancel_scope.cancel()
    assert ended == ["ended"] * 2


def test_hook_results_are_shaped_as_portkey_s() -> None:
    results = [
        Result("a", ALLOW, "2026-01-01T00:00:00+00:00", 3),
        Result("b", Verdict.flag("why"), "2026-01-01T00:00:01+00:00", 7),
        Result("c", None, "2026-01-01T00:00:02+00:00", 5),
    ]

    def shown(check: str, verdict: bool, data: Any, error: Any, milliseconds: int, second: int) -> dict[str, Any]:
        return {
            "id": check,
            "verdict": verdict,
            "data": data,
            "error": error,
            "execution_time": milliseconds,
            "created_at": f"2026-01-01T00:00:0{second}+00:00",
            "transformed": False,
        }

    hook = {
        "verdict": False,
        "id": "output",
        "transformed": False,
        "checks": [
            shown("a", True, None, None, 3, 0),
            shown("b", False, {"explanation": "why"}, None, 7, 1),
            shown("c", True, None, {"name": "CheckFailed", "message": "This check failed."}, 5, 2),
        ],
        "feedback": None,
        "execution_time": 7,
        "async": False,
        "type": "guardrail",
        "created_at": "2026-01-01T00:00:00+00:00",
        "deny": False,
        "skipped": False,
    }
    assert hook_results(after=results) == {"before_request_hooks": [], "after_request_hooks": [hook]}
    assert first(results, "failed") is results[2]
    assert first(results, "deny") is None


def _is_check(check: Check) -> Check:
    return check


def test_functions_and_objects_are_checks() -> None:
    assert [name_of(_is_check(one)) for one in (allows, Named())] == ["allows", "my own"]


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=4), max_size=4), st.none() | st.just(2))
def test_hook_results_are_put_behind_all_else(content: dict[str, Any], indent: int | None) -> None:
    text, hooks = json.dumps(content, indent=indent, ensure_ascii=False) + " \n", hook_results()
    shown = with_hook_results(text, hooks)
    assert list(json.loads(shown).items()) == [*content.items(), ("hook_results", hooks)]
    assert shown.startswith(text.rstrip()[:-1].rstrip())
