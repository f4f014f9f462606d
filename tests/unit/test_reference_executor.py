"""The reference executor beyond the conformance suite: types, operators, padding, kernels, refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM

from trtforge import wire
from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, PluginError
from trtforge.manifest import DType, LayerCache, Manifest
from trtforge.plugins.launch import Call, Gpu, Kernel, Kernels, Launch, Plan
from trtforge.plugins.op import FLOATS, Attribute, OpSpec, Tensor
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.paged_attention.cases import CASES, TOLERANCE, Case, make_inputs
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.decode_batches import batch_sizes, pad_decode
from trtforge.runtime.executors.kernel_calls import KernelCalls
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.executors.torch_attention import TorchAttention
from trtforge.runtime.executors.torch_graph import Node
from trtforge.runtime.executors.torch_operators import Operators, from_numpy, run_reference

Drive = Callable[..., Any]
Export = Callable[[DType], tuple[Path, Manifest]]
MakeManifest = Callable[..., Manifest]

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape).astype(np.float32))


# --------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_in_16_bits(export_tiny_llama: Export, tiny_llama: Path, drive: Drive, dtype: DType) -> None:
    """About as far from those in float32 as Hugging Face's own in this type."""
    folder, manifest = export_tiny_llama(dtype)
    text = RNG.integers(manifest.model.vocab_size, size=90).tolist()
    executor = ReferenceExecutor(folder, manifest, device=CPU)
    logits = drive(executor, [7, 3, 20]).run([{"a": text[:40]}, {"a": text[40:89]}, {"a": text[89:]}])["a"]
    exact, rounded = (hugging_face_logits(tiny_llama, text, kind) for kind in (torch.float32, dtype))
    assert np.abs(logits - exact).max() < 1.5 * np.abs(rounded - exact).max()


def hugging_face_logits(folder: Path, text: list[int], dtype: Any) -> np.ndarray:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return hf(torch.tensor([text])).logits[0].float().numpy()


def test_padding_of_decodes_changes_nothing(export_tiny_llama: Export, drive: Drive) -> None:
    """Block 0, which padding rows see, is a sequence's own."""
    folder, manifest = export_tiny_llama("float32")
    texts = {name: RNG.integers(manifest.model.vocab_size, size=40).tolist() for name in "abc"}
    executor = ReferenceExecutor(folder, manifest, device=CPU)
    expected = drive(executor, range(20)).run([texts])
    driver = drive(executor, range(20))
    driver.step({name: text[:30] for name, text in texts.items()})
    for position in range(30, 40):
        inputs = driver.inputs({name: [text[position]] for name, text in texts.items()})
        padded = pad_decode(inputs, num_seqs=8, num_blocks=16)
        logits = executor.execute(padded).logits
        assert logits.shape == (8, manifest.model.vocab_size)
        for row, name in zip(logits, texts, strict=False):
            np.testing.assert_allclose(
                row, expected[name][position], rtol=0, atol=2e-5 * np.abs(expected[name]).max()
            )


def test_decode_steps_are_padded_to_few_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(9) == [1, 2, 4, 8, 9]


def test_executor_of_a_model_built_for_it(export_tiny_llama: Export, drive: Drive) -> None:
    """In the memory that the options allow."""
    folder, manifest = export_tiny_llama("float32")
    layout = manifest.kv_cache
    block_bytes = layout.block_size * layout.bytes_per_token
    options = EngineOptions(kv_cache_bytes=5 * block_bytes, swap_bytes=2 * block_bytes)
    executor = create_executor(manifest.model_copy(update={"runtime": "reference"}), folder, options)
    spec = executor.kv_cache_spec()
    assert (spec.block_size, spec.num_blocks, spec.num_host_blocks) == (layout.block_size, 5, 2)
    assert drive(executor).run([{"a": [1, 2, 3]}])["a"].shape == (3, manifest.model.vocab_size)


# --------------------------------------------------------------------------- graphs of few nodes


def save_graph(folder: Path, *nodes: onnx.NodeProto, **initializers: np.ndarray) -> Path:
    """A model.onnx with the inputs and outputs of one layer of one head of 8."""
    cache_dims = ["num_blocks", 2, "block_size", 1, 8]
    inputs = [helper.make_tensor_value_info(t.name, TensorProto.INT32, t.dims) for t in wire.GRAPH_INPUTS]
    inputs.append(helper.make_tensor_value_info(wire.kv_cache_input(0), TensorProto.FLOAT, cache_dims))
    outputs = [helper.make_tensor_value_info(wire.LOGITS, TensorProto.FLOAT, ["R", 128])]
    weights = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    graph = helper.make_graph(list(nodes), "test", inputs, outputs, weights)
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def manifest(make_manifest: MakeManifest) -> Manifest:
    return make_manifest((LayerCache(num_kv_heads=1, head_dim=8),))


