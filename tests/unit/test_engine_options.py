"""What operators set: parameters of config.pbtxt, and where ranks are by the environment."""

from __future__ import annotations

import pytest

from trtforge.engine_options import EXECUTOR_VARIABLE, EngineOptions
from trtforge.errors import ConfigError


def test_what_the_builder_writes_is_what_the_runtime_reads() -> None:
    options = EngineOptions(
        kv_cache_fraction=0.5, prefix_caching=False, preemption_mode="swap", executor="ray"
    )
    assert EngineOptions.from_parameters(options.as_parameters()) == options


def test_the_environment_goes_first() -> None:
    written = EngineOptions().as_parameters()
    assert EngineOptions.from_parameters(written, {EXECUTOR_VARIABLE: "ray"}).executor == "ray"
    assert EngineOptions.from_parameters({"executor": "ray"}, {"OTHER": "local"}).executor == "ray"


@pytest.mark.parametrize(
    ("parameters", "environment", "message"),
    [
        ({"threads": "many"}, {}, "the parameter threads in config.pbtxt is 'many'"),
        ({"step_timeout": "3"}, {}, "the parameter step_timeout in config.pbtxt is '3': Extra inputs"),
        ({"executor": "slurm"}, {}, "the parameter executor in config.pbtxt is 'slurm'"),
        (
            {},
            {EXECUTOR_VARIABLE: "slurm"},
            "the parameter executor in the variable TRTFORGE_EXECUTOR is 'slurm': Input should be 'local'",
        ),
    ],
)
def test_what_is_not_allowed_is_named(
    parameters: dict[str, str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions.from_parameters(parameters, environment)
    assert str(caught.value).startswith(message)
