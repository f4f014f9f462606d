"""Time and peak memory of an export, by model size.

Checkpoints of the true size are made from the models' configurations as sparse files, which take no disk:
an export reads weights only when it writes them. Each model is measured in a process of its own.

    python benchmarks/export.py [--models llama-8b,llama-70b] [--checkpoint FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Figure, describe_machine, finish

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    "model_type": "llama",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
    },
    "llama-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
PEAK_RSS_AIM_MIB = 1024.0
SECONDS_AIMS = {"llama-8b": 60.0, "llama-70b": 180.0}


def write_sparse_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """A bfloat16 checkpoint of `config` whose weights are holes in the file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    values = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
    tied = set(hf.all_tied_weights_keys)
    state = {name: tensor for name, tensor in hf.state_dict().items() if name not in tied}
    header, end = {}, 0
    for name, tensor in revert_weight_conversion(hf, state).items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    hf_config.save_pretrained(folder)


def measure(folder: Path) -> dict[str, Any]:
    """Export the checkpoint in `folder`, in this process."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    from trtforge.builder.checkpoint import Checkpoint
    from trtforge.builder.export import export_model

    imported = time.perf_counter()
    exported = export_model(Checkpoint.open(str(folder)), "bfloat16")
    return {
        "parameters": exported.num_parameters,
        "weight_bytes": exported.weight_bytes,
        "nodes": exported.num_nodes,
        "import_seconds": round(imported - begin, 2),
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - begin_cpu, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def figures_of(name: str, folder: Path) -> list[Figure]:
    """Measure the checkpoint in `folder` in a process of its own, and print a line about it."""
    row = json.loads(run("--measure", str(folder)).splitlines()[-1])
    print(
        f"{name:<16} {row['parameters'] / 1e9:7.2f} B  {row['seconds']:7.1f} s  "
        f"({row['cpu_seconds']:.1f} s of CPU)  {row['peak_rss_mib']:6.0f} MiB  {row['nodes']} nodes",
        flush=True,
    )
    units = {"seconds": "s", "cpu_seconds": "s", "import_seconds": "s", "peak_rss_mib": "MiB"}
    aims = {"peak_rss_mib": PEAK_RSS_AIM_MIB, "seconds": SECONDS_AIMS.get(name)}
    return [
        Figure(f"{name} {key}", value, units.get(key, "1"), aims.get(key), higher_is_better=False)
        for key, value in row.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS), help="comma-separated, of the built-in ones")
    parser.add_argument("--checkpoint", type=Path, help="a real checkpoint to export as well")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    if options.write:
        write_sparse_checkpoint(CONFIGS[options.write[0]], Path(options.write[1]))
        return

    machine = describe_machine(("torch", "transformers", "onnxscript"))
    figures: list[Figure] = []
    if options.checkpoint:
        figures += figures_of(options.checkpoint.name, options.checkpoint)
    for name in filter(None, options.models.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            run("--write", name, folder)
            figures += figures_of(name, Path(folder))
    used = max(figure.value / figure.aim for figure in figures if figure.aim is not None)
    headline = Figure("export: the most used of any limit on time and memory", used, "1", 1.0, False)
    finish(headline, figures, machine, options.json)


if __name__ == "__main__":
    main()
