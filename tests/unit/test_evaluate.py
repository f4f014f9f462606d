"""`trtforge evaluate`: perplexity and divergence against Hugging Face's logits, window by window."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.builder.quantization.rounding import round_weight
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.evaluation.scoring import perplexity_of, score
from trtforge.evaluation.windows import Text, cut, tokenize

Run = Callable[..., tuple[int, str, str]]
Build = Callable[..., Path]

TEXT = "The quick brown fox jumps over the lazy dog, naïve 早上好. " * 12
WINDOW, STRIDE = 64, 24


@pytest.fixture(scope="module")
def model(make_random_llama: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """A Hugging Face folder with a random model and the tokenizer, whose prompts begin with <|endoftext|>."""
    folder = make_random_llama(
        vocab_size=512, hidden_size=64, intermediate_size=96, max_position_embeddings=512
    )
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def repositories(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds of the model in float32, which steps of 50 tokens are for: as it is, and in int4."""
    made = {}
    for name, options in (("plain", {}), ("int4", {"int4": True})):
        made[name] = tmp_path_factory.mktemp(name)
        build(
            BuildOptions(
                model=str(model),
                output=made[name],
                dtype="float32",
                max_model_len=128,
                max_num_batched_tokens=50,
                **options,
            )
        )
    return made


def rows_of_windows(hf: Any, text: Text, window: int, stride: int) -> tuple[torch.Tensor, list[int]]:
    """Hugging Face's log-probabilities before each scored token, and the tokens."""
    room = window - len(text.prefix)
    rows, targets, done = [], [], 0
    for begin in range(0, len(text.tokens), stride):
        end = min(begin + room, len(text.tokens))
        sequence = [*text.prefix, *text.tokens[begin:end]]
        with torch.no_grad():
            logits = hf(torch.tensor([sequence])).logits[0].double().log_softmax(1)
        new = end - max(done, begin)
        rows.append(logits[len(sequence) - new - 1 : -1])
        targets += sequence[len(sequence) - new :]
        done = end
        if end == len(text.tokens):
            break
    return torch.cat(rows), targets


def losses_of(rows: torch.Tensor, targets: list[int]) -> torch.Tensor:
    return -rows[torch.arange(len(targets)), torch.tensor(targets)]


def round_projections(hf: Any) -> None:
    for name, parameter in hf.named_parameters():
        if "_proj" in name:
            size = 32 if parameter.shape[1] == 96 else 64
            rounded = round_weight(name, parameter.detach(), "int4", size).dequantize()
            parameter.data.copy_(torch.from_numpy(rounded))


