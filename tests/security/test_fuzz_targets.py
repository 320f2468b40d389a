"""Whatever target a caller thinks of, nothing leaves Replicate's API, its host, or what is a request. Rows 1 to 3, 19.

`scripts/fuzz` does the same for a million of them.
"""

from __future__ import annotations

import asyncio
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.security.generated import METHODS, PIECES, PREFIXES, QUERIES, Case, Judge, target

JUDGES = 6

_PIECES = st.lists(st.sampled_from(sorted(set(PIECES))) | st.binary(max_size=3), max_size=5).map(b"".join)
_RAW = st.builds(bytes.__add__, st.just(b"/v1/") | st.sampled_from(sorted(set(PREFIXES))), _PIECES)


def _case(method: str, raw: bytes, query: bytes, root: str) -> Case:
    return Case(method, root + unquote(raw.decode("latin-1")), root.encode() + raw, query, root)


CASES = st.builds(
    _case,
    st.sampled_from(sorted(set(METHODS))),
    _RAW,
    st.just(b"") | st.sampled_from(QUERIES) | st.binary(max_size=8),
    st.sampled_from(("", "", "/api", "/v1")),
)


@pytest.mark.parametrize("which", range(JUDGES))
def test_no_target_leaves_the_api(all_judges: tuple[asyncio.Runner, list[Judge]], which: int) -> None:
    runner, judge = all_judges[0], all_judges[1][which]

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def play(case: Case) -> None:
        assert runner.run(judge.wrong(case)) == []

    play()
    assert judge.forwarded > 20


@pytest.mark.parametrize("which", range(JUDGES))
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_target_of_the_long_run_leaves_the_api(
    all_judges: tuple[asyncio.Runner, list[Judge]], which: int, data: st.DataObject
) -> None:
    runner, judge = all_judges[0], all_judges[1][which]
    case = target(lambda below: data.draw(st.integers(0, below - 1)))
    assert runner.run(judge.wrong(case)) == []
