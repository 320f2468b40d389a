from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw.checks.lists import with_results

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
_objects = st.dictionaries(st.text(max_size=3), _values, max_size=4)
_ITEMS = st.lists(
    st.none() | _objects | st.fixed_dictionaries({"output": _values}, optional={"logs": _values}), max_size=5
)


@given(_ITEMS, st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4)), st.none() | st.integers(0, 2))
def test_only_the_items_that_are_changed_change(
    items: list[Any], changed: set[int], withheld: set[int], indent: int | None
) -> None:
    page = {"next": None, "results": items, "more": {"results": [{"output": 1}]}}
    places = {
        place: (place in withheld, {"at": place})
        for place in changed
        if place < len(items) and items[place] is not None
    }
    shown = json.loads(with_results(json.dumps(page, indent=indent), places))
    for place, (is_withheld, hooks) in places.items():
        gone = {name: value for name, value in (("output", None), ("logs", "")) if name in items[place]}
        items[place] = {**items[place], **(gone if is_withheld else {}), "hook_results": hooks}
    assert shown == {**page, "results": items}
