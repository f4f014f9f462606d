"""From options to a plan: read the config, build the model without weights, measure it."""

from __future__ import annotations

from typing import Any

import torch

from trtforge.builder.checkpoint import open_config
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.plan import choose_max_model_len
from trtforge.builder.planning.model_shape import measure
from trtforge.builder.planning.options import PlanOptions
from trtforge.builder.planning.report import PlanReport
from trtforge.manifest import DType

_16_BIT: tuple[DType, ...] = ("bfloat16", "float16")


def plan_model(options: PlanOptions) -> PlanReport:
    """Plan what `options` ask for.

    Raises ConfigError for what cannot be found or split that way, and ExportError for a model that cannot be
    exported.
    """
    config, stored = open_config(options.model)
    max_model_len = choose_max_model_len(options.max_model_len, config, options.model)
    dtype = _choose_dtype(options, config, stored)
    model = measure(build_meta_model(config, getattr(torch, dtype)))
    return PlanReport.of(model, options.deployment(max_model_len), source=options.model, dtype=dtype)


def _choose_dtype(options: PlanOptions, config: Any, stored: DType | None) -> DType:
    """Engines for GPUs compute in 16 bit: a float32 model is planned in bfloat16."""
    if options.dtype != "auto":
        return options.dtype
    wanted = stored or str(getattr(config.get_text_config(), "dtype", None)).removeprefix("torch.")
    return next((dtype for dtype in _16_BIT if dtype == wanted), "bfloat16")
