from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from replicate_proxy_mw.checks import json_schema
from replicate_proxy_mw.checks.json_schema import MAX_NODES, errors, plain

# As Cog writes it.
FLUX: dict[str, Any] = {
    "Input": {
        "type": "object",
        "title": "Input",
        "required": ["prompt"],
        "properties": {
            "seed": {"type": "integer", "title": "Seed", "x-order": 1, "nullable": True},
            "prompt": {"type": "string", "title": "Prompt", "x-order": 0},
            "image": {"type": "string", "format": "uri", "x-order": 2},
            "strength": {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMinimum": True, "default": 0.5},
            "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4},
            "aspect_ratio": {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}], "default": "1:1", "x-order": 3},
            "style": {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}], "nullable": True},
            "loras": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 3}, "maxItems": 2},
            "either": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "one": {"oneOf": [{"type": "string"}, {"enum": ["x"]}], "nullable": True},
            "pattern": {"type": "string", "pattern": "^(a+)+$", "minItems": 3},
            "bounds": {"exclusiveMinimum": 1, "exclusiveMaximum": 3},
            "many": {"type": "array", "minItems": 2},
        },
    },
    "aspect_ratio": {"enum": ["1:1", "16:9"], "type": "string", "title": "aspect_ratio"},
}


def _wrong(schemas: dict[str, Any], value: object, most: int = 9) -> list[str]:
    return [f"{'.'.join(path)} {what}" for path, what in errors(plain(schemas, "Input")[0], value, most=most)]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"seed": 1},
        {"seed": None},
        {"seed": 1.0},
        {"image": "no URI at all"},
        {"strength": 0.1},
        {"aspect_ratio": "16:9"},
        {"style": None},
        {"style": "1:1"},
        {"loras": ["ab", "abc"]},
        {"either": ["a"]},
        {"one": "x"},
        {"one": None},
        {"pattern": "b" * 40},
        {"bounds": 2},
        {"bounds": "anything"},
        {"many": [1, 2]},
        {"what_it_does_not_know": [1]},
    ],
)
def test_what_a_model_takes_is_right(value: dict[str, Any]) -> None:
    assert _wrong(FLUX, {"prompt": "x", **value}) == []


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ([], [" has to be object"]),
        ("text", [" has to be object"]),
        ({}, ["prompt is missing"]),
        ({"prompt": 7}, ["prompt has to be string"]),
        ({"prompt": None}, ["prompt has to be string"]),
        ({"seed": "7"}, ["seed has to be integer or null"]),
        ({"seed": True}, ["seed has to be integer or null"]),
        ({"strength": 0}, ["strength has to be more than 0"]),
        ({"strength": 2}, ["strength has to be at most 1"]),
        ({"num_outputs": 0}, ["num_outputs has to be at least 1"]),
        ({"bounds": 3}, ["bounds has to be less than 3"]),
        ({"bounds": 1}, ["bounds has to be more than 1"]),
        ({"aspect_ratio": "hunter2"}, ["aspect_ratio has to be one of: 1:1, 16:9"]),
        ({"aspect_ratio": None}, ["aspect_ratio has to be string", "aspect_ratio has to be one of: 1:1, 16:9"]),
        ({"style": "x"}, ["style has to be one of: 1:1, 16:9, null"]),
        (
            {"loras": ["a", "b" * 9, 3]},
            [
                "loras may have at most 2 elements",
                "loras.0 needs at least 2 characters",
                "loras.1 may have at most 3 characters",
                "loras.2 has to be string",
            ],
        ),
        ({"either": 7}, ["either is nothing that is allowed there"]),
        ({"one": 7}, ["one is nothing that is allowed there"]),
        ({"many": [1]}, ["many needs at least 2 elements"]),
    ],
)
def test_what_it_does_not_take_is_told_without_the_value(value: Any, wrong: list[str]) -> None:
    given = {"prompt": "x", **value} if isinstance(value, dict) and value else value
    assert sorted(_wrong(FLUX, given)) == sorted(wrong)


def test_each_choice_has_to_be_made() -> None:
    schemas = {"Input": {"anyOf": [{"type": "string"}], "oneOf": [{"minLength": 2}, {"type": "integer"}]}}
    assert _wrong(schemas, "ab") == []
    for value in ("a", 7):
        assert _wrong(schemas, value) == [" is nothing that is allowed there"]