def test_figures_are_those_of_hugging_face_s_logits(
    model: Path, repositories: dict[str, Path], run_trtforge: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    files = {"--json": tmp_path / "figures.json", "--svg": tmp_path / "figures.svg"}
    status, output, errors = run_trtforge(
        "evaluate",
        repositories["int4"],
        "--text",
        tmp_path / "text.txt",
        "--against",
        repositories["plain"],
        "--window",
        str(WINDOW),
        "--stride",
        str(STRIDE),
        *(part for option in files.items() for part in option),
    )
    assert (status, errors) == (0, "")
    figures = json.loads(files["--json"].read_text())
    text = tokenize(TEXT, model)
    assert text.prefix == (0,)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    log_p, targets = rows_of_windows(hf, text, WINDOW, STRIDE)
    round_projections(hf)
    log_q, _ = rows_of_windows(hf, text, WINDOW, STRIDE)
    losses, reference_losses = losses_of(log_q, targets), losses_of(log_p, targets)
    assert figures["num_scored"] == len(text.tokens) == len(losses)
    assert figures["model"]["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-3)
    assert figures["reference"]["perplexity"] == pytest.approx(math.exp(reference_losses.mean()), rel=1e-3)
    divergence = figures["divergence"]
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert divergence["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-2)
    assert divergence["max_kl"] == pytest.approx(float(kl.max()), rel=1e-2)
    same = (log_q.argmax(1) == log_p.argmax(1)).double().mean()
    assert divergence["top1"] == pytest.approx(float(same), abs=0.01)
    assert 0.3 < divergence["top1"] < 1
    ratio = math.exp(float((losses - reference_losses).mean()))
    assert divergence["perplexity_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert f"{figures['model']['perplexity']:.3f} ± " in output
    assert f"{ratio - 1:+.2%} ± " in output
    # Windows: the first scores 63 tokens, each other one 24 new ones or what is left.
    ends = [window["end"] for window in figures["windows"]]
    assert ends[:2] == [WINDOW - 1, WINDOW - 1 + STRIDE]
    assert ends[-1] == len(text.tokens)
    first = losses[: WINDOW - 1].mean()
    assert figures["windows"][0]["perplexity"] == pytest.approx(math.exp(first), rel=1e-3)
    packed = figures["reference"]["weight_bytes"] / figures["model"]["weight_bytes"]
    assert 1.2 < packed < 3  # the embeddings stay as they are
    assert figures["model"]["decode_tokens_per_s"] > 0
    picture = files["--svg"].read_text()
    assert picture.count("<polyline") == 3
    assert "Mean KL divergence from" in picture


def test_the_unquantized_model_is_built_for_the_comparison(
    model: Path, repositories: dict[str, Path], run_trtforge: Run, tmp_path: Path
) -> None:
    """The build of the very model has its logits."""
    (tmp_path / "text.txt").write_text(TEXT)
    status, output, _ = run_trtforge(
        "evaluate", repositories["plain"], "--text", tmp_path / "text.txt", "--against", model
    )
    assert status == 0
    assert "+0.00% ± 0.00%" in output
    assert "100.00%" in output
    assert "window 128, stride 127" in output


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("short", (), "tokens, which fill no window of 128"),
        (TEXT, ("--window", "129"), "--window 129 is more than"),
        (TEXT, ("--window", "64", "--stride", "64"), "--stride 64 is not allowed: it is 1 to 63"),
        (b"\xe9\xff", (), "text.txt cannot be read"),
        (TEXT, ("--against", "no-such-folder"), "no-such-folder"),
    ],
)
def test_what_cannot_work_is_one_line(
    repositories: dict[str, Path],
    run_trtforge: Run,
    tmp_path: Path,
    text: str | bytes,
    options: tuple[str, ...],
    said: str,
) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "text.txt").write_bytes(content)
    status, output, errors = run_trtforge(
        "evaluate", repositories["plain"], "--text", tmp_path / "text.txt", *options
    )
    assert (status, output) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("kind", ["model", "repository"])
def test_tokenizers_that_differ(
    model: Path, repositories: dict[str, Path], run_trtforge: Run, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    other = tmp_path / "other"
    shutil.copytree(model if kind == "model" else repositories["plain"], other)
    (file,) = other.rglob("tokenizer.json")
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:40]
    file.write_text(json.dumps(tokenizer))
    status, _, errors = run_trtforge(
        "evaluate", repositories["int4"], "--text", tmp_path / "text.txt", "--against", other
    )
    assert status == 2
    assert "the tokenizers differ" in errors


# --------------------------------------------------------------------------- its parts


def tokens_of(text: Text, window: int, stride: int) -> list[int]:
    scored = []
    for each in cut(text, window, stride):
        assert len(each.tokens) <= window
        scored += each.tokens[each.first_scored :].tolist()
    return scored


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("length", [8, 9, 23, 24])
def test_every_token_is_scored_once(length: int, stride: int) -> None:
    tokens = tuple(range(100, 100 + length))
    assert tokens_of(Text((7, 7), tokens), 10, stride) == list(tokens)
    scored = tokens_of(Text((), tokens), 8, stride)
    # Without a prefix, what begins a window has nothing before it, unless an earlier window has it too.
    left_out = set(range(100, 100 + length, 8)) if stride == 8 else {100}
    assert scored == [token for token in tokens if token not in left_out]


def test_windows_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="--stride 9 is not allowed: it is 1 to 8"):
        cut(Text((1, 2), tuple(range(20))), 10, 9)
    with pytest.raises(ConfigError, match="the text has 7 tokens, which fill no window of 10"):
        cut(Text((1, 2), tuple(range(7))), 10, 8)


def test_rows_are_scored_in_pieces_and_numbers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, reference = rng.standard_normal((2, 30, 11), np.float32) * 3
    targets = rng.integers(11, size=30).astype(np.int32)
    whole = score(logits, targets, reference)
    monkeypatch.setattr("trtforge.evaluation.scoring._CHUNK_ELEMENTS", 44)
    pieces = score(logits, targets, reference)
    np.testing.assert_array_equal(whole.divergences, pieces.divergences)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets).long(), reduction="none"
    )
    np.testing.assert_allclose(whole.losses, expected, rtol=1e-6)
    perplexity, error = perplexity_of(whole.losses)
    assert perplexity == pytest.approx(math.exp(expected.mean()))
    assert error == pytest.approx(perplexity * float(expected.std()) / math.sqrt(30))
    logits[4, 4] = np.nan
    with pytest.raises(EngineBuildError, match="NaN or infinity"):
        score(logits, targets, None)
