"""What the answer has to look like, as both conventions write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from trtforge.errors import RequestError
from trtforge.runtime.request import GuidedDecoding, GuidedKind
from trtforge.runtime.triton import request_values as values

MAX_GUIDE_BYTES = 64 * 1024
MAX_CHOICES = 1024

JSON_KEYS = ("guided_decoding", "structured_outputs")  # vLLM's older and newer name
_TYPE, _GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
# TensorRT-LLM's guide types and vLLM's keys.
_TYPES: dict[str, GuidedKind] = {
    "json": "json",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf_grammar": "ebnf",
    "choice": "choice",
}
_KEYS: dict[str, GuidedKind] = {
    "json": "json_schema",
    "json_object": "json",
    "regex": "regex",
    "grammar": "ebnf",
    "choice": "choice",
}


def from_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> GuidedDecoding | None:
    """The guide in the two tensors of the TensorRT-LLM convention; None without them."""
    if _TYPE not in tensors:
        if _GUIDE in tensors:
            raise RequestError(f"{_GUIDE} is given without {_TYPE}: it has to be one of {', '.join(_TYPES)}")
        return None
    kind = values.text(_TYPE, tensors[_TYPE][0])
    if kind not in _TYPES:
        raise values.refusal(_TYPE, values.shorten(kind), f"one of {', '.join(_TYPES)}")
    return _guide(_GUIDE, _TYPES[kind], values.text(_GUIDE, tensors[_GUIDE][0]) if _GUIDE in tensors else "")


def from_json(source: str, value: object) -> GuidedDecoding:
    """The guide in a JSON object of the vLLM convention, which has exactly one key."""
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= set(_KEYS):
        shown = f"an object with {values.shorten(sorted(value))}" if isinstance(value, dict) else "none"
        raise values.refusal(source, shown, f"an object with exactly one of {', '.join(_KEYS)}")
    ((key, guide),) = value.items()
    source = f"{source}.{key}"
    if key == "json_object":
        if not values.boolean(source, guide):
            raise values.refusal(source, "false", "true or left out")
        return GuidedDecoding("json")
    if not isinstance(guide, str) and key in ("json", "choice"):
        guide = json.dumps(guide, ensure_ascii=False)
    return _guide(source, _KEYS[key], values.text(source, guide))


def _guide(source: str, kind: GuidedKind, guide: str) -> GuidedDecoding:
    num_bytes = len(guide.encode())
    if num_bytes > MAX_GUIDE_BYTES:
        raise values.refusal(source, f"{num_bytes} bytes", f"at most {MAX_GUIDE_BYTES} bytes")
    if kind == "json":
        if guide:
            raise values.refusal(source, values.shorten(guide), "empty: use json_schema for a schema")
    elif not guide:
        raise values.refusal(source, "empty", f"a guide of the kind {kind}")
    if kind == "json_schema" and not isinstance(values.json_value(source, guide), (dict, bool)):
        raise values.refusal(source, values.shorten(guide), "a JSON schema, which is an object")
    if kind == "choice":
        _check_choices(source, values.json_value(source, guide))
    return GuidedDecoding(kind, guide)


def _check_choices(source: str, choices: object) -> None:
    if not isinstance(choices, list) or not 0 < len(choices) <= MAX_CHOICES:
        shown = f"{len(choices)} choices" if isinstance(choices, list) else values.shorten(choices)
        raise values.refusal(source, shown, f"a JSON list of 1 to {MAX_CHOICES} strings")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise values.refusal(source, f"a list with {values.shorten(choice)}", "made of strings with text")
