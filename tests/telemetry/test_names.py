from __future__ import annotations

from replicate_proxy_mw.telemetry import names


def test_every_name_has_its_mark() -> None:
    assert set(names.MARKS.values()) == {"S", "D", "C"}
    own = ("replicate.", "replicate_proxy.", "portkey.")
    assert all((mark == "C") is name.startswith(own) for name, mark in names.MARKS.items())


def test_what_is_known() -> None:
    assert names.known("http.route")
    assert names.known("portkey.metadata._user")
    assert not names.known("http.url")
