"""Names, dtypes and dims of every tensor that crosses a boundary, declared once.

Two boundaries exist: the model graph (builder writes it, every runtime executes it) and the Triton
model (config.pbtxt is generated from these tables, the adapter parses and the clients send them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# --------------------------------------------------------------------------- the model graph
# T tokens of B sequences are packed on one axis; R rows of logits are asked for.


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """One input of the packed graph. `dims` holds symbolic names and fixed sizes."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]


GRAPH_INPUTS: tuple[GraphTensor, ...] = (
    GraphTensor("input_ids", "int32", ("T",)),
    GraphTensor("position_ids", "int32", ("T",)),
    GraphTensor("block_tables", "int32", ("B", "max_blocks")),
    GraphTensor("cu_seqlens", "int32", ("B_plus_1",)),
    # Tokens of each sequence that attention sees, the new ones included.
    GraphTensor("context_lens", "int32", ("B",)),
    # Flat cache slot (block * block_size + offset) of every new token; negative: do not store.
    GraphTensor("slot_mapping", "int32", ("T",)),
    # Rows of the token axis whose logits are wanted.
    GraphTensor("logits_indices", "int32", ("R",)),
)
LOGITS = "logits"  # float32 [R, vocab_size]; with tensor parallelism [R, the rank's columns]
# What crosses from one pipeline stage to the next, [T, hidden_size] in the model's dtype: an output of all
# stages but the last, which they have in place of logits, and an input of all but the first.
HIDDEN_STATES_OUT = "hidden_states_out"
HIDDEN_STATES = "hidden_states"


def stage_inputs(*, is_first: bool, is_last: bool) -> tuple[str, ...]:
    """Names of the inputs that a pipeline stage's graph has besides its caches, in its order.

    A stage that is not the first begins with hidden states and sees no token ids; one that is not the last
    computes no logits.
    """
    names = [tensor.name for tensor in GRAPH_INPUTS]
    if not is_first:
        names[names.index("input_ids")] = HIDDEN_STATES
    if not is_last:
        names.remove("logits_indices")
    return tuple(names)


def stage_output(*, is_last: bool) -> str:
    """Name of what a pipeline stage computes."""
    return LOGITS if is_last else HIDDEN_STATES_OUT


# The caches of a rank's graph are numbered from 0, whichever layers of the model they belong to.


def kv_cache_input(layer: int) -> str:
    """Name of a layer's cache input, [num_blocks, 2, block_size, num_kv_heads, head_dim]."""
    return f"kv_cache.{layer}"


def kv_cache_output(layer: int) -> str:
    """Name of the same cache after the step; runtimes bind it to the input's memory."""
    return f"kv_cache_out.{layer}"


# --------------------------------------------------------------------------- the Triton model


@dataclass(frozen=True, slots=True)
class TritonTensor:
    """One tensor of the served model; `data_type` is Triton's name without the TYPE_ prefix."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


# Exactly one of text_input, input_ids and messages has to be given. Names follow the TensorRT-LLM
# ensemble, the vLLM backend (sampling_parameters, return_finish_reason ...) and the plain token interface
# (input_ids). messages is a JSON list of {"role", "content"}: the server applies the chat template.
# What each one means is written in docs/requests.md.
REQUEST_TENSORS: tuple[TritonTensor, ...] = (
    TritonTensor("text_input", "STRING"),
    TritonTensor("input_ids", "INT32", (-1,)),
    TritonTensor("messages", "STRING"),
    TritonTensor("max_tokens", "INT32"),
    TritonTensor("min_tokens", "INT32"),
    TritonTensor("min_length", "INT32"),
    TritonTensor("temperature", "FP32"),
    TritonTensor("top_k", "INT32"),
    TritonTensor("top_p", "FP32"),
    TritonTensor("min_p", "FP32"),
    TritonTensor("typical_p", "FP32"),
    TritonTensor("repetition_penalty", "FP32"),
    TritonTensor("presence_penalty", "FP32"),
    TritonTensor("frequency_penalty", "FP32"),
    TritonTensor("no_repeat_ngram_size", "INT32"),
    TritonTensor("bad_words", "STRING", (-1,)),
    TritonTensor("embedding_bias_words", "STRING", (-1,)),
    TritonTensor("embedding_bias_weights", "FP32", (-1,)),
    TritonTensor("seed", "UINT64"),
    TritonTensor("random_seed", "UINT64"),
    TritonTensor("stop_words", "STRING", (-1,)),
    TritonTensor("end_id", "INT32"),
    TritonTensor("pad_id", "INT32"),
    TritonTensor("num_return_sequences", "INT32"),
    TritonTensor("beam_width", "INT32"),
    TritonTensor("length_penalty", "FP32"),
    TritonTensor("guided_decoding_guide_type", "STRING"),
    TritonTensor("guided_decoding_guide", "STRING"),
    TritonTensor("sampling_parameters", "STRING"),
    TritonTensor("priority", "INT32"),
    TritonTensor("timeout_ms", "INT32"),
    TritonTensor("cache_salt", "STRING"),
    TritonTensor("stream", "BOOL"),
    TritonTensor("exclude_input_in_output", "BOOL"),
    TritonTensor("return_finish_reason", "BOOL"),
    TritonTensor("return_num_input_tokens", "BOOL"),
    TritonTensor("return_num_output_tokens", "BOOL"),
    TritonTensor("return_num_cached_tokens", "BOOL"),
    TritonTensor("return_log_probs", "BOOL"),
    TritonTensor("return_cumulative_logprob", "BOOL"),
    TritonTensor("return_logprobs", "BOOL"),
)

# With stream=true a response holds what one of the answers got since its last response, else all answers.
RESPONSE_TENSORS: tuple[TritonTensor, ...] = (
    TritonTensor("text_output", "STRING", (-1,)),
    TritonTensor("output_ids", "INT32", (-1,)),
    TritonTensor("sequence_index", "INT32", (-1,)),
    TritonTensor("finish_reason", "STRING", (-1,)),
    TritonTensor("num_input_tokens", "INT32", (-1,)),
    TritonTensor("num_output_tokens", "INT32", (-1,)),
    TritonTensor("num_cached_tokens", "INT32", (-1,)),
    TritonTensor("cum_log_probs", "FP32", (-1,)),
    TritonTensor("output_log_probs", "FP32", (-1, -1)),
    TritonTensor("cumulative_logprob", "FP32", (-1,)),
    TritonTensor("logprobs", "STRING", (-1,)),
    TritonTensor("prompt_logprobs", "STRING", (-1,)),
)

# A gRPC stream carries the text of an error but not its code: the model writes the code in front.
# (The header triton_grpc_error, meant for this, lets Triton 2.51 crash when other streams are busy.)
# The codes are Triton's, but for TIMEOUT: the request's own timeout, for which Triton has none.
ErrorCode = Literal["INVALID_ARG", "UNAVAILABLE", "TIMEOUT", "CANCELLED", "INTERNAL"]


def error_text(code: ErrorCode, message: str) -> str:
    """What the model sends as the text of an error."""
    return f"{code}: {message}"


def split_error_text(text: str) -> tuple[ErrorCode | None, str]:
    """Code and message of an error; None for one of Triton's own, which has no code."""
    for code in get_args(ErrorCode):
        if text.startswith(f"{code}: "):
            return code, text[len(code) + 2 :]
    return None, text
