"""What `trtforge plan` is asked for: options, checked before a model is looked at."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from trtforge.builder.options import check_positive
from trtforge.builder.planning.deployment import Deployment, WeightFormatName
from trtforge.builder.planning.gpus import FP8_CAPABILITY, find_gpu
from trtforge.builder.quantization.weights import ActivationScheme
from trtforge.errors import ConfigError
from trtforge.manifest import Limits

DTypeChoice = Literal["auto", "bfloat16", "float16"]
KVCacheChoice = Literal["auto", "fp8", "int8"]


class PlanOptions(BaseModel):
    """Everything `trtforge plan` takes but where its output goes.

    Raises ConfigError for values that cannot work whatever the model is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # local Hugging Face folder or hub id
    gpu: str
    tp: int = 1
    pp: int = 1
    fp8: bool = False
    int4: bool = False
    activations: ActivationScheme | None = None  # None: matmuls in 16 bit
    dtype: DTypeChoice = "auto"
    kv_cache_dtype: KVCacheChoice = "auto"
    max_model_len: int | None = None  # tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 32  # tokens
    memory_fraction: float = 0.9
    efficiency: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = {
            "--tp": self.tp,
            "--pp": self.pp,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
            "--block-size": self.block_size,
        }
        check_positive(counts)
        fractions = {"--memory-fraction": self.memory_fraction, "--efficiency": self.efficiency}
        for option, fraction in fractions.items():
            if not 0 < fraction <= 1:
                raise ConfigError(f"{option} {fraction:g} is not allowed: it has to be above 0 and at most 1")
        if self.fp8 and self.int4:
            raise ConfigError("--fp8 and --int4 are two formats of the same weights: give one of them")
        if self.activations is not None and not self.fp8:
            raise ConfigError("--activations has --fp8 multiply in FP8: give it with --fp8 only")
        self._check_gpu()
        return self

    def _check_gpu(self) -> None:
        compute = find_gpu(self.gpu).compute
        if self.weights == "fp8" and compute is not None and compute.capability < FP8_CAPABILITY:
            raise ConfigError(
                f"--activations {self.activations} multiplies in FP8, which {self.gpu} "
                f"(sm_{compute.capability}) cannot: it takes sm_{FP8_CAPABILITY} or newer; leave it out to "
                "multiply in 16 bit"
            )

    @property
    def weights(self) -> WeightFormatName:
        """The format of the weights of matmuls."""
        if self.fp8:
            return "fp8-weight-only" if self.activations is None else "fp8"
        return "int4" if self.int4 else "16-bit"

    def deployment(self, max_model_len: int) -> Deployment:
        """The deployment that is asked for, with sequences of up to `max_model_len` tokens."""
        return Deployment(
            gpu=find_gpu(self.gpu),
            tp=self.tp,
            pp=self.pp,
            weights=self.weights,
            kv_cache="16-bit" if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
            limits=Limits(
                max_model_len=max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
            ),
            block_size=self.block_size,
            memory_fraction=self.memory_fraction,
            efficiency=self.efficiency,
        )
