"""Checkpoints whose experts are quantized already, each on its own: joined to the stacks of a layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from quantized_layouts import FORMATS, Stored, Tensors, bitsandbytes_nf4, int8_channel, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.checkpoint_weights import locate_weights
from trtforge.builder.export import divide, trace_checkpoint
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.sharding.split import Parallelism
from trtforge.builder.weights import make_tensor
from trtforge.errors import ExportError

Drive = Callable[..., Any]

TEXT = np.random.default_rng(0).integers(128, size=40).tolist()
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gate and up have a block and a half of rows each, and down as many columns."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=256,
        intermediate_size=64,
        moe_intermediate_size=192,
        num_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def stacked(weights: Tensors) -> dict[str, torch.Tensor]:
    """Weights by their names in the model, which has the experts of a layer in two tensors."""
    named = {name: weight for name, weight in weights.items() if not name.startswith(EXPERTS)}
    gate, up, down = (
        torch.stack([weights[f"{EXPERTS}.{number}.{part}_proj.weight"] for number in range(3)])
        for part in ("gate", "up", "down")
    )
    return named | {f"{EXPERTS}.gate_up_proj": torch.cat([gate, up], 1), f"{EXPERTS}.down_proj": down}


def located(model: Path) -> Mapping[str, Any]:
    checkpoint = Checkpoint.open(str(model))
    return locate_weights(build_meta_model(checkpoint.config, torch.float32), checkpoint)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("gptq-act-order", "modelopt-awq")])
def test_experts_are_joined_with_their_numbers(tiny_experts: Path, tmp_path: Path, name: str) -> None:
    settings, store, kind = FORMATS[name]
    weights = stacked(quantize(tiny_experts, tmp_path / "model", settings, store))
    sources = located(tmp_path / "model")
    for part in ("gate_up_proj", "down_proj"):
        experts = sources[f"{EXPERTS}.{part}"].quantized
        expected = weights[f"{EXPERTS}.{part}"]
        assert isinstance(experts, QuantizedExperts)
        assert (experts.format, experts.shape) == (kind, tuple(expected.shape))
        np.testing.assert_allclose(experts.dequantize(), expected, rtol=1e-6, atol=1e-7)


# Input features of down, 192, that the first of two ranks has: whole groups, and whole blocks of scales.
@pytest.mark.parametrize(("name", "columns"), [("gptq", 96), ("deepseek-fp8", 128)])
def test_runtimes_compute_with_the_experts_of_the_checkpoint(
    tiny_experts: Path,
    tmp_path: Path,
    drive: Drive,
    make_threaded_ranks: Callable[..., Any],
    name: str,
    columns: int,
) -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    settings, store, kind = FORMATS[name]
    weights = stacked(quantize(tiny_experts, tmp_path / "model", settings, store))
    traced = trace_checkpoint(Checkpoint.open(str(tmp_path / "model")), "float32", lambda _: None)
    hf = AutoModelForCausalLM.from_pretrained(tiny_experts, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, weight in weights.items():
            hf.get_parameter(key).copy_(weight)
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    for tp in (1, 2):
        ranks = divide(traced, Parallelism(tp), None, "plugin").ranks
        made = {choice.name: choice for choice in ranks[0].weights}
        up, down = made[f"{EXPERTS}.gate_up_proj"], made[f"{EXPERTS}.down_proj"]
        assert up.kind == down.kind == kind
        assert up.reason == down.reason == f"from the checkpoint ({settings['quant_method']})"
        assert down.shape == (3, 256, 192 if tp == 1 else columns)
        driver = drive(make_threaded_ranks(ranks, tp, tmp_path / str(tp), 16, 8))
        logits = driver.run([{"a": TEXT}])["a"]
        assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("settings", "store", "said"),
    [
        (*FORMATS["gptq-act-order"][:2], r"an order of their own \(desc_act\)"),
        (*FORMATS["modelopt-awq"][:2], r"their inputs have scales \(pre_quant_scale\)"),
        ({"quant_method": "bitsandbytes"}, bitsandbytes_nf4, "nf4 of bitsandbytes is a table, not a scale"),
    ],
)
def test_experts_that_have_no_place_in_a_stack_are_refused(
    tiny_experts: Path, tmp_path: Path, settings: Any, store: Callable[[np.ndarray], Stored], said: str
) -> None:
    quantize(tiny_experts, tmp_path / "model", settings, store)
    with pytest.raises(ExportError, match=rf"{EXPERTS}\.\w+_proj: the experts .* not supported: .*{said}"):
        located(tmp_path / "model")


def test_experts_in_one_quantized_tensor_are_refused(tiny_experts: Path, tmp_path: Path) -> None:
    """As transformers saves a model that it has loaded."""
    settings, store, _ = FORMATS["deepseek-fp8"]
    quantize(tiny_experts, tmp_path / "model", settings, store)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    experts = [tensors.pop(f"{EXPERTS}.{number}.down_proj.weight") for number in range(3)]
    tensors[f"{EXPERTS}.down_proj"] = torch.stack(experts)
    save_file(tensors, file)
    with pytest.raises(ExportError, match=rf"{EXPERTS}.down_proj is stored as F8_E4M3"):
        make_tensor(ir.DataType.FLOAT, located(tmp_path / "model")[f"{EXPERTS}.down_proj"])


def test_experts_that_are_quantized_in_different_ways_are_refused(tiny_experts: Path, tmp_path: Path) -> None:
    settings, store, _ = FORMATS["compressed-fp8"]
    quantize(tiny_experts, tmp_path / "model", settings, store)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    prefix = f"{EXPERTS}.1.down_proj"
    integers = int8_channel(tensors[f"{prefix}.weight"].float().numpy())
    save_file(tensors | {f"{prefix}.{part}": value for part, value in integers.tensors.items()}, file)
    with pytest.raises(ExportError, match=r"down_proj: .* quantized in different ways"):
        located(tmp_path / "model")
    del tensors[f"{prefix}.weight_scale"]
    tensors[f"{prefix}.weight"] = tensors[f"{prefix}.weight"].float()
    save_file(tensors, file)
    with pytest.raises(ExportError, match=r"down_proj: .* only some are quantized"):
        located(tmp_path / "model")
