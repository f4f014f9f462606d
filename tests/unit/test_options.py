"""Refusals of impossible options, and the arithmetic from options to limits and KV cache."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, GPT2Config, LlamaConfig

from trtforge import cli
from trtforge.builder.options import BuildOptions, parse_bytes
from trtforge.builder.plan import BuildPlan, make_plan, plan_kv_cache
from trtforge.builder.quantization.weights import ActivationScheme, QuantizedLinear
from trtforge.builder.sharding.split import Parallelism
from trtforge.errors import ConfigError
from trtforge.manifest import LayerCache, Limits

LLAMA_3_8B = (LayerCache(num_kv_heads=8, head_dim=128),) * 32
SMOLLM2 = (LayerCache(num_kv_heads=3, head_dim=64),) * 30


def options(**values: object) -> BuildOptions:
    return BuildOptions(model="model", output=Path("repository"), **values)


def plan(max_model_len: int = 8192, kv_cache_bytes: int | None = None, block_size: int = 32) -> BuildPlan:
    limits = Limits(max_model_len=max_model_len, max_num_seqs=256, max_num_batched_tokens=2048)
    return BuildPlan("llm", "openvino", "bfloat16", block_size, kv_cache_bytes, limits, Parallelism())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--int4", "--fp8"], "--int4 and --fp8 are formats of the same weights: give one of them"),
        (["--int4", "--group-size", "48"], "--group-size 48 is not allowed: it is one of 32, 64, 128"),
        (["--fp8", "--group-size", "64"], "--group-size is for the scales of --int4"),
        (["--fp8", "--calibrate", "awq"], "--calibrate awq makes weights of four bits: give --int4 too"),
        (["--int4", "--calibration-text", "x"], "--calibration-text is what --calibrate awq reads"),
        (["--int4", "--activations", "static"], "nothing multiplies four bits: give --fp8 or --int8"),
        (
            ["--fp8", "--activations", "static"],
            "--activations static cannot be built for fp8 weights and --runtime openvino, which multiplies "
            "no 8-bit floats: leave it out",
        ),
        (
            ["--int8", "--activations", "dynamic"],
            "rounds them by itself, a scale a token, in builds of --dtype bfloat16: use --activations static "
            "or leave it out",
        ),
        (
            ["--int8", "--activations", "static", "--runtime", "tensorrt"],
            "--int8 cannot be built for --runtime tensorrt",
        ),
        (
            ["--fp8", "--activations", "dynamic", "--runtime", "reference", "--calibration-text", "x"],
            "--calibration-text is what --calibrate awq reads, and --activations static with --fp8 or --int8",
        ),
        (
            ["--kv-cache-dtype", "int8", "--runtime", "reference"],
            "int8 is no KV cache of --runtime reference: it is OpenVINO's own; leave the option out, or use "
            "--runtime openvino",
        ),
        (
            ["--kv-cache-dtype", "fp8"],
            "--kv-cache-dtype fp8 is no KV cache of --runtime openvino: OpenVINO has none of 8-bit floats; "
            "leave the option out, or use --runtime reference or tensorrt",
        ),
        (
            ["--kv-cache-dtype", "fp8", "--runtime", "tensorrt-rtx"],
            "--runtime tensorrt-rtx: TensorRT-RTX has no layer that reads or writes parts of a tensor of 8-b",
        ),
        (["--kv-cache-dtype", "fp4"], "'fp4' is not one of 'auto', 'fp8', 'int8'"),
        (["--exclude", "*.down_proj.weight"], "--exclude says what --int4, --fp8 or --int8 leaves as it is"),
        (["--runtime", "tensorrt", "--gpu", "90"], "--gpu '90' is not a compute capability"),
        (["--gpu", "sm_89"], "--gpu is for TensorRT's engines: give --runtime tensorrt-rtx or tensorrt"),
        (["--runtime", "tensorrt-rtx", "--gpu", "8.9"], "--gpu '8.9' is not a compute capability"),
        (["--weight-streaming"], "--weight-streaming is for TensorRT's engines"),
        (["--workspace-bytes", "1GB"], "--workspace-bytes '1GB' is not a size"),
        (["--workspace-bytes", "1GiB"], "--workspace-bytes is for TensorRT's engines"),
        (["--runtime", "cuda"], "'cuda' is not one of 'auto', 'openvino'"),
        (["--dtype", "int8"], "'int8' is not one of 'auto', 'float32'"),
        (["--block-size", "16"], "blocks of 32 tokens"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens 0 is not allowed"),
        (["--max-num-seqs", "-1"], "--max-num-seqs -1 is not allowed"),
        (["--max-model-len", "0"], "--max-model-len 0 is not allowed"),
        (["--kv-cache-bytes", "0"], "--kv-cache-bytes 0 is not allowed"),
        (["--kv-cache-bytes", "2GB"], "--kv-cache-bytes '2GB' is not a size"),
        (["--tp", "0"], "--tp 0 is not allowed"),
        (["--pp", "-1"], "--pp -1 is not allowed"),
        (["--name", "../elsewhere"], "model name '../elsewhere' is not allowed"),
        (["--name", "/etc"], "model name '/etc' is not allowed"),
        (["--name", ".."], "model name '..' is not allowed"),
        (["--name", ""], "model name '' is not allowed"),
        ([], "no such model is neither a folder nor a model id"),
    ],
)
def test_command_refuses_with_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    command = ["build-engine", "no such model", "--output", str(tmp_path / "repository")]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.build_engine()
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(lines) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("512MiB", 512 * 2**20), ("2 gib", 2 * 2**30), ("3KiB", 3072), (" 1TiB ", 2**40)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--kv-cache-bytes") == count


@pytest.mark.parametrize("text", ["", "GiB", "1.5GiB", "-1", "1GB", "1 GiB 2", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="use a whole number of bytes"):
        parse_bytes(text, "--kv-cache-bytes")


def test_max_model_len_is_the_configs_but_at_most_8192() -> None:
    assert (
        make_plan(options(), LlamaConfig(max_position_embeddings=2048), "float16").limits.max_model_len
        == 2048
    )
    assert make_plan(options(), GPT2Config(n_positions=1024), "float32").limits.max_model_len == 1024
    long = LlamaConfig(max_position_embeddings=131072)
    assert make_plan(options(), long, "float16").limits.max_model_len == 8192
    assert make_plan(options(max_model_len=131072), long, "float16").limits.max_model_len == 131072
    with pytest.raises(ConfigError, match=r"--max-model-len 131073 is more than .* 131072"):
        make_plan(options(max_model_len=131073), long, "float16")


def test_max_model_len_has_to_be_given_where_the_config_has_none() -> None:
    config = BloomConfig()
    with pytest.raises(ConfigError, match="say the longest sequence with --max-model-len"):
        make_plan(options(), config, "float32")
    assert make_plan(options(max_model_len=99), config, "float32").limits.max_model_len == 99


def test_auto_dtype_is_the_checkpoints() -> None:
    assert make_plan(options(), LlamaConfig(), "bfloat16").dtype == "bfloat16"
    assert make_plan(options(dtype="float32"), LlamaConfig(), "float16").dtype == "float32"


def test_openvino_never_computes_in_float16() -> None:
    assert make_plan(options(), LlamaConfig(), "float16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"--dtype float16 .* use --dtype bfloat16"):
        make_plan(options(dtype="float16"), LlamaConfig(), "float16")


def test_reference_runtime_takes_every_dtype_and_block_size() -> None:
    assert make_plan(options(), LlamaConfig(), "float32").runtime == "openvino"
    plan = make_plan(options(runtime="reference", block_size=16), LlamaConfig(), "float16")
    assert (plan.runtime, plan.dtype, plan.block_size) == ("reference", "float16", 16)
    plan = make_plan(options(runtime="reference", dtype="bfloat16"), LlamaConfig(), "float16")
    assert (plan.dtype, plan.block_size) == ("bfloat16", 32)


@pytest.mark.parametrize(("layers", "bytes_per_token"), [(LLAMA_3_8B, 131072), (SMOLLM2, 23040)])
def test_kv_cache_bytes_per_token(layers: tuple[LayerCache, ...], bytes_per_token: int) -> None:
    layout = plan_kv_cache(plan(), layers)
    assert layout.bytes_per_token == bytes_per_token
    assert layout.num_blocks == 2**30 // (32 * bytes_per_token)


def test_default_kv_cache_holds_one_longest_sequence_at_least() -> None:
    # 16,000 tokens of 131,072 bytes are more than 1 GiB; 500 blocks of 32 tokens hold them exactly.
    assert plan_kv_cache(plan(max_model_len=16_000), LLAMA_3_8B).num_blocks == 500


def test_a_cache_of_bytes_holds_more_tokens() -> None:
    assert make_plan(options(), LlamaConfig(), "bfloat16").kv_cache_dtype is None
    in_bytes = make_plan(options(kv_cache_dtype="int8"), LlamaConfig(), "bfloat16")
    wide, narrow = (plan_kv_cache(each, SMOLLM2) for each in (plan(), replace(plan(), kv_cache_dtype="int8")))
    assert (in_bytes.kv_cache_dtype, narrow.dtype) == ("int8", "int8")
    assert in_bytes.graph_cache_dtype == "bfloat16"
    # A key and a value of 64 bytes, 8 of the value's scale, a 32th of 8 for each channel of keys.
    assert narrow.bytes_per_token == 30 * 3 * (64 + 64 + 8 + 64 * 8 // 32)
    assert narrow.num_blocks == pytest.approx(wide.num_blocks * 256 / 152, rel=0.01)


def test_a_cache_of_8_bit_floats_holds_twice_as_many_tokens() -> None:
    made = make_plan(options(kv_cache_dtype="fp8", runtime="reference"), LlamaConfig(), "bfloat16")
    wide, narrow = (
        plan_kv_cache(replace(made, kv_cache_dtype=dtype), SMOLLM2) for dtype in (None, made.kv_cache_dtype)
    )
    assert (narrow.dtype, made.graph_cache_dtype) == ("float8_e4m3fn", "float8_e4m3fn")
    assert narrow.bytes_per_token == wide.bytes_per_token // 2 == 30 * 3 * 2 * 64
    assert narrow.num_blocks == pytest.approx(2 * wide.num_blocks, abs=1)


def test_too_small_a_kv_cache_is_refused_with_figures_that_work() -> None:
    # 100 tokens need 4 blocks of 32 tokens of 23,040 bytes.
    needed = 4 * 32 * 23040
    assert plan_kv_cache(plan(100, needed), SMOLLM2).num_blocks == 4
    with pytest.raises(ConfigError, match=f"needs {needed} bytes") as refused:
        plan_kv_cache(plan(100, needed - 1), SMOLLM2)
    longest = int(re.search(r"--max-model-len (\d+) at most", str(refused.value))[1])
    assert plan_kv_cache(plan(longest, needed - 1), SMOLLM2).num_blocks == 3
    with pytest.raises(ConfigError, match=f"needs {needed} bytes"):
        plan_kv_cache(plan(longest + 1, needed - 1), SMOLLM2)
    with pytest.raises(ConfigError, match="one block of 32 tokens alone is 737280 bytes"):
        plan_kv_cache(plan(1, 737279), SMOLLM2)


def test_more_slots_than_int32_reaches_are_refused_with_a_budget_that_works() -> None:
    tiny = (LayerCache(num_kv_heads=1, head_dim=8),)
    with pytest.raises(ConfigError, match="slot numbers") as refused:
        plan_kv_cache(plan(kv_cache_bytes=2**40), tiny)
    budget = int(re.search(r"at most (\d+)", str(refused.value))[1])
    assert plan_kv_cache(plan(kv_cache_bytes=budget), tiny).num_blocks * 32 < 2**31
    with pytest.raises(ConfigError, match="slot numbers"):
        plan_kv_cache(plan(kv_cache_bytes=budget + 32 * 32), tiny)


@given(
    layers=st.lists(
        st.builds(LayerCache, num_kv_heads=st.integers(1, 16), head_dim=st.integers(8, 256)),
        min_size=1,
        max_size=8,
    ),
    block_size=st.integers(1, 64),
    max_model_len=st.integers(1, 4096),
    kv_cache_bytes=st.integers(1, 2**32),
)
def test_blocks_fill_the_budget_and_hold_a_sequence(
    layers: list[LayerCache], block_size: int, max_model_len: int, kv_cache_bytes: int
) -> None:
    try:
        layout = plan_kv_cache(plan(max_model_len, kv_cache_bytes, block_size), layers)
    except ConfigError as error:
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > kv_cache_bytes
        assert plan_kv_cache(plan(max_model_len, needed, block_size), layers).num_blocks
        return
    block_bytes = sum(2 * 2 * layer.num_kv_heads * layer.head_dim for layer in layers) * block_size
    assert layout.num_blocks * block_bytes <= kv_cache_bytes < (layout.num_blocks + 1) * block_bytes
    assert layout.num_blocks * block_size >= max_model_len


def test_quantized_weights_are_not_rounded_once_more() -> None:
    with pytest.raises(ConfigError, match=r"is quantized already \(gptq\), and --int4 would round"):
        make_plan(options(int4=True), LlamaConfig(), "float16", "gptq")
    assert make_plan(options(), LlamaConfig(), "float16", "gptq").quantization is None


def test_activations_of_a_quantized_checkpoint_are_those_it_was_made_for() -> None:
    def stored(activations: ActivationScheme | None, **others: Any) -> QuantizedLinear:
        read = lambda: pytest.fail("no weight is read")  # noqa: E731
        return QuantizedLinear("fp8", (32, 32), "a test", read, activations=activations, **others)

    def plan_of(activations: str, runtime: str, *linears: QuantizedLinear) -> BuildPlan:
        wanted = options(activations=activations, runtime=runtime)
        return make_plan(wanted, LlamaConfig(), "bfloat16", "fp8" if linears else None, linears)

    with pytest.raises(ConfigError, match="model has in floats: give --fp8 or --int8 too"):
        plan_of("dynamic", "reference")
    with pytest.raises(ConfigError, match="weights say for activations: none, static"):
        plan_of("dynamic", "reference", stored("static"), stored(None))
    with pytest.raises(ConfigError, match="openvino, which multiplies no 8-bit floats: leave it out"):
        plan_of("static", "openvino", stored("static"))
    with pytest.raises(ConfigError, match="scales of blocks and --runtime tensorrt-rtx"):
        plan_of("dynamic", "tensorrt-rtx", stored("dynamic", scales="block"))
    plan = plan_of("dynamic", "reference", stored("dynamic", scales="block"))
    assert (plan.activations, plan.quantization) == ("dynamic", None)
