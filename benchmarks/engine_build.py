"""Time and peak memory of building an engine, by number of layers and by width.

Random llama-like models are exported, and built by TensorRT-RTX, which needs no GPU; each in a process of its
own. A checkpoint is built twice: with operators' bodies as they are, and lowered as builds do it.

    python benchmarks/engine_build.py [--layers 2,4,8] [--widths 256,512] [--checkpoint FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Figure, describe_machine, finish

BLOCK_SIZE = 32
HEAD_DIM = 64
WIDTH = 576  # of the models with different numbers of layers
LAYERS = 4  # of the models of different widths
GROWTH_AIM = 1.15  # exponent of time over layers
UNITS = {"lower": "s", "parse": "s", "build": "s", "cpu": "s", "peak_rss": "MiB", "engine": "MiB"}


def export_random(num_layers: int, width: int, folder: Path) -> None:
    """A random llama of `num_layers` layers as the builder's graph in `folder`, bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=math.gcd(width // HEAD_DIM, 3),
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "hf")
    export(folder / "hf", folder)


def export(checkpoint: Path, folder: Path) -> None:
    """A checkpoint as the builder's graph in `folder`, bfloat16."""
    from trtforge.builder.checkpoint import Checkpoint
    from trtforge.builder.export import export_model, write_graph

    exported = export_model(Checkpoint.open(str(checkpoint)), "bfloat16")
    write_graph(exported, folder)
    layers = [layer.model_dump() for layer in exported.layers]
    (folder / "layers.json").write_text(json.dumps(layers))


def measure(folder: Path, form: str) -> dict[str, Any]:
    """Build the graph in `folder`, in this process."""
    import onnx_ir as ir

    from trtforge.builder.engine import Network, choose_target
    from trtforge.builder.lower import lower
    from trtforge.builder.profiles import make_profiles
    from trtforge.manifest import DimRange, KVCacheLayout, LayerCache, Limits
    from trtforge.plugins.function_bodies import add_function_bodies

    layers = [LayerCache.model_validate(layer) for layer in json.loads((folder / "layers.json").read_text())]
    kv_cache = KVCacheLayout(dtype="bfloat16", block_size=BLOCK_SIZE, num_blocks=1024, layers=tuple(layers))
    limits = Limits(max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=2048)
    (profile,) = make_profiles("tensorrt_rtx", limits, kv_cache)
    graph = folder / "model.onnx"
    target = choose_target("tensorrt-rtx")  # its import is not measured

    times, begin_cpu = [time.perf_counter()], time.process_time()
    if form == "lowered":
        model = lower(graph, BLOCK_SIZE)
    else:
        model = add_function_bodies(ir.load(graph))
        block_size = DimRange(min=BLOCK_SIZE, opt=BLOCK_SIZE, max=BLOCK_SIZE)
        profile = profile.model_copy(update={"dims": profile.dims | {"block_size": block_size}})
    serialized = ir.to_proto(model).SerializeToString()
    times.append(time.perf_counter())
    network = Network(serialized, graph, target.package)
    times.append(time.perf_counter())
    engine = network.build(target, [profile])
    times.append(time.perf_counter())
    seconds = [round(end - begin, 2) for begin, end in itertools.pairwise(times)]
    return {
        "nodes": sum(1 for _ in model.graph),
        "trt_layers": network.num_layers,
        **dict(zip(("lower", "parse", "build"), seconds, strict=True)),
        "cpu": round(time.process_time() - begin_cpu, 2),
        "peak_rss": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "engine": round(engine.nbytes / 2**20, 1),
    }


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_apart(name: str, folder: Path, form: str = "lowered") -> dict[str, Any]:
    """`measure` in a process of its own; prints a line about it."""
    row = json.loads(run("--measure", str(folder), form).splitlines()[-1])
    print(
        f"{name:<28} {row['nodes']:6} nodes {row['trt_layers']:6} layers  lower {row['lower']:5.1f} s  "
        f"parse {row['parse']:5.1f} s  build {row['build']:6.1f} s  (all: {row['cpu']:5.1f} s of CPU)  "
        f"{row['peak_rss']:6.0f} MiB  engine {row['engine']:7.1f} MiB",
        flush=True,
    )
    return row


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The exponent p of value = c * size ** p, by least squares over the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


def figures_of(name: str, row: dict[str, Any]) -> list[Figure]:
    return [
        Figure(f"{name} {key}", value, UNITS.get(key, "1"), higher_is_better=False)
        for key, value in row.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", default="2,4,8,16", help=f"numbers of layers, {WIDTH} wide")
    parser.add_argument("--widths", default="256,512,1024", help=f"widths, of {LAYERS} layers")
    parser.add_argument("--checkpoint", type=Path, help="a real checkpoint to build in both forms as well")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--random", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    if options.random:
        export_random(int(options.random[0]), int(options.random[1]), Path(options.random[2]))
        return
    if options.export:
        export(*options.export)
        return

    machine = describe_machine(("tensorrt-rtx", "onnxscript"))
    figures: list[Figure] = []

    def sweep(dim: str, models: dict[int, tuple[int, int]]) -> dict[str, float]:
        rows = []
        for num_layers, width in models.values():
            with tempfile.TemporaryDirectory() as folder:
                run("--random", str(num_layers), str(width), folder)
                rows.append(measure_apart(f"{num_layers} layers, {width} wide", Path(folder)))
            figures.extend(figures_of(f"{num_layers}x{width}", rows[-1]))
        exponents = {key: growth(list(models), [row[key] for row in rows]) for key in ("cpu", "peak_rss")}
        for key, exponent in exponents.items():
            print(f"{key} grows with {dim} to the power {exponent:.2f}", flush=True)
            figures.append(Figure(f"{key} by {dim}, exponent", exponent, "1", higher_is_better=False))
        return exponents

    counts = [int(text) for text in options.layers.split(",")]
    widths = [int(text) for text in options.widths.split(",")]
    by_layers = sweep("layers", {count: (count, WIDTH) for count in counts})
    sweep("width", {width: (LAYERS, width) for width in widths})
    if options.checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            run("--export", str(options.checkpoint), folder)
            for form in ("bodies", "lowered"):
                name = f"{options.checkpoint.name[:16]} {form}"
                figures += figures_of(name, measure_apart(name, Path(folder), form))
    exponent = by_layers["cpu"]
    headline = Figure("engine build: CPU time by layers, exponent", exponent, "1", GROWTH_AIM, False)
    finish(headline, figures, machine, options.json)


if __name__ == "__main__":
    main()
