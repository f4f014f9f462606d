"""Tracing: a model's Python code becomes an ONNX graph over packed tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

from trtforge import wire
from trtforge.builder.hooks import Hooks, Step
from trtforge.builder.torch_ops import translation_table
from trtforge.errors import ExportError
from trtforge.manifest import LayerCache

OPSET = 23  # RotaryEmbedding came with it; onnxscript's optimizer knows nothing newer
WEIGHT_PREFIX = "hf."  # of the initializers' names: the attribute that holds the model

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Sizes of the traced example; 0 and 1 would become constants of the graph.
_EXAMPLE_SIZES = {"T": 6, "B": 2, "max_blocks": 4, "B_plus_1": 3, "R": 3, "num_blocks": 8, "block_size": 16}


class PackedModel(torch.nn.Module):
    """A causal language model over packed tokens.

    Each token is a batch row of its own, [T, 1], which needs no padding and no transposes; only the
    attention operator, which reaches the cache, knows which tokens belong together.
    """

    def __init__(self, hf: Any, hooks: Hooks) -> None:
        super().__init__()
        self.hf = hf
        self._hooks = hooks

    def forward(self, inputs: dict[str, torch.Tensor], kv_caches: list[torch.Tensor]) -> Any:
        """Inputs as in `wire.GRAPH_INPUTS`; returns logits float32 [R, V] and the caches after the step."""
        logits, step = self.run(inputs, kv_caches)
        return (logits, *step.kv_caches_out)

    def run(self, inputs: dict[str, torch.Tensor], kv_caches: list[torch.Tensor] | None) -> tuple[Any, Step]:
        """One pass; without caches it only finds out which ones are needed."""
        step = Step(
            inputs["block_tables"],
            inputs["cu_seqlens"],
            inputs["context_lens"],
            inputs["slot_mapping"],
            kv_caches,
        )
        self._hooks.step = step
        gathered = []

        def gather_rows(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
            rows = args[0].index_select(0, inputs["logits_indices"])  # [T, 1, hidden] -> [R, 1, hidden]
            gathered.append(rows)
            return rows

        handle = self._output_embeddings().register_forward_pre_hook(gather_rows)
        try:
            logits = self.hf(
                input_ids=inputs["input_ids"][:, None],
                position_ids=inputs["position_ids"][:, None],
                use_cache=False,
            ).logits
        finally:
            handle.remove()
            self._hooks.step = None
        if len(gathered) != 1:
            raise ExportError(f"{self.hf.config.model_type} calls its output embedding {len(gathered)} times")
        return logits.squeeze(1).float(), step

    def _output_embeddings(self) -> torch.nn.Module:
        module = self.hf.get_output_embeddings()
        if not isinstance(module, torch.nn.Module):
            raise ExportError(f"{self.hf.config.model_type} has no output embedding")
        return module


def trace(
    hf: Any, cache_dtype: torch.dtype, on_stage: Callable[[str], None]
) -> tuple[ir.Model, tuple[LayerCache, ...]]:
    """The graph of the meta model `hf` and the caches, of `cache_dtype`, that its layers need.

    Initializers that are weights have no data yet, and their names begin with WEIGHT_PREFIX. Raises
    ExportError if the model cannot be traced or attends in ways that the attention operator does not know.
    """
    with _errors_named(hf):
        return _trace(hf, cache_dtype, on_stage)


def record_attention(hf: Any) -> Step:
    """One pass of the meta model `hf` without a graph: its `layers` and `callers`.

    Raises ExportError for a model that `trace` refuses before it makes a graph.
    """
    with _errors_named(hf):
        _check_layer_types(hf)
        hooks = Hooks(hf)
        packed = PackedModel(hf, hooks).eval()
        with hooks.installed(), torch.no_grad():
            return _record(packed, _example_inputs())


@contextlib.contextmanager
def _errors_named(hf: Any) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # modeling code, torch and its exporter raise nearly everything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not hf._supports_attention_backend:
            reason = f"its attention is not known to go through transformers' attention interface; {reason}"
        raise ExportError(f"{hf.config.model_type} cannot be traced: {reason}") from error


def _trace(
    hf: Any, cache_dtype: torch.dtype, on_stage: Callable[[str], None]
) -> tuple[ir.Model, tuple[LayerCache, ...]]:
    _check_layer_types(hf)
    hooks = Hooks(hf)
    packed = PackedModel(hf, hooks).eval()
    inputs = _example_inputs()
    with hooks.installed(), torch.no_grad():
        layers = tuple(_record(packed, inputs).layers)
        on_stage("trace")
        caches = [_example(_cache_dims(layer), cache_dtype) for layer in layers]
        program = torch.export.export(
            packed, (inputs, caches), dynamic_shapes=_dynamic_shapes(layers), strict=False
        )
        on_stage("translate")
        model = _translate(program, len(layers))
    _name_dims(model, layers)
    _check_inputs(hf, model)
    return model, layers


def _record(packed: PackedModel, inputs: dict[str, torch.Tensor]) -> Step:
    step = packed.run(inputs, None)[1]
    _check_layers(packed.hf, step.layers)
    return step


def _example_inputs() -> dict[str, torch.Tensor]:
    return {tensor.name: _example(tensor.dims, torch.int32) for tensor in wire.GRAPH_INPUTS}


def _example(dims: tuple[str | int, ...], dtype: torch.dtype) -> torch.Tensor:
    sizes = [dim if isinstance(dim, int) else _EXAMPLE_SIZES[dim] for dim in dims]
    return torch.zeros(sizes, dtype=dtype, device="meta")


def _cache_dims(layer: LayerCache) -> tuple[str | int, ...]:
    return ("num_blocks", 2, "block_size", layer.num_kv_heads, layer.head_dim)


def _check_layer_types(hf: Any) -> None:
    """Refuse layers in which tokens meet outside of attention, such as recurrent ones."""
    kinds = getattr(hf.config.get_text_config(decoder=True), "layer_types", None) or []
    unknown = sorted(set(kinds) - _LAYER_TYPES)
    if unknown:
        raise ExportError(
            f"{hf.config.model_type} has layers of type {', '.join(unknown)}; supported are "
            f"{', '.join(sorted(_LAYER_TYPES))}"
        )


def _check_layers(hf: Any, layers: Sequence[LayerCache]) -> None:
    expected = hf.config.get_text_config(decoder=True).num_hidden_layers
    if len(layers) != expected:
        raise ExportError(
            f"{hf.config.model_type} has {expected} layers, but calls transformers' attention interface "
            f"{len(layers)} times; a model with attention of its own cannot be exported"
        )


def _check_inputs(hf: Any, model: ir.Model) -> None:
    """Refuse a model that counts positions itself: it would take each token for the first one."""
    if any(value.name == "position_ids" and not value.uses() for value in model.graph.inputs):
        raise ExportError(f"{hf.config.model_type} does not use the position_ids that it is given")


def _dynamic_shapes(layers: tuple[LayerCache, ...]) -> tuple[Any, Any]:
    sizes = {name: torch.export.Dim(name) for name in _EXAMPLE_SIZES}  # equal names, equal sizes

    def dynamic(dims: tuple[str | int, ...]) -> dict[int, Any]:
        return {axis: sizes[dim] for axis, dim in enumerate(dims) if isinstance(dim, str)}

    inputs = {tensor.name: dynamic(tensor.dims) for tensor in wire.GRAPH_INPUTS}
    return inputs, [dynamic(_cache_dims(layer)) for layer in layers]


def _translate(program: torch.export.ExportedProgram, num_layers: int) -> ir.Model:
    layers = range(num_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        result = torch.onnx.export(
            program,
            input_names=[*(t.name for t in wire.GRAPH_INPUTS), *(wire.kv_cache_input(i) for i in layers)],
            output_names=[wire.LOGITS, *(wire.kv_cache_output(i) for i in layers)],
            dynamo=True,
            optimize=False,  # it would read weights, which are not there
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    if result is None:
        raise ExportError("torch.onnx.export returned no program")
    return result.model


def _name_dims(model: ir.Model, layers: tuple[LayerCache, ...]) -> None:
    """Call the symbolic dims of all values what `wire` calls them in the inputs."""
    declared = [tensor.dims for tensor in wire.GRAPH_INPUTS] + [_cache_dims(layer) for layer in layers]
    names: dict[str | None, str] = {}
    for value, dims in zip(model.graph.inputs, declared, strict=True):
        for traced, dim in zip(value.shape, dims, strict=True):
            if isinstance(dim, str):
                names[traced.value] = dim
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else names.get(dim.value, dim.value) for dim in value.shape
            )