def test_argmax_and_rows_that_are_not_finite(tmp_path: Path, manifest: Manifest, drive: Drive) -> None:
    table = RNG.normal(size=(128, 128)).astype(np.float32)
    table[1, 7], table[2, 8], table[3, 9] = np.nan, np.inf, -np.inf
    table[4, [20, 60]] = 99.0
    folder = save_graph(
        tmp_path,
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Gather", ["rows", "logits_indices"], [wire.LOGITS]),
        table=table,
    )
    executor = ReferenceExecutor(folder, manifest, device=CPU)
    outputs = executor.execute(drive(executor).inputs({"a": [0, 1, 2, 3, 4]}))
    np.testing.assert_array_equal(outputs.logits, table[:5])
    assert outputs.argmax is not None
    assert outputs.argmax.dtype == np.int32
    assert outputs.argmax.tolist() == [table[0].argmax(), -1, -1, -1, 20]


@pytest.mark.parametrize(("op_type", "domain"), [("Einsum", ""), ("Pool", "trtforge"), ("Linear", "other")])
def test_unknown_operators_are_refused_by_name(
    tmp_path: Path, manifest: Manifest, op_type: str, domain: str
) -> None:
    folder = save_graph(tmp_path, helper.make_node(op_type, ["input_ids"], [wire.LOGITS], domain=domain))
    with pytest.raises(ConfigError, match=op_type):
        ReferenceExecutor(folder, manifest, device=CPU)


def test_sizes_mixed_with_data_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    folder = save_graph(
        tmp_path,
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Mul", ["shape", "input_ids"], [wire.LOGITS]),
    )
    with pytest.raises(ConfigError, match="Mul of sizes and data"):
        ReferenceExecutor(folder, manifest, device=CPU)


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    folder = save_graph(tmp_path, helper.make_node("Cast", ["input_ids"], [wire.LOGITS], to=1))
    layout = manifest.kv_cache.model_copy(update={"num_blocks": 10**12})
    with pytest.raises(CapacityError, match="--kv-cache-bytes"):
        ReferenceExecutor(folder, manifest.model_copy(update={"kv_cache": layout}), device=CPU)


# --------------------------------------------------------------------------- operators in torch


def node(op_type: str, num_inputs: int, **attributes: Any) -> Node:
    inputs = tuple(f"x{index}" for index in range(num_inputs))
    return Node(op_type, "trtforge", inputs, ("y",), attributes)


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_attention_equals_its_reference(case: Case) -> None:
    operator = OPERATORS["PagedAttention"]
    arrays = make_inputs(case)
    inputs = [
        from_numpy(arrays[tensor.name]) if tensor.name in arrays else None for tensor in operator.spec.inputs
    ]
    expected, expected_cache = run_reference(
        operator, case.attributes, *(None if tensor is None else tensor.clone() for tensor in inputs)
    )
    operation = Operators(None).make(node("PagedAttention", len(inputs), **case.attributes))
    out, cache = operation(*inputs)
    assert cache is inputs[3]
    assert torch.equal(cache.view(torch.uint8), expected_cache.view(torch.uint8))
    num_tokens = sum(new for new, _ in case.lens)
    torch.testing.assert_close(out[:num_tokens], expected[:num_tokens], rtol=0, atol=TOLERANCE[case.dtype])


def test_attention_of_many_queries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "all-features")
    inputs = {name: from_numpy(array) for name, array in make_inputs(case).items()}
    arguments = [inputs.get(tensor.name) for tensor in OPERATORS["PagedAttention"].spec.inputs]
    whole, _ = TorchAttention()(*arguments, **case.attributes)
    monkeypatch.setattr("trtforge.runtime.executors.torch_attention._MAX_SCORES", 5000)
    chunked, _ = TorchAttention()(*arguments, **case.attributes)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize(
    ("transposed", "biases", "offsets"), [(0, False, False), (1, True, False), (0, True, True)]
)
def test_experts_equal_their_reference(activation: str, transposed: int, biases: bool, offsets: bool) -> None:
    tokens, hidden, intermediate, experts = 7, 12, 10, 5
    gate_up, down = normal(experts, 2 * intermediate, hidden), normal(experts, hidden, intermediate)
    inputs = [
        normal(tokens, hidden),
        torch.from_numpy(RNG.integers(experts - 1, size=(tokens, 2))),  # nobody chooses the last one
        normal(tokens, 2).softmax(-1),
        *(weight.mT.contiguous() if transposed else weight for weight in (gate_up, down)),
        *([normal(experts, 2 * intermediate), normal(experts, hidden)] if biases else []),
        *([normal(experts, 3, 2 * intermediate), normal(experts, 5, hidden)] if offsets else []),
    ]
    attributes = {"activation": activation, "transposed": transposed, "alpha": 1.7, "limit": 2.0}
    (expected,) = run_reference(OPERATORS["MoeExperts"], attributes, *inputs)
    got = Operators(None).make(node("MoeExperts", len(inputs), **attributes))(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_references_take_and_give_bfloat16() -> None:
    x, weight = normal(3, 1, 8).bfloat16(), normal(4, 8).bfloat16()  # a dim too many
    (y,) = run_reference(OPERATORS["Linear"], {}, x, weight, None)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), rtol=0.02, atol=0.02)


