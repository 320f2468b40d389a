"""JSON Schema as a model's author wrote it, who may be anyone: nothing in it is fetched, searched for or endless.

Only what Replicate's models are described with is taken over, and all else left out. So a schema can say less than it
did, never more, and no input is wrong that its author takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import create
from referencing import Registry

# Far more than models have; beyond, anything goes.
MAX_NODES = 5_000
MAX_DEPTH = 24

# Of validating, each a microsecond or two.
MAX_STEPS = 100_000

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems")
_MAX_TEXT = 60
_MAX_CHOICES = 10


def plain(schemas: Mapping[str, Any], name: str) -> tuple[dict[str, Any], int]:
    """The schema of this name in `components.schemas` without references, and how many nodes it has."""
    plainer = _Plainer(schemas)
    return plainer.schema(schemas.get(name), MAX_DEPTH), plainer.nodes


class _Plainer:
    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self.nodes = 0

    def schema(self, given: object, depth: int, *, nullable: bool = False) -> dict[str, Any]:
        self.nodes += 1
        if not isinstance(given, dict) or not depth or self.nodes > MAX_NODES:
            return {}
        nullable = nullable or given.get("nullable") is True
        if "$ref" in given:
            # What stands beside it has no meaning in OpenAPI 3.0.
            return self.schema(self._referred(given["$ref"]), depth - 1, nullable=nullable)
        made: dict[str, Any] = {**_numbers(given), **self._scalars(given, nullable)}
        if isinstance(given.get("properties"), dict):
            below = list(islice(given["properties"].items(), MAX_NODES))
            made["properties"] = {name: self.schema(one, depth - 1) for name, one in below}
        if isinstance(given.get("items"), dict):
            made["items"] = self.schema(given["items"], depth - 1)
        both = [self.schema(one, depth - 1, nullable=nullable) for one in self._list(given.get("allOf"))]
        # Of `oneOf`, more may fit here than did.
        for any_of in (self._list(given.get("anyOf")), self._list(given.get("oneOf"))):
            if any_of:
                choices = [self.schema(one, depth - 1) for one in any_of]
                both.append({"anyOf": [*choices, {"type": ["null"]}] if nullable else choices})
        return {**made, "allOf": both} if both else made

    def _referred(self, ref: object) -> object:
        name = ref.removeprefix("#/components/schemas/") if isinstance(ref, str) else None
        return None if name is None or name == ref else self._schemas.get(name)

    def _scalars(self, given: Mapping[str, Any], nullable: bool) -> dict[str, Any]:
        made: dict[str, Any] = {}
        types = given.get("type")
        types = [types] if isinstance(types, str) else self._list(types)
        if types and all(one in _TYPES for one in types):
            made["type"] = [*types, "null"] if nullable else types
        choices = self._list(given.get("enum"))
        if choices and all(one is None or isinstance(one, (str, int, float)) for one in choices):
            made["enum"] = [*choices, None] if nullable else choices
        required = self._list(given.get("required"))
        if all(isinstance(one, str) for one in required):
            made["required"] = list(dict.fromkeys(required))
        return made

    def _list(self, given: object) -> list[Any]:
        if not isinstance(given, list) or self.nodes + len(given) > MAX_NODES:
            return []
        self.nodes += len(given)
        return given


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: given[name] for name in _NUMBERS if type(given.get(name)) in (int, float)}
    made |= {name: given[name] for name in _LENGTHS if type(given.get(name)) is int}
    for name in ("minimum", "maximum"):
        # OpenAPI 3.0: true makes the bound next to it exclusive.
        if given.get(f"exclusive{name.capitalize()}") is True and name in made:
            made[f"exclusive{name.capitalize()}"] = made.pop(name)
    return made


class _TooMuch(Exception):
    pass


_counting = threading.local()

_Keyword = Callable[[Any, Any, Any, Any], Any]


def _counted(keyword: _Keyword) -> _Keyword:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _counting.left -= 1 + sum(len(one) for one in (value, instance) if isinstance(one, (list, dict)))
        if _counting.left < 0:
            raise _TooMuch
        return keyword(validator, value, instance, schema)

    return counted


def _required(_validator: Any, names: list[str], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        yield from (ValidationError("", path=(name,)) for name in names if name not in instance)


_KEYWORDS = (*_NUMBERS, *_LENGTHS, "type", "enum", "properties", "items", "allOf", "anyOf")
_Validator = create(
    meta_schema={},
    validators={
        "required": _counted(_required),
        **{name: _counted(Draft202012Validator.VALIDATORS[name]) for name in _KEYWORDS},
    },
    type_checker=Draft202012Validator.TYPE_CHECKER,
)


def errors(schema: Mapping[str, Any], value: object, *, most: int) -> list[tuple[list[str], str]]:
    """Where `value` is not as a schema from `plain` has it, and what it has to be there: so many at most, and only what
    is found within `MAX_STEPS`."""
    _counting.left = MAX_STEPS
    found: list[tuple[list[str], str]] = []
    try:
        for error in _Validator(schema, registry=Registry()).iter_errors(value):
            found.append(([_short(one) for one in error.absolute_path], _words(error)))
            if len(found) >= most:
                break
    except _TooMuch:
        pass
    return found


_BOUNDS = {
    "minimum": "has to be at least {}",
    "maximum": "has to be at most {}",
    "exclusiveMinimum": "has to be more than {}",
    "exclusiveMaximum": "has to be less than {}",
    "minLength": "needs at least {} characters",
    "maxLength": "may have at most {} characters",
    "minItems": "needs at least {} elements",
    "maxItems": "may have at most {} elements",
}


def _words(error: ValidationError) -> str:
    keyword, value = str(error.validator), cast(Any, error.validator_value)
    match keyword:
        case "required":
            return "is missing"
        case "type":
            return f"has to be {' or '.join(value)}"
        case "enum":
            more = ["…"] if len(value) > _MAX_CHOICES else []
            return f"has to be one of: {', '.join([*map(_short, value[:_MAX_CHOICES]), *more])}"
        case "anyOf":
            return "is nothing that is allowed there"
    return _BOUNDS[keyword].format(_short(value))


def _short(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
