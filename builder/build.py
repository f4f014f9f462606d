"""The build, from a checkpoint to a model's folder in a Triton model repository."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import trtforge
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.engine_cache import EngineCache
from trtforge.builder.existing import find_existing
from trtforge.builder.key import build_key
from trtforge.builder.options import BuildOptions
from trtforge.builder.plan import BuildPlan, choose_engine_target, make_plan, plan_kv_cache
from trtforge.builder.quantization.calibration_texts import calibration_texts
from trtforge.builder.quantization.policy import Calibration, Quantization
from trtforge.builder.quantization.weights import QuantizedLinear
from trtforge.builder.rank_files import write_ranks
from trtforge.builder.report import BuildReport
from trtforge.builder.repository import VERSION_FOLDER, install_triton_model
from trtforge.builder.stages import Stage, Stages
from trtforge.builder.staging import Staging, staging
from trtforge.builder.tokenizer import write_tokenizer
from trtforge.errors import CapacityError, ConfigError, EngineBuildError
from trtforge.integrity import file_digest
from trtforge.manifest import KVCacheLayout, Manifest, ModelInfo, Rank, element_bytes

if TYPE_CHECKING:
    from trtforge.builder.export import ExportedModel

TOKENIZER_FOLDER = "tokenizer"
# Room for all that is not weights: graph, tokenizer, reports.
_OTHER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class BuildResult:
    """A model's folder in a repository. `cached`: it was there already and nothing had to be built."""

    folder: Path
    manifest: Manifest
    report: BuildReport
    cached: bool


def build(options: BuildOptions, console: Console | None = None) -> BuildResult:
    """Build the folder `options.output`/`options.name`, or find that exactly this build is there already.

    It appears whole or not at all. Progress is shown on `console` if that is a terminal; otherwise each
    stage is logged.

    Raises ConfigError, ExportError or EngineBuildError for what cannot be built, and CapacityError if the
    disk is too full or another process is building the same folder.
    """
    target = options.output.expanduser().resolve() / options.name
    find_existing(target)  # refuses what must not be replaced before any work is done
    choose_engine_target(options)  # what is not installed is said before a model is fetched
    cache = _open_cache(options)
    try:
        with staging(target) as area, Stages(console) as stages:
            with stages.stage("open checkpoint"):
                checkpoint = Checkpoint.open(options.model)
                plan = make_plan(
                    options,
                    checkpoint.config,
                    checkpoint.dtype,
                    checkpoint.quant_method,
                    [
                        weight
                        for weight in checkpoint.quantized.values()
                        if isinstance(weight, QuantizedLinear)
                    ],
                )
            with stages.stage("hash checkpoint"):
                key = build_key(checkpoint.content_key(), plan)
            cached = _reuse(target, key, options)
            if cached is not None:
                return cached
            _check_disk_space(area.folder, checkpoint, plan)
            calibration = Calibration()
            if plan.quantization is not None and plan.quantization.calibration_sha256 is not None:
                with stages.stage("calibrate") as stage:
                    calibration = _calibrate(checkpoint, plan.quantization, options, stage)
            manifest, report = _fill(area, checkpoint, plan, calibration, key, options.model, cache, stages)
            find_existing(target)  # again: building took a while
            area.publish()
    except OSError as error:
        raise EngineBuildError(f"{target} could not be built: {error}") from error
    return BuildResult(target, manifest, report, cached=False)


def _open_cache(options: BuildOptions) -> EngineCache | None:
    # Full TensorRT's engines are for one model of GPU, of which a cache would have to know.
    if options.runtime != "tensorrt-rtx" or options.engine_cache is None:
        return None
    return EngineCache(options.engine_cache)


def _calibrate(
    checkpoint: Checkpoint, quantization: Quantization, options: BuildOptions, stage: Stage
) -> Calibration:
    from trtforge.builder.quantization.calibration import calibrate, default_cache_folder

    stage.describe("run the model on texts")
    return calibrate(
        checkpoint,
        quantization,
        calibration_texts(options.calibration_text),
        default_cache_folder(),
        stage.on_progress,
    )


