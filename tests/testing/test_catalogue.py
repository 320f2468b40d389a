from __future__ import annotations

import struct

from replicate_proxy_mw.testing import FakeFile, FakeModel, FakeVersion
from replicate_proxy_mw.testing.catalogue import COLLECTIONS, seed
from replicate_proxy_mw.testing.predictions import outcome


def test_a_runnable_model_has_a_version_unless_it_is_official() -> None:
    (version,) = FakeModel(owner="acme", name="toy", run=len).versions or ()
    assert len(version.id) == 64
    assert FakeModel(owner="acme", name="toy", run=len, official=True).versions == ()
    assert FakeModel(owner="acme", name="toy").versions == ()


def test_versions_can_be_given() -> None:
    own = FakeVersion(id="a" * 64, created_at=0.0)
    model = FakeModel(owner="acme", name="toy", versions=(own,))
    assert (model.version("a" * 64), model.version("b" * 64)) == (own, None)
    assert model.as_json()["latest_version"]["created_at"] == "1970-01-01T00:00:00.000000Z"


def test_the_seed_fills_more_than_a_page() -> None:
    models = {model.full_name: model for model in seed()}
    assert len(models) > 25
    assert all(name in models for _, _, names in COLLECTIONS.values() for name in names)


def test_the_drawing_is_a_png() -> None:
    flux = next(model for model in seed() if model.name == "flux-schnell")
    assert flux.run is not None
    first, second = flux.run({"num_outputs": 2})
    assert isinstance(first, FakeFile)
    assert first == second
    assert first.content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", first.content[16:24]) == (1, 1)


def test_one_model_always_fails() -> None:
    (failing,) = (model for model in seed() if model.name == "always-fails")
    assert failing.run is not None
    assert outcome(failing.run, {}) == ((), "CUDA out of memory")
