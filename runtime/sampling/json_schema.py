"""What xgrammar 0.2.8 makes of JSON schemas without a word, and answers would be wrong with.

It ignores the keywords below, and it allows characters in strings that JSON does not; both was seen with
instances that it takes. Annotations and unknown formats say nothing about validity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from trtforge.errors import RequestError

MAX_DEPTH = 64  # compile time grows with its square: 14 s for 300 nested objects

_IGNORED = {
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
}
_NEED_TYPE = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
}
# With one of these, the keywords about the value itself are ignored.
_EXCLUSIVE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_ABOUT_VALUE = _NEED_TYPE | {
    "properties",
    "patternProperties",
    "additionalProperties",
    "propertyNames",
    "required",
    "items",
    "prefixItems",
    "format",
    *_EXCLUSIVE,
}
# In a pattern these would appear in the JSON as they are: quotes, backslashes and control characters.
_UNESCAPED = re.compile(r'["\x00-\x1f]|\\[\\nrtfv0xuc]')
# The rule for the characters of a string with minLength or maxLength, in the grammar of a schema.
_BOUNDED_STRING = re.compile(r'^(\w+ ::= )\(\(\[\^\\"\\\\\\r\\n\]\)\)$', re.MULTILINE)
_STRING_CHARACTERS = r"[^\0-\x1f\"\\]"
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = (
    "items",
    "additionalItems",
    "unevaluatedItems",
    "additionalProperties",
    "unevaluatedProperties",
    "prefixItems",
    "anyOf",
    "oneOf",
    "allOf",
)


def check_json_schema(text: str) -> None:
    """Raise RequestError for text that is no JSON, nested too deeply, or says what would be ignored."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"guided json_schema: the guide is not valid JSON: {error}") from None
    _check(schema, "#", 0)


def without_control_characters(grammar: str) -> str:
    """xgrammar's text of a schema's grammar, without control characters in strings of bounded length."""
    return _BOUNDED_STRING.sub(lambda match: match[1] + _STRING_CHARACTERS, grammar)


def _check(schema: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(f"guided json_schema: nested more than {MAX_DEPTH} schemas deep")
    if not isinstance(schema, dict):
        return  # true, false, or an error that the library names
    for problem in _problems(schema):
        raise RequestError(f"guided json_schema: {path}: {problem}")
    for key in _MAPS_OF_SCHEMAS:
        if isinstance(schema.get(key), dict):
            for name, inner in schema[key].items():
                _check(inner, f"{path}/{key}/{name}", depth + 1)
    for key in _SCHEMAS:
        inner = schema.get(key)
        for one in inner if isinstance(inner, list) else [inner]:
            _check(one, f"{path}/{key}", depth + 1)


def _problems(schema: dict[str, Any]) -> Iterator[str]:
    for key in sorted(_IGNORED & schema.keys()):
        yield f"{key} is not supported"
    if schema.get("uniqueItems"):
        yield "uniqueItems is not supported"
    if "multipleOf" in schema and schema.get("type") != "integer":
        yield "multipleOf is supported for type integer only"
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        yield "allOf of more than one schema is not supported; merge them"
    yield from _problems_together(schema)
    yield from _problems_of_patterns_and_names(schema)


def _problems_together(schema: dict[str, Any]) -> Iterator[str]:
    exclusive = next((key for key in _EXCLUSIVE if key in schema), None)
    if exclusive:
        for key in sorted((_ABOUT_VALUE & schema.keys()) - {exclusive}):
            yield f"{key} beside {exclusive} is not supported"
    elif "type" not in schema:
        for key in sorted(_NEED_TYPE & schema.keys()):
            yield f"{key} needs a type beside it"
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        yield "minLength and maxLength beside pattern are not supported"


def _problems_of_patterns_and_names(schema: dict[str, Any]) -> Iterator[str]:
    patterns = [schema.get("pattern"), *_names(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str) and _UNESCAPED.search(pattern):
            yield f"pattern {pattern!r} has characters that JSON escapes, which is not supported"
    required, properties = schema.get("required"), schema.get("properties")
    if isinstance(required, list) and isinstance(properties, dict):
        for name in required:
            if name not in properties:
                yield f"required property {name!r} is not among its properties"


def _names(schemas: Any) -> list[str]:
    return list(schemas) if isinstance(schemas, dict) else []