def _reuse(target: Path, key: str, options: BuildOptions) -> BuildResult | None:
    existing = find_existing(target)
    if existing is None:
        return None
    if existing.build_key == key:
        if not existing.is_intact():
            return None
        version = target / VERSION_FOLDER
        return BuildResult(target, Manifest.load(version), BuildReport.load(version), cached=True)
    if not options.force:
        raise ConfigError(
            f"{target} holds a build of another model, with other options or by another version: give "
            "--force to replace it, or another --name"
        )
    return None


def _check_disk_space(folder: Path, checkpoint: Checkpoint, plan: BuildPlan) -> None:
    shapes = [tensor.shape for tensor in checkpoint.tensors.values()]
    shapes += [linear.shape for linear in checkpoint.quantized.values()]
    text_config = checkpoint.config.get_text_config(decoder=True)
    if plan.parallelism.pp > 1 and getattr(text_config, "tie_word_embeddings", False):
        # Stored once, and written for the first stage and the last one.
        shapes.append((text_config.vocab_size, text_config.hidden_size))
    # An upper bound: as if nothing was quantized.
    weight_bytes = sum(map(math.prod, shapes)) * element_bytes(plan.dtype)
    # An engine holds the weights once more.
    needed_bytes = weight_bytes * (1 if plan.target is None else 2) + _OTHER_BYTES
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CapacityError(
            f"the disk of {folder.parent.parent} has {free_bytes:,} bytes free, the build needs "
            f"{needed_bytes:,}: make room, or give an --output on another disk"
        )


def _fill(
    area: Staging,
    checkpoint: Checkpoint,
    plan: BuildPlan,
    calibration: Calibration,
    key: str,
    source: str,
    cache: EngineCache | None,
    stages: Stages,
) -> tuple[Manifest, BuildReport]:
    """Make the model's whole folder in the staging area."""
    version = area.folder / VERSION_FOLDER
    with stages.stage("convert tokenizer"):
        write_tokenizer(checkpoint.tokenizer, version / TOKENIZER_FOLDER)
    with stages.stage("export graph") as stage:
        # Its imports take seconds, which a cache hit does without.
        from trtforge.builder.export import export_ranks

        exported = export_ranks(
            checkpoint,
            plan.dtype,
            plan.parallelism,
            cache_dtype=plan.graph_cache_dtype,
            quantization=plan.quantization,
            lowering=plan.lowering,
            activations=plan.activations,
            calibration=calibration,
            on_stage=stage.describe,
        )
        kv_cache = plan_kv_cache(plan, exported.layers)
    ranks, known = write_ranks(exported.ranks, plan, kv_cache, cache, version, stages)
    with stages.stage("hash files"):
        digests = {name: known.get(file) or file_digest(file) for name, file in _files(version).items()}
    with stages.stage("flush to disk"):
        area.flush()
    manifest = _manifest(exported.ranks[0], plan, kv_cache, key, ranks)
    report = BuildReport.of(
        manifest,
        source=source,
        num_nodes=sum(rank.num_nodes for rank in exported.ranks),
        num_heads=[rank.num_heads for rank in exported.ranks],
        weight_bytes=[rank.weight_bytes for rank in exported.ranks],
        weights=[rank.weights for rank in exported.ranks],
        stages=stages.records,
    )
    report.save(version)
    sizes = {name: file.stat().st_size for name, file in _files(version).items()}
    manifest = manifest.model_copy(update={"files": sizes, "sha256": digests})
    install_triton_model(area.folder, manifest)
    return manifest, report


def _files(folder: Path) -> dict[str, Path]:
    """All files in `folder` by their names relative to it."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _manifest(
    exported: ExportedModel, plan: BuildPlan, kv_cache: KVCacheLayout, key: str, ranks: tuple[Rank, ...]
) -> Manifest:
    """The manifest of a build whose files are not all written yet."""
    return Manifest(
        trtforge_version=trtforge.__version__,
        build_key=key,
        runtime=plan.runtime,
        dtype=plan.dtype,
        model=ModelInfo(
            name=plan.name,
            architecture=exported.architecture,
            vocab_size=exported.vocab_size,
            num_parameters=exported.num_parameters,
            eos_token_ids=exported.eos_token_ids,
        ),
        kv_cache=kv_cache,
        limits=plan.limits,
        tp_size=plan.parallelism.tp,
        pp_size=plan.parallelism.pp,
        ranks=ranks,
        tokenizer=TOKENIZER_FOLDER,
        files={},
    )
