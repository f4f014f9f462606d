"""Builds engines: one thin layer over `tensorrt` and `tensorrt_rtx`, whose Python interfaces are one.

No other module of the builder imports them, and this one does only when an engine is wanted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trtforge.builder.engine_facts import EngineFacts, EngineLayers, EngineTensor
from trtforge.builder.engine_progress import BuildPhases
from trtforge.errors import ConfigError, EngineBuildError, PluginError
from trtforge.manifest import Profile
from trtforge.plugins.aot import check_compiler
from trtforge.tensorrt_package import PACKAGES, load_package, package_logger, with_reasons

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]

# GPUs before Ampere have no bfloat16.
_FIRST_COMPUTE_CAPABILITY = (8, 0)
_FIRST_WITH_FP8 = (8, 9)

# Told how much is done, 0 to 1, and what is being done.
OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """What engines are built by, and for which GPUs."""

    package: str
    version: str
    compute_capabilities: tuple[str, ...]  # such as 8.9
    workspace_bytes: int | None = None  # of scratch memory that layers may use; None: TensorRT's default
    weight_streaming: bool = False  # weights may stay in host memory


def choose_target(
    runtime: EngineRuntime,
    gpus: Sequence[str] = (),
    *,
    workspace_bytes: int | None = None,
    weight_streaming: bool = False,
    fp8_option: str | None = None,
) -> EngineTarget:
    """The target for GPUs such as "sm_89"; without any all that the package can build for. That is this
    machine's GPU alone for full TensorRT, which also needs the compiler of its plugins' kernels.

    Raises ConfigError if the package or the compiler is not installed, or if it cannot build for one of the
    GPUs, which for `fp8_option`, if it is given, have to have 8-bit floats.
    """
    package = PACKAGES[runtime]
    trt = load_package(package)
    if package == "tensorrt":
        check_compiler()
    known = _compute_capabilities(trt) or (own_compute_capability(package),)
    chosen = tuple(re.sub(r"sm_(\d+)(\d)", r"\1.\2", gpu) for gpu in gpus)
    unknown = [gpu for gpu, capability in zip(gpus, chosen, strict=True) if capability not in known]
    if unknown:
        raise ConfigError(
            f"--gpu {unknown[0]} is not possible with {package} {trt.__version__}, which builds "
            f"for {_gpu_names(known)} here"
        )
    if fp8_option is not None:
        able = tuple(capability for capability in known if not without_fp8([capability]))
        lacking = without_fp8(chosen) if able else known
        if lacking:
            raise ConfigError(
                f"{fp8_option} is not possible for {_gpu_names(lacking)}: GPUs have 8-bit floats from sm_89 "
                "on; leave one of the two out"
            )
        known = able
    return EngineTarget(
        package, trt.__version__, chosen or known, workspace_bytes, weight_streaming=weight_streaming
    )


def without_fp8(compute_capabilities: Sequence[str]) -> list[str]:
    """Those of the compute capabilities whose GPUs have no 8-bit floats."""
    return [text for text in compute_capabilities if tuple(map(int, text.split("."))) < _FIRST_WITH_FP8]


def check_fp8(target: EngineTarget) -> None:
    """Raises EngineBuildError if one of the target's GPUs has no 8-bit floats."""
    lacking = without_fp8(target.compute_capabilities)
    if lacking:
        raise EngineBuildError(
            f"the model has weights of 8-bit floats, which {_gpu_names(lacking)} cannot compute with: give "
            "the GPUs to build for, such as --gpu sm_89"
        )


def _gpu_names(compute_capabilities: Sequence[str]) -> str:
    return ", ".join(f"sm_{capability.replace('.', '')}" for capability in compute_capabilities)


