"""Input tensors as Triton gives them, and what is parsed out of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trtforge import wire
from trtforge.runtime.request import GenerationRequest, SamplingParams
from trtforge.runtime.triton.requests import ResponseOptions, parse_request
from trtforge.runtime.triton.sampling_values import ModelLimits

LIMITS = ModelLimits(vocab_size=1000, max_model_len=2048)
DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
TENSOR_DTYPES = {spec.name: DTYPES[spec.data_type] for spec in wire.REQUEST_TENSORS}


class Lengths:
    """A tokenizer: each word is its length, with 100 added after a space."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        words = text.lstrip(" ").split(" ")
        return tuple(
            len(word) + 100 * (i > 0 or text.startswith(" ")) + 500 * add_special_tokens
            for i, word in enumerate(words)
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        return tuple(len(message["role"]) for message in messages)


TOKENIZER = Lengths()


def tensors(**values: Any) -> dict[str, npt.NDArray[Any]]:
    """Input tensors as Triton gives them; text_input is "Hi" unless another prompt is given."""
    if not {"text_input", "input_ids", "messages"} & set(values):
        values["text_input"] = "Hi"
    arrays = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        arrays[name] = np.array(items, dtype=TENSOR_DTYPES[name])
    return arrays


def parse(**values: Any) -> tuple[GenerationRequest, ResponseOptions]:
    return parse_request("7", tensors(**values), LIMITS, TOKENIZER)


def sampling(**values: Any) -> SamplingParams:
    return parse(**values)[0].sampling


def from_json(**parameters: Any) -> SamplingParams:
    return sampling(sampling_parameters=json.dumps(parameters))
