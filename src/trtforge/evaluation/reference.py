"""What a build is compared with: another build, or a Hugging Face model that is built for the purpose."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from trtforge.errors import ConfigError
from trtforge.evaluation.windows import Text, tokenize
from trtforge.manifest import Manifest, find_manifest_folder


@contextmanager
def find_reference(
    source: str,
    manifest: Manifest,
    window: int,
    check_tokenizer: Callable[[Path], None],
    console: Console,
) -> Iterator[Path]:
    """The folder of a build: `source` itself if it is one.

    A Hugging Face model is built, in a temporary folder, for the runtime and in the dtype of `manifest`, so
    that nothing but the weights and the dtype of the KV cache differ. `check_tokenizer` is given the folder
    of its tokenizer before that.

    Raises what `find_manifest_folder`, `check_tokenizer` and `build` raise.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        folder = find_manifest_folder(path)
        check_tokenizer(folder / Manifest.load(folder).tokenizer)
        yield folder
        return
    if manifest.runtime == "fake":
        raise ConfigError(f"--against {source} cannot be built for the runtime {manifest.runtime!r}")
    with console.status("loading transformers"):
        # Only now: they take seconds to import.
        from trtforge.builder.build import build
        from trtforge.builder.checkpoint import Checkpoint
        from trtforge.builder.options import BuildOptions
        from trtforge.builder.tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory(prefix="trtforge-evaluate-") as scratch:
        tokenizer = Path(scratch, "tokenizer")
        write_tokenizer(Checkpoint.open(source).tokenizer, tokenizer)
        check_tokenizer(tokenizer)
        options = BuildOptions(
            model=source,
            output=Path(scratch, "repository"),
            runtime=manifest.runtime,
            dtype=manifest.dtype,
            max_model_len=window,
            max_num_seqs=manifest.limits.max_num_seqs,
            max_num_batched_tokens=manifest.limits.max_num_batched_tokens,
            block_size=manifest.kv_cache.block_size,
        )
        yield find_manifest_folder(build(options, console).folder)


def check_same_tokens(text: Text, content: str, tokenizer: Path) -> None:
    """Raise ConfigError unless the tokenizer in the folder `tokenizer` makes `text` of `content` too."""
    other = tokenize(content, tokenizer)
    if other == text:
        return
    ours, theirs = (*text.prefix, *text.tokens), (*other.prefix, *other.tokens)
    pairs = enumerate(zip(ours, theirs, strict=False))
    differs = next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    raise ConfigError(
        f"the tokenizers differ: the build reads the text as {len(ours):,} tokens, what it is compared with "
        f"as {len(theirs):,}, which differ from token {differs:,} on; give --against the model that "
        "the build was made from"
    )