class Network:
    """A graph that TensorRT has parsed, ready to be built."""

    def __init__(self, graph: bytes, path: Path, package: str) -> None:
        """Parse the serialized ONNX model `graph`; its external data lies beside `path`, at any size.

        Raises EngineBuildError with all that the parser does not take, and where.
        """
        self._trt = load_package(package)
        self._logger = package_logger(package)
        self._builder = self._trt.Builder(self._logger)
        self._network = self._builder.create_network(_network_flags(self._trt))
        # Holds the weights that the network refers to.
        self._parser = self._trt.OnnxParser(self._network, self._logger)
        if not self._parser.parse(graph, str(path.resolve())):
            errors = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
            raise EngineBuildError(
                with_reasons(
                    f"{package} {self._trt.__version__} does not take the graph", map(_describe, errors)
                )
            )

    @property
    def num_layers(self) -> int:
        """Layers of TensorRT, of which a node of ONNX becomes one or several."""
        return int(self._network.num_layers)

    def facts(self) -> EngineFacts:
        """What can be said of the engine before it is built, and not after."""
        layers = map(self._network.get_layer, range(self._network.num_layers))
        counts = Counter(
            (layer.type.name.lower(), _dtype_name(layer.get_output(0)))
            for layer in layers
            if layer.num_outputs
        )
        return EngineFacts(
            inputs=self.inputs(),
            outputs=self.outputs(),
            layers=tuple(
                EngineLayers(type=kind, dtype=dtype, count=count)
                for (kind, dtype), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            ),
        )

    def inputs(self) -> tuple[EngineTensor, ...]:
        """What the engine is going to take, in the graph's order."""
        return tuple(map(self._tensor, map(self._network.get_input, range(self._network.num_inputs))))

    def outputs(self) -> tuple[EngineTensor, ...]:
        """What the engine is going to give, in the graph's order."""
        return tuple(map(self._tensor, map(self._network.get_output, range(self._network.num_outputs))))

    def build(
        self, target: EngineTarget, profiles: Sequence[Profile], on_progress: OnProgress | None = None
    ) -> memoryview:
        """The serialized engine.

        An exception from `on_progress`, KeyboardInterrupt too, ends the build and is raised. Raises
        EngineBuildError with what TensorRT says.
        """
        self._logger.errors.clear()
        config = self._builder.create_builder_config()
        self._set_target(config, target)
        for profile in profiles:
            self._add_profile(config, profile)
        monitor = _monitor(self._trt, on_progress or (lambda fraction, phase: None))
        config.progress_monitor = monitor
        engine = self._builder.build_serialized_network(self._network, config)
        if monitor.error is not None:
            raise monitor.error
        if engine is None:
            raise EngineBuildError(
                with_reasons(
                    f"{target.package} {target.version} cannot build the engine", self._logger.errors
                )
            )
        return memoryview(engine)

    def _tensor(self, tensor: Any) -> EngineTensor:
        dims = tuple(
            int(size) if size >= 0 else tensor.get_dimension_name(axis) or -1
            for axis, size in enumerate(tensor.shape)
        )
        dtype = _dtype_name(tensor)
        return EngineTensor(name=tensor.name, dtype=dtype, dims=dims)

    def _set_target(self, config: Any, target: EngineTarget) -> None:
        if hasattr(self._trt, "ComputeCapability"):
            config.num_compute_capabilities = len(target.compute_capabilities)
            for index, capability in enumerate(target.compute_capabilities):
                member = getattr(self._trt.ComputeCapability, f"SM{capability.replace('.', '')}")
                config.set_compute_capability(member, index)
        if target.workspace_bytes is not None:
            config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, target.workspace_bytes)
        if target.weight_streaming:
            config.set_flag(self._trt.BuilderFlag.WEIGHT_STREAMING)
        if target.package == "tensorrt":
            config.set_preview_feature(self._trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)

    def _add_profile(self, config: Any, profile: Profile) -> None:
        added = self._builder.create_optimization_profile()
        for tensor in self.inputs():
            unknown = [dim for dim in tensor.dims if not isinstance(dim, int) and dim not in profile.dims]
            if unknown or -1 in tensor.dims:
                raise EngineBuildError(
                    f"input {tensor.name} has the dims {tensor.dims}, for some of which the profile "
                    f"{profile.name} has no range"
                )
            ranges = [dim if isinstance(dim, int) else profile.dims[dim] for dim in tensor.dims]
            shapes = [
                tuple(dim if isinstance(dim, int) else getattr(dim, end) for dim in ranges)
                for end in ("min", "opt", "max")
            ]
            added.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(added) < 0:
            raise EngineBuildError(
                with_reasons(f"TensorRT does not take the profile {profile.name}", self._logger.errors)
            )


def _dtype_name(tensor: Any) -> str:
    """As numpy calls it."""
    name: str = tensor.dtype.name
    others = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
    return others.get(name, name.lower())


def _compute_capabilities(trt: Any) -> tuple[str, ...]:
    """The compute capabilities that can be chosen; none where the package builds for this machine's GPU."""
    if not hasattr(trt, "ComputeCapability"):
        return ()
    matches = [re.fullmatch(r"SM(\d+)(\d)", name) for name in trt.ComputeCapability.__members__]
    pairs = sorted((int(match[1]), int(match[2])) for match in matches if match is not None)
    return tuple(f"{major}.{minor}" for major, minor in pairs if (major, minor) >= _FIRST_COMPUTE_CAPABILITY)


def own_compute_capability(package: str) -> str:
    """This machine's. Raises ConfigError if it has no GPU, or one that there are no kernels for."""
    if find_spec("cuda") is None:
        raise ConfigError(f"{package} builds on a GPU, through cuda-bindings: pip install 'trtforge[gpu]'")
    from trtforge.plugins.bundle import arch_for
    from trtforge.plugins.cuda_driver import Device

    try:
        capability = Device().compute_capability
        arch_for(capability)
    except PluginError as error:
        raise ConfigError(f"{package} builds for the GPU of the machine that it runs on: {error}") from error
    return f"{capability // 10}.{capability % 10}"


def _network_flags(trt: Any) -> int:
    """Types are those of the graph; what is the only way to build has no flag any more."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _error(headline: str, reasons: Iterable[str]) -> EngineBuildError:
    return EngineBuildError(with_reasons(headline, reasons))


def _describe(error: Any) -> str:
    """What the parser says about one node."""
    node = f"node {error.node()} {error.node_name()} ({error.node_operator()})"
    return f"{node}: {error.code().name}, {error.desc()}"


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports progress. An exception must not pass through TensorRT: it is kept, and ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._phases = BuildPhases()

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self._phases.start(name, parent, num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                self._phases.step(name, step)
                on_progress(self._phases.fraction, self._phases.innermost)
            except BaseException as error:
                self.error = error
            return self.error is None

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)

    return Monitor()