def test_only_so_much_is_told() -> None:
    schemas = {"Input": {"required": [f"field{number}" for number in range(50)], "enum": ["x" * 1000] * 20}}
    assert len(_wrong(schemas, {}, most=3)) == 3
    choices = next(one for one in _wrong(schemas, {}, most=99) if "one of" in one)
    assert choices == f" has to be one of: {', '.join([f'{chr(120) * 60}…'] * 10)}, …"
    long = {"Input": {"properties": {"x" * 1000: {"type": "null"}}}}
    assert _wrong(long, {"x" * 1000: 1}) == [f"{'x' * 60}… has to be null"]


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        False,
        [],
        {"type": "file"},
        {"type": ["string", 7]},
        {"type": [["string"]]},
        {"type": {}},
        {"enum": []},
        {"enum": [{"a": 1}]},
        {"enum": "x"},
        {"required": [1]},
        {"required": "x"},
        {"properties": []},
        {"items": [{"type": "null"}]},
        {"allOf": {}},
        {"anyOf": []},
        {"not": {}},
        {"minimum": "9", "maximum": None, "minLength": 1.5, "exclusiveMinimum": True, "maxItems": False},
        {"multipleOf": 0, "uniqueItems": True, "const": 1, "patternProperties": {"(a+)+$": False}},
        {"additionalProperties": False, "propertyNames": False, "dependentRequired": {"x": ["y"]}},
        {"if": True, "then": False, "unevaluatedProperties": False, "contains": False, "prefixItems": [False]},
        {"$ref": "https://evil.test/schema", "type": "null"},
        {"$ref": "file:///schema.json"},
        {"$ref": "#/components/schemas/Nowhere"},
        {"$ref": "#/components/schemas/Input"},
        {"$ref": "Input"},
        {"$ref": 7},
        {"$dynamicRef": "https://evil.test/x", "$id": "https://evil.test/y", "$schema": "https://evil.test/z"},
        {"$recursiveRef": "#", "$anchor": "x", "$defs": {}},
        {"allOf": [{"$ref": "#/components/schemas/Input"}] * 2, "anyOf": [{"$ref": "#/components/schemas/Input"}] * 2},
    ],
)
def test_what_is_not_understood_of_a_schema_says_nothing(schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    for value in ({}, {"x": 1}, [1, 1], "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", 1, None):
        assert _wrong({"Input": schema}, value) == []


def _bomb(width: int, depth: int) -> dict[str, Any]:
    schemas = {f"S{n}": {"anyOf": [{"$ref": f"#/components/schemas/S{n + 1}"}] * width} for n in range(depth)}
    return {**schemas, f"S{depth}": {"type": "null"}, "Input": {"$ref": "#/components/schemas/S0"}}


def test_a_schema_that_blows_up_is_cut_down() -> None:
    for schemas in (_bomb(10, 20), _bomb(2, 1000), _bomb(3000, 3)):
        schema, nodes = plain(schemas, "Input")
        assert nodes <= 30 * MAX_NODES
        assert len(json.dumps(schema)) < 1 << 20
        assert errors(schema, "x", most=9) == []
    assert _wrong(_bomb(2, 4), "x") != []
    wide = {
        "Input": {
            "properties": {str(n): {"properties": {str(m): {"type": "null"} for m in range(100)}} for n in range(9999)}
        }
    }
    assert plain(wide, "Input")[1] <= 3 * MAX_NODES


def test_validating_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"anyOf": [{"type": "object", "minItems": n} for n in range(1000)]}
    schemas = {"Input": {"properties": {"first": {"type": "null"}, "x": {"type": "array", "items": choices}}}}
    assert _wrong(schemas, {"first": 1, "x": [1] * 100_000}) == ["first has to be null"]
    assert _wrong({"Input": {"items": {}}}, [1] * 1_000_000) == []
    assert _wrong({"Input": {"required": [str(n) for n in range(4000)]}}, {}, most=5000) != []
    monkeypatch.setattr(json_schema, "MAX_STEPS", 0)
    assert _wrong(FLUX, {}) == []


_names = st.sampled_from(["a", "b", "Input"])
_scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text("ab", max_size=2)
_keys = st.sampled_from(
    [
        *("type", "enum", "required", "properties", "items", "allOf", "anyOf", "oneOf", "nullable", "$ref", "not"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems"),
        *("maxItems", "pattern", "$id", "const"),
    ]
)
_junk = st.recursive(
    _scalars | st.sampled_from(["string", "object", "array", "integer", "#/components/schemas/a", "https://x.test/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys | _names, inner, max_size=5),
    max_leaves=20,
)
_values = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3))


@given(schemas=st.dictionaries(_names, _junk, max_size=3), value=_values)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_schema_and_no_value_break_it(schemas: dict[str, Any], value: Any) -> None:
    schema, nodes = plain(schemas, "Input")
    assert nodes < 10 * MAX_NODES
    for path, what in errors(schema, value, most=3):
        assert all(isinstance(one, str) for one in path)
        assert what


def _schema_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["string", "object", "array", "integer", "number", "null"]),
            "enum": st.lists(_scalars, min_size=1, max_size=3),
            "required": st.lists(_names, max_size=2, unique=True),
            "properties": st.dictionaries(_names, inner, max_size=3),
            "items": inner,
            "allOf": lists,
            "anyOf": lists,
            "oneOf": lists,
            "minimum": st.integers(-2, 2),
            "maximum": st.integers(-2, 2),
            "minLength": st.integers(0, 2),
            "maxItems": st.integers(0, 2),
            "not": inner,
            "pattern": st.just("^a"),
            "additionalProperties": inner,
            "uniqueItems": st.booleans(),
        },
    )


_schemas: st.SearchStrategy[dict[str, Any]] = st.recursive(st.just({}), _schema_of, max_leaves=8)


@given(schema=_schemas, value=_values)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_is_wrong_that_the_schema_itself_takes(schema: dict[str, Any], value: Any) -> None:
    if Draft202012Validator(schema).is_valid(value):
        assert _wrong({"Input": schema}, value) == []
