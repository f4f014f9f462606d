"""What tests of several folders share: a tiny tokenizer, tiny models, and a repository that needs none."""

from __future__ import annotations

import os

# Triton looks at it when it is imported first, which here is when torch or xgrammar want it: kernels are
# interpreted in the process of the tests, and compiled in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# Torch's threads wait for each other: where others have the cores, two are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from trtforge import cli
from trtforge.builder.build import build
from trtforge.builder.demo_model import fetch_demo_model
from trtforge.builder.options import BuildOptions
from trtforge.builder.repository import VERSION_FOLDER, install_triton_model
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo, Rank

# A shell has its background jobs ignore Ctrl-C, and with them all processes that tests start to send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE = Path(__file__).parents[1] / ".cache"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Où est la bibliothèque? Ça va très bien, merci.",
    "Быстрая лиса прыгает. 早上好, 世界! 🎉🎉 naïve café",
    "def add(a, b):\n    return a + b\n",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('tools are not supported') }}{% endif %}"
    "{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of some 400 tokens and a chat template.

    Prompts start with <|endoftext|>, as its post-processor says.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def make_random_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_random_llama(vocab_size=..., ...)`: a new Hugging Face folder with a llama of this LlamaConfig.

    It has two layers, 4 heads and 2 KV heads if nothing else is said, and no tokenizer.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**config: object) -> Path:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes | config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # far from uniform attention and logits, which a fresh model has
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_fake_repository(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path
) -> Callable[..., Path]:
    """`make_fake_repository(num_blocks=..., block_size=..., tp_size=..., pp_size=..., **limits)`: a new
    Triton model repository.

    Its one model is called "llm" and is served by the fake executor, or by one on each rank. It has no
    end-of-sequence token, which the fake would choose at random: answers are as long as max_tokens says.
    """
    vocab_size = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json")).get_vocab_size()

    def make(
        *, num_blocks: int = 512, block_size: int = 16, tp_size: int = 1, pp_size: int = 1, **limits: int
    ) -> Path:
        repository = tmp_path_factory.mktemp("repository")
        chosen = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 1024} | limits
        manifest = Manifest(
            trtforge_version="0",
            build_key="fake",
            runtime="fake",
            dtype="float32",
            model=ModelInfo(
                name="llm",
                architecture="Fake",
                vocab_size=vocab_size,
                num_parameters=1,
                eos_token_ids=(),
            ),
            kv_cache=KVCacheLayout(
                dtype="float32",
                block_size=block_size,
                num_blocks=num_blocks,
                layers=(LayerCache(num_kv_heads=1, head_dim=1),) * pp_size,
            ),
            limits=Limits(**chosen),
            tp_size=tp_size,
            pp_size=pp_size,
            ranks=_fake_ranks(tp_size, pp_size, vocab_size) if tp_size * pp_size > 1 else (),
            files={},
        )
        install_triton_model(repository / "llm", manifest)
        shutil.copytree(tiny_tokenizer, repository / "llm" / VERSION_FOLDER / manifest.tokenizer)
        return repository

    return make


def _fake_ranks(tp_size: int, pp_size: int, vocab_size: int) -> tuple[Rank, ...]:
    """With a layer for each stage, and columns for the ranks of the last one."""
    bounds = [vocab_size * rank // tp_size for rank in range(tp_size + 1)]
    columns = [(0, 0)] * (tp_size * (pp_size - 1)) + list(itertools.pairwise(bounds))
    layers = (LayerCache(num_kv_heads=1, head_dim=1),)
    return tuple(
        Rank(onnx=f"rank{rank}/model.onnx", kv_layers=layers, logits_columns=wanted)
        for rank, wanted in enumerate(columns)
    )


@pytest.fixture(scope="session")
def fake_repository(make_fake_repository: Callable[..., Path]) -> Path:
    """A repository of the fake executor with room for 16 full sequences."""
    return make_fake_repository()


@pytest.fixture
def run_trtforge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run_trtforge(*arguments)`: exit code, standard output and standard error of `trtforge`."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


@pytest.fixture(scope="session")
def find_engines() -> Callable[..., list[psutil.Process]]:
    """`find_engines(repository, own=False)`: the engine processes that serve its model "llm".

    `own`: those of this process's own clients alone; another test's server may serve the same repository.
    """

    def find(repository: Path, *, own: bool = False) -> list[psutil.Process]:
        option = f"--model-dir={repository / 'llm' / VERSION_FOLDER}"
        # What is asked for in advance is None of a process that ended meanwhile, or was not waited for.
        return [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if option in (process.info["cmdline"] or ()) and (not own or process.info["ppid"] == os.getpid())
        ]

    return find


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; kept in the checkout's .cache between runs."""
    return fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def demo_repository(demo_model: Path) -> Path:
    """The demo model in float32 as "llm"; built again only when what it is built from has changed."""
    options = BuildOptions(
        model=str(demo_model), output=CACHE / "repository-float32", dtype="float32", force=True
    )
    return build(options).folder.parent
