"""What an operator may change about a built model when it is served: the parameters of config.pbtxt.

The builder writes all of them with their defaults, the runtime reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtforge.errors import ConfigError

SchedulerPolicy = Literal["max_utilization", "guaranteed_no_evict"]
PreemptionMode = Literal["recompute", "swap"]
ExecutorKind = Literal["local", "ray"]

# What this says of `executor` goes before config.pbtxt: one repository may be served here and on a cluster.
EXECUTOR_VARIABLE = "TRTFORGE_EXECUTOR"


class EngineOptions(BaseModel):
    """How an engine schedules, what it may keep, and when it gives up. Sizes are in bytes; 0 as noted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0)  # of a CPU engine; 0: its own choice
    # Who places a model's ranks, if it has several: this machine, or the Ray cluster that it belongs to.
    executor: ExecutorKind = "local"
    # The cache has as many blocks as the build planned, or as these allow if one of them is given.
    kv_cache_bytes: int = Field(default=0, ge=0)  # a hard cap; 0: none
    kv_cache_fraction: float = Field(default=0.0, ge=0, lt=1)  # of the memory that is free; 0: not looked at
    prefix_caching: bool = True
    scheduler_policy: SchedulerPolicy = "max_utilization"
    preemption_mode: PreemptionMode = "recompute"
    swap_bytes: int = Field(default=0, ge=0)  # host memory for swapped blocks
    max_queue_size: int = Field(default=4096, ge=1)  # requests waiting; more are refused
    default_timeout_s: float = Field(default=0.0, ge=0)  # of requests that name none; 0: none
    # The next step is scheduled while the executor runs the current one; not together with speculation.
    overlap_scheduling: bool = True
    speculative_tokens: int = Field(default=0, ge=0, le=64)  # drafted a step by prompt lookup; 0: off
    speculative_ngram: int = Field(default=3, ge=1, le=16)  # longest run of tokens looked up
    step_timeout_s: float = Field(default=300.0, ge=0)  # a step that takes longer ends the engine; 0: none

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, str], environment: Mapping[str, str] | None = None
    ) -> EngineOptions:
        """Read the parameters of config.pbtxt, and EXECUTOR_VARIABLE of the `environment`.

        Raises ConfigError, naming the parameter.
        """
        executor = (environment or {}).get(EXECUTOR_VARIABLE)
        try:
            return cls.model_validate_strings({**parameters, **({"executor": executor} if executor else {})})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            source = "config.pbtxt"
            if executor and name == "executor":
                source = f"the variable {EXECUTOR_VARIABLE}"
            raise ConfigError(
                f"the parameter {name} in {source} is {first['input']!r}: {first['msg']}"
            ) from None

    def as_parameters(self) -> dict[str, str]:
        """What `from_parameters` reads."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.model_dump().items()
        }