def test_operations_that_wait_are_known() -> None:
    """CUDA graphs are made of a model only if there is none."""
    operators = Operators(None)
    operators.make(node("Linear", 2))
    assert operators.waiting == set()
    operators.make(node("PagedAttention", 8, scale=1.0))
    assert operators.waiting == {"PagedAttention"}


# --------------------------------------------------------------------------- kernels

ACCUMULATE = OpSpec(
    name="Accumulate",
    doc="total += x * factor; y = x * factor.",
    inputs=(
        Tensor("total", "T", ("rows", "size")),
        Tensor("x", "X", ("num_tokens", "size")),
        Tensor("unused", "T", ("rows",), optional=True),
    ),
    outputs=(Tensor("y", "X", ("num_tokens", "size")), Tensor("total_out", "T", ("rows", "size"))),
    dtypes={"T": FLOATS, "X": FLOATS},
    attributes=(Attribute("factor", "float"),),
    aliases={"total_out": "total"},
)
KERNEL = Kernel("accumulate", "accumulate", (("y", "*fp32"), ("num_rows", "i32")), (), 4, 1)


class HostLauncher:
    """Does what the kernel would, through the pointers that it is given."""

    gpu = Gpu(arch=90, num_sms=132)

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.pointers: Mapping[str, int] = {}

    def plan(self, call: Call, gpu: Gpu) -> Plan:
        self.calls.append(call)
        num_rows = call.shapes["x"][0]
        launch = Launch(KERNEL, (num_rows, 1, 1), {"y": "y", "num_rows": num_rows})
        return Plan((launch,), {"scratch": 4, "more": 8})

    def launch(self, plan: Plan, pointers: Mapping[str, int], workspace_pointer: int, stream: int) -> None:
        self.pointers = pointers
        (call,) = self.calls
        ctypes.memset(workspace_pointer, 0xFF, 512)  # two workspaces, at multiples of 256 bytes
        views = {
            name: np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)),
                call.shapes["total" if name.startswith("total") else "x"],
            )
            for name, pointer in pointers.items()
        }
        views["y"][:] = views["x"] * call.attributes["factor"]
        views["total_out"] += views["y"].sum(0)


def test_kernels_are_called_with_the_declared_tensors() -> None:
    launcher = HostLauncher()
    kernels = Kernels(launcher.plan, lambda call, arch: (KERNEL,))
    operation = KernelCalls(ACCUMULATE, kernels, {"factor": 3.0}, launcher)
    total = torch.zeros(2, 5)
    x = normal(5, 1, 4).transpose(0, 2)  # [4, 1, 5]: a dim too many, and not contiguous
    y, total_out = operation(total, x)
    torch.testing.assert_close(y, x * 3)
    assert total_out is total
    torch.testing.assert_close(total, (x * 3).sum(0).expand(2, 5))
    (call,) = launcher.calls
    assert call == Call(
        shapes={"total": (2, 5), "x": (4, 5)},
        dtypes={"total": "float32", "x": "float32"},
        attributes={"factor": 3.0},
    )
    assert all(pointer % 16 == 0 for pointer in launcher.pointers.values())
    assert launcher.pointers["total"] == launcher.pointers["total_out"] == total.data_ptr()


def test_tensors_that_begin_in_between_are_moved_but_never_those_written_to() -> None:
    launcher = HostLauncher()
    operation = KernelCalls(
        ACCUMULATE, Kernels(launcher.plan, lambda call, arch: ()), {"factor": 1.0}, launcher
    )
    shifted = torch.zeros(21)[1:].reshape(4, 5)
    operation(torch.zeros(2, 5), shifted)
    assert launcher.pointers["x"] % 16 == 0
    with pytest.raises(PluginError, match="writes into total"):
        operation(shifted, torch.zeros(1, 5))


def test_dtypes_are_called_as_numpy_calls_them() -> None:
    assert str(torch.bfloat16).removeprefix("torch.") == np.dtype(ml_dtypes.bfloat16).name
    assert str(torch.float8_e4m3fn).removeprefix("torch.") == np.dtype(ml_dtypes.float8_e4m3fn).name
