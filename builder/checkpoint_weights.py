"""Where a checkpoint has the weights of a model.

Transformers keeps, for each model type, how names and layouts of checkpoint tensors become those of its
modules (one tensor an expert becomes one tensor a layer, for instance). The same rules are followed here,
but on byte ranges: a weight is the concatenation of pieces of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trtforge.builder.checkpoint import Checkpoint, TensorEntry
from trtforge.builder.quantization.experts import join_experts
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear
from trtforge.builder.weights import WeightSource
from trtforge.errors import ExportError

_Stored: TypeAlias = TensorEntry | QuantizedLinear | ComputedWeight  # each has a shape


def locate_weights(hf: Any, checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """Where each parameter and persistent buffer of the meta model `hf` is, by its name in the model.

    Parameters that the model ties and the checkpoint stores twice, with different values, are untied in
    `hf`, as transformers does when it loads them. Raises ExportError for parameters that the checkpoint
    lacks, has in another shape or in a layout that is not known here.
    """
    sources = _follow_rules(hf, checkpoint)
    _untie(hf, sources)
    aliases = _aliases(hf)
    for name, names in aliases.items():
        found = next((alias for alias in names if alias in sources), None)
        if found is not None:
            sources.setdefault(name, sources[found])
    state = hf.state_dict()
    missing = sorted(aliases.keys() - sources.keys(), key=dot_natural_key)
    if missing:
        raise ExportError(
            f"the checkpoint in {checkpoint.path} lacks {len(missing)} of the model's weights: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    for name, source in sources.items():
        if source.shape != tuple(state[name].shape):
            raise ExportError(
                f"{name} has shape {list(source.shape)} in the checkpoint, but config.json makes it "
                f"{list(state[name].shape)}"
            )
    return sources


def _follow_rules(hf: Any, checkpoint: Checkpoint) -> dict[str, WeightSource]:
    state = hf.state_dict()
    rules = get_model_conversion_mapping(hf)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    plain: dict[str, WeightSource] = {}
    split: dict[str, dict[str, list[_Stored]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted([*checkpoint.tensors, *checkpoint.quantized], key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, hf.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if target not in state:
            continue
        stored = checkpoint.quantized.get(key)
        if pattern is not None:
            split[target][pattern].append(stored or checkpoint.tensors[key])
        elif stored is not None:
            plain[target] = WeightSource(target, stored.shape, (), stored)
        else:
            entry = checkpoint.tensors[key]
            plain[target] = WeightSource(target, entry.shape, (entry,))
    for target, groups in split.items():
        rule = by_pattern[next(iter(groups))]
        plain[target] = _merge(hf.config.model_type, target, rule, groups)
    return plain


def _merge(
    model_type: str, target: str, rule: WeightConverter, groups: Mapping[str, list[_Stored]]
) -> WeightSource:
    """One weight out of one tensor, or several to be concatenated, an expert."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    stack = [(MergeModulelist, 0)]
    lists = [groups[pattern] for pattern in rule.source_patterns if pattern in groups]
    if operations not in (stack, [*stack, (Concatenate, 1)]) or len({len(entries) for entries in lists}) != 1:
        raise ExportError(f"{model_type}: the layout of {target} in the checkpoint is not supported")
    experts = list(zip(*lists, strict=True))
    shapes = {tuple(entry.shape for entry in expert) for expert in experts}
    if len(shapes) != 1:
        raise ExportError(f"{target}: the experts in the checkpoint differ in shape: {sorted(shapes)}")
    (parts,) = shapes
    shape = (len(experts), sum(part[0] for part in parts), *parts[0][1:])
    stored = [entry for expert in experts for entry in expert]
    pieces = tuple(entry for entry in stored if isinstance(entry, TensorEntry))
    if len(pieces) == len(stored):
        return WeightSource(target, shape, pieces)
    computed = next((entry for entry in stored if isinstance(entry, ComputedWeight)), None)
    if pieces or computed is not None:
        reason = "only some are quantized" if computed is None else computed.reason
        raise ExportError(f"{target}: the experts in the checkpoint are not supported: {reason}")
    linears = [[part for part in expert if isinstance(part, QuantizedLinear)] for expert in experts]
    return WeightSource(target, shape, (), join_experts(target, linears))


def _aliases(hf: Any) -> dict[str, list[str]]:
    """For each parameter's name the names of all parameters tied to it, itself included."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: names for names in groups.values() for name in names}


def _untie(hf: Any, sources: Mapping[str, WeightSource]) -> None:
    for name, names in _aliases(hf).items():
        stored = [alias for alias in names if alias in sources]
        if name in stored[1:] and not _equal(sources[name], sources[stored[0]]):
            module_name, _, attribute = name.rpartition(".")
            module = hf.get_submodule(module_name)
            setattr(module, attribute, torch.nn.Parameter(torch.empty_like(getattr(module, attribute))))


def _equal(one: WeightSource, other: WeightSource) -> bool:
    if one.shape != other.shape or one.quantized or other.quantized:
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))
