"""Whatever headers a caller sends, only those of the list go up, in one framing. Rows 5, 13, 17, 18, 20, 26 to 28.

`scripts/fuzz` does the same for 200,000 sets of them.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.security.generated import API_KEY, BODIES, MAY, MAY_NOT, VALUES, Case, Judge, header_set
from tests.security.reference import MARK, Pair

JUDGES = 6

# As servers hand them over, and as none of them does.
_VALUE = st.sampled_from(sorted(set(VALUES))) | st.binary(max_size=8)
_MAY = st.tuples(st.sampled_from(MAY), _VALUE)
_MAY_NOT = st.tuples(st.sampled_from(sorted(set(MAY_NOT) - {b"connection"})) | st.binary(max_size=6), _VALUE).map(
    lambda pair: (pair[0], MARK + pair[0][-3:] + pair[1])
)
_NAMES = st.lists(st.sampled_from(sorted({*MAY, *MAY_NOT, b"x-portkey-api-key"})), max_size=4)
_CONNECTION = st.tuples(st.just(b"connection"), _NAMES.map(b", ".join))
_KEY: Pair = (b"x-portkey-api-key", API_KEY)


def _case(method: str, headers: list[Pair], body: tuple[bytes, ...], at: int) -> Case:
    headers.insert(at, _KEY)
    return Case(method=method, headers=tuple(headers), body=body)


CASES = st.builds(
    _case,
    st.sampled_from(("GET", "POST", "PUT", "HEAD")),
    st.lists(_MAY | _MAY | _MAY_NOT | _CONNECTION, max_size=6),
    st.sampled_from(BODIES),
    st.integers(0, 6),
)


@pytest.mark.parametrize("which", range(JUDGES))
def test_no_header_goes_up_that_may_not(all_judges: tuple[asyncio.Runner, list[Judge]], which: int) -> None:
    runner, judge = all_judges[0], all_judges[1][which]

    @settings(max_examples=250, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def play(case: Case) -> None:
        assert runner.run(judge.wrong(case)) == []

    play()
    assert judge.forwarded > 20


@pytest.mark.parametrize("which", range(JUDGES))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_header_of_the_long_run_goes_up_that_may_not(
    all_judges: tuple[asyncio.Runner, list[Judge]], which: int, data: st.DataObject
) -> None:
    runner, judge = all_judges[0], all_judges[1][which]
    case = header_set(lambda below: data.draw(st.integers(0, below - 1)))
    assert runner.run(judge.wrong(case)) == []
