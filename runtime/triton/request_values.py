"""Checks of single request values; every refusal names the value, what it was and what is allowed."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

import numpy as np

from trtforge.errors import RequestError

_INTEGER = re.compile(r"[+-]?\d{1,32}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def refusal(name: str, shown: str, allowed: str) -> RequestError:
    """The error for a value that is not allowed; `shown` describes it and is not itself unbounded."""
    return RequestError(f"{name} is {shown}: it has to be {allowed}")


def shorten(value: object) -> str:
    """A bounded way to show any value."""
    return reprlib.repr(value)


def text(name: str, value: object) -> str:
    """Text as Triton gives it (bytes) or as JSON does."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise refusal(name, shorten(value), "text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 at byte {error.start}: it has to be UTF-8 text") from None


def json_value(name: str, source: str) -> Any:
    """The JSON in `source`: no key twice, only text that can be encoded."""
    try:
        value = json.loads(source, object_pairs_hook=_object)
        # JSON can escape half a surrogate pair, which no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise RequestError(f"{name} is nested too deeply: it has to be plain JSON") from None
    except UnicodeEncodeError:
        raise RequestError(f"{name} has half a surrogate pair: it has to be valid Unicode") from None
    except ValueError as error:
        raise RequestError(f"{name} is not valid JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def integer(name: str, value: object, low: int, high: int, remark: str = "") -> int:
    """A whole number, possibly written as a string."""
    number = int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value
    if type(number) is not int or not low <= number <= high:
        raise refusal(name, shorten(value), f"a whole number from {low} to {high}{remark}")
    return number


def decimal(
    name: str, value: object, *, high: float, allowed: str, low: float = 0.0, low_allowed: bool = True
) -> float:
    """A number from `low` to `high`, possibly written as a string, rounded to float32.

    Rounded, because a tensor would hold it so: both ways of asking have to give the same tokens.
    """
    number = float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value
    # Compared before it is converted: an integer may be too large for a float.
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not low <= number <= high:
        raise refusal(name, shorten(value), f"a number {allowed}")
    rounded = float(np.float32(number))
    if rounded == low and not low_allowed:
        raise refusal(name, shorten(value), f"a number {allowed}")
    return rounded


def boolean(name: str, value: object) -> bool:
    """true or false, possibly written as a string."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise refusal(name, shorten(value), "true or false")
    return value
