"""Scores a text by a build and by its reference, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trtforge.errors import ConfigError
from trtforge.evaluation.model import LoadedModel
from trtforge.evaluation.report import (
    Evaluation,
    ModelFigures,
    WindowFigures,
    divergence_of,
    window_figures,
)
from trtforge.evaluation.scoring import Float64Array, Rows, perplexity_of, score
from trtforge.evaluation.windows import Text, Window, cut


def evaluate(
    model: LoadedModel,
    reference: LoadedModel | None,
    text: Text,
    window: int,
    stride: int,
    on_progress: Callable[[int, int], None],
) -> Evaluation:
    """Score `text` in windows of `window` tokens; see `cut`.

    `on_progress(done, total)` counts tokens of the text. Raises ConfigError for a text or windows that do not
    go together and for models of different vocabularies, EngineBuildError for logits that are no numbers, and
    what an executor raises.
    """
    _check_vocabularies(model, reference)
    windows = cut(text, window, stride)
    models = [model] if reference is None else [model, reference]
    decode_s = [each.time_decodes(windows[0].tokens) for each in models]
    parts: list[Rows] = []
    figures: list[WindowFigures] = []
    for each_window in windows:
        rows = _score_window(model, reference, each_window)
        parts.append(rows)
        figures.append(window_figures(each_window.end, rows))
        on_progress(each_window.end, len(text.tokens))
    rows = Rows.concatenate(parts)
    return Evaluation(
        window=window,
        stride=stride,
        num_tokens=len(text.tokens),
        num_scored=len(rows.losses),
        model=_model_figures(model, rows.losses, decode_s[0]),
        reference=None
        if reference is None
        else _model_figures(reference, rows.reference_losses, decode_s[1]),
        divergence=divergence_of(rows),
        windows=tuple(figures),
    )


def _check_vocabularies(model: LoadedModel, reference: LoadedModel | None) -> None:
    if reference is None:
        return
    ours, theirs = (each.manifest.model.vocab_size for each in (model, reference))
    if ours != theirs:
        raise ConfigError(
            f"{model.name} has logits of {ours:,} tokens and {reference.name} of {theirs:,}: they cannot be "
            "compared, give the model that the build was made from"
        )


def _score_window(model: LoadedModel, reference: LoadedModel | None, window: Window) -> Rows:
    logits = model.predict(window)
    expected = None if reference is None else reference.predict(window)
    return score(logits, window.tokens[window.first_scored :], expected)


def _model_figures(model: LoadedModel, losses: Float64Array, decode_s: Sequence[float]) -> ModelFigures:
    perplexity, error = perplexity_of(losses)
    return ModelFigures(
        name=model.name,
        runtime=model.manifest.runtime,
        dtype=model.manifest.dtype,
        weight_bytes=model.weight_bytes,
        perplexity=perplexity,
        perplexity_error=error,
        prefill_tokens_per_s=model.num_prefill_tokens / model.prefill_s,
        decode_tokens_per_s=1 / float(np.median(decode_s)),
        decode_best_tokens_per_s=1 / min(decode_s),
    )
