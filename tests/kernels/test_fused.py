"""AddRmsNorm, QkNorm, SiluMul, Rope: kernels and function bodies against references, those against torch."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from kernel_harness.onnx_body import run_body
from kernel_harness.sass import Sass
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_glm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call, Gpu, Kernel
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.qk_norm import cases as qk_norm_cases
from trtforge.plugins.rms_norm import cases as rms_norm_cases
from trtforge.plugins.rope import cases as rope_cases
from trtforge.plugins.silu_mul import cases as silu_mul_cases

BF16 = ml_dtypes.bfloat16
# One spacing of the dtype; float32 itself may err by a few, and where terms cancel.
RELATIVE = {np.dtype(np.float32): 2e-6, np.dtype(np.float16): 2.0**-10, np.dtype(BF16): 2.0**-7}
ABSOLUTE = 1e-6
Interpret = Callable[..., tuple[np.ndarray, ...]]
SassOf = Callable[[Kernel, int], Sass]

RMS_NORM = {"eps": rms_norm_cases.EPS}
SILU = {"activation": "silu"}
GELU = {"activation": "gelu_tanh"}
CASES = {
    **{
        f"AddRmsNorm-{name}": (rms_norm_cases.inputs, shape, RMS_NORM)
        for name, shape in rms_norm_cases.CASES.items()
    },
    **{
        f"SiluMul-{name}": (silu_mul_cases.inputs, shape, SILU)
        for name, shape in silu_mul_cases.CASES.items()
    },
    **{
        f"SiluMul-gelu-{name}": (silu_mul_cases.inputs, shape, GELU)
        for name, shape in silu_mul_cases.CASES.items()
    },
    **{f"Rope-{name}": (rope_cases.inputs, case, case.attributes) for name, case in rope_cases.CASES.items()},
    **{
        f"QkNorm-{name}": (qk_norm_cases.inputs, case, case.attributes)
        for name, case in qk_norm_cases.CASES.items()
    },
}


def assert_close(got: np.ndarray, expected: np.ndarray, atol: float = ABSOLUTE, spacings: int = 1) -> None:
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=spacings * RELATIVE[got.dtype], atol=atol
    )


def reference(name: str, inputs: dict, attributes: dict) -> tuple[np.ndarray, ...]:
    outputs = OPERATORS[name].reference(**inputs, **attributes)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity, as on a GPU
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_what_the_reference_does(interpret: Interpret, case: str, dtype: type) -> None:
    make_inputs, sizes, attributes = CASES[case]
    name, inputs = case.partition("-")[0], make_inputs(sizes, dtype)
    got = interpret(OPERATORS[name], inputs, attributes)
    for output, expected in zip(got, reference(name, inputs, attributes), strict=True):
        assert_close(output, expected)


@pytest.mark.parametrize("case", CASES)
def test_bodies_compute_what_the_reference_does(case: str) -> None:
    make_inputs, sizes, attributes = CASES[case]
    name, inputs = case.partition("-")[0], make_inputs(sizes, np.float32)
    got = run_body(OPERATORS[name], inputs, attributes)
    for output, expected in zip(got, reference(name, inputs, attributes), strict=True):
        # ONNX Runtime's sigmoid and tanh err by 1e-7, times a gate and an up of up to 40 each.
        assert_close(output, expected, atol=2e-4 if name == "SiluMul" else ABSOLUTE)


@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
def test_the_body_of_qk_norm_rounds_once(case: str) -> None:
    sizes = qk_norm_cases.CASES[case]
    inputs = qk_norm_cases.inputs(sizes, np.float16)
    got = run_body(OPERATORS["QkNorm"], inputs, sizes.attributes)
    for output, expected in zip(got, reference("QkNorm", inputs, sizes.attributes), strict=True):
        assert_close(output, expected)
        # What is rounded twice is often another number, what is summed in another order seldom.
        assert np.mean(output != expected) < 0.01


def test_rope_takes_angles_of_another_dtype(interpret: Interpret) -> None:
    inputs = rope_cases.inputs(rope_cases.CASES["halves"], BF16)
    inputs |= {name: inputs[name].astype(np.float32) * np.float32(0.999) for name in ("cos", "sin")}
    for got, expected in zip(
        interpret(OPERATORS["Rope"], inputs, {}), reference("Rope", inputs, {}), strict=True
    ):
        assert_close(got, expected)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(
        torch.bfloat16 if array.dtype == BF16 else torch.float32
    )


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy().astype(BF16 if tensor.dtype == torch.bfloat16 else np.float32)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_add_rms_norm_is_that_of_llama(dtype: type) -> None:
    inputs = rms_norm_cases.inputs((7, 96), dtype)
    norm = LlamaRMSNorm(96, rms_norm_cases.EPS)
    norm.weight.data = tensor(inputs["weight"])
    added = tensor(inputs["residual"]) + tensor(inputs["x"])
    y, h = reference("AddRmsNorm", inputs, RMS_NORM)
    np.testing.assert_array_equal(h, array(added))
    # Llama rounds before it multiplies with the weight too: one spacing more.
    expected = array(norm(added)).astype(np.float32)
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2 * RELATIVE[y.dtype])


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(("case", "norm_class"), [("qwen3", Qwen3RMSNorm), ("gemma3", Gemma3RMSNorm)])
def test_qk_norm_is_that_of_models(case: str, norm_class: type[torch.nn.Module], dtype: type) -> None:
    sizes = qk_norm_cases.CASES[case]
    inputs = qk_norm_cases.inputs(sizes, dtype)
    # Qwen3 rounds before it multiplies with the weight too, which is one spacing more; Gemma 3 rounds once.
    spacings = 2 if norm_class is Qwen3RMSNorm else 1
    for x, got in zip("qk", reference("QkNorm", inputs, sizes.attributes), strict=True):
        norm = norm_class(sizes.head_dim, eps=sizes.attributes["eps"])
        norm.weight.data = tensor(inputs[f"{x}_weight"])
        expected = array(norm(tensor(inputs[x])))
        assert_close(got, expected, spacings=spacings)


@pytest.mark.parametrize("attributes", [SILU, GELU], ids=["silu", "gelu_tanh"])
def test_silu_mul_is_that_of_torch(attributes: dict) -> None:
    inputs = silu_mul_cases.inputs((7, 2, 60), np.float32)
    gate, up = tensor(inputs["gate_up"]).unbind(1)
    if attributes is SILU:
        gate = torch.nn.functional.silu(gate)
    else:
        gate = torch.nn.functional.gelu(gate.double(), approximate="tanh").float()
    assert_close(reference("SiluMul", inputs, attributes)[0], array(gate * up))


@pytest.mark.parametrize(
    ("case", "rotate", "expand"),
    [
        ("halves", rotate_llama, lambda angles: torch.cat((angles, angles), -1)),
        ("partial-interleaved", rotate_glm, lambda angles: torch.cat((angles, angles), -1)),
    ],
)
def test_rope_is_that_of_models(case: str, rotate: Callable, expand: Callable) -> None:
    inputs = rope_cases.inputs(rope_cases.CASES[case], np.float32)
    q, k = (tensor(inputs[name])[:, :, None] for name in ("q", "k"))  # [T, H, 1, D]
    cos, sin = (expand(tensor(inputs[name]))[:, None] for name in ("cos", "sin"))
    results = reference("Rope", inputs, rope_cases.CASES[case].attributes)
    for got, expected in zip(results, rotate(q, k, cos, sin), strict=True):
        assert_close(got, array(expected[:, :, 0]))


# Of Llama 3 8B, QkNorm of Qwen3 8B; at any number of tokens.
CALLS = {
    "AddRmsNorm": Call(
        {"x": (-1, 4096), "residual": (-1, 4096), "weight": (4096,)},
        dict.fromkeys(("x", "residual", "weight"), "bfloat16"),
        RMS_NORM,
    ),
    "SiluMul": Call({"gate_up": (-1, 2, 14336)}, {"gate_up": "bfloat16"}, SILU),
    "Rope": Call(
        {"q": (-1, 32, 128), "k": (-1, 8, 128), "cos": (-1, 64), "sin": (-1, 64)},
        dict.fromkeys(("q", "k", "cos", "sin"), "bfloat16"),
        {"interleaved": 0, "rotary_dim": 0},
    ),
    "QkNorm": Call(
        {"q": (-1, 32, 128), "k": (-1, 8, 128), "q_weight": (128,), "k_weight": (128,)},
        dict.fromkeys(("q", "k", "q_weight", "k_weight"), "bfloat16"),
        {"eps": 1e-6, "unit_offset": 0},
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_loads_16_bytes_at_once(sass_of: SassOf, name: str, arch: int) -> None:
    kernels = OPERATORS[name].kernels
    assert kernels is not None
    (kernel,) = kernels.choices(CALLS[name], arch)
    sass = sass_of(kernel, arch)
    assert sass.spills == sass.stack_bytes == 0 < sass.wide_loads
    # Rope's cos and sin are 128 bytes each, which a warp loads at once.
    assert sass.narrow_loads == (4 if name == "Rope" else 0)


@pytest.mark.parametrize("name", CALLS)
def test_one_kernel_serves_any_number_of_tokens(name: str) -> None:
    kernels = OPERATORS[name].kernels
    assert kernels is not None
    call = CALLS[name]
    for num_tokens in (1, 5000):
        shapes = {
            tensor: tuple(num_tokens if size == -1 else size for size in shape)
            for tensor, shape in call.shapes.items()
        }
        plan = kernels.plan(Call(shapes, call.dtypes, call.attributes), Gpu(90, 132))
        assert tuple(launch.kernel for launch in plan.launches) == kernels.choices(call, 90)


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "message"),
    [
        ("AddRmsNorm", {"residual": (1, 4096)}, {}, "do not fit x"),
        ("AddRmsNorm", {"weight": (64,)}, {}, "do not fit x"),
        ("SiluMul", {"gate_up": (-1, 3, 64)}, {}, "expected 2 at dim 1"),
        ("SiluMul", {}, {"activation": "relu"}, "no activation 'relu', only silu, gelu_tanh"),
        ("Rope", {"k": (-1, 8, 64)}, {}, r"k has shape \(-1, 8, 64\), expected \(-1, 8, 128\)"),
        ("Rope", {"sin": (-1, 32)}, {}, "sin has shape"),
        ("Rope", {}, {"rotary_dim": 64}, "rotates 64 of 128 elements of a head, but cos and sin are of 64"),
        ("QkNorm", {"k": (-1, 8, 64)}, {}, r"k has shape \(-1, 8, 64\), expected \(-1, 8, 128\)"),
        ("QkNorm", {"k_weight": (8, 128)}, {}, r"k_weight has shape \(8, 128\), expected \(128,\)"),
        (
            "QkNorm",
            {"q": (-1, 1, 2048), "k": (-1, 1, 2048), "q_weight": (2048,), "k_weight": (2048,)},
            {},
            "heads of 2048, at most 1024 are possible",
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(
    name: str, shapes: dict, attributes: dict, message: str
) -> None:
    call, kernels = CALLS[name], OPERATORS[name].kernels
    assert kernels is not None
    with pytest.raises(PluginError, match=message):
        kernels.choices(Call({**call.shapes, **shapes}, call.dtypes, {**call.attributes, **attributes}), 90)
