"""What a TensorRT plugin of version 3 does, derived from an operator's declaration and its plan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from trtforge.errors import PluginError
from trtforge.plugins.launch import Gpu, Kernels, Plan, workspace_layout
from trtforge.plugins.op import DOMAIN, OPSET_VERSION
from trtforge.plugins.signature import Signature
from trtforge.plugins.trt_fields import Collection, NodeFields, TensorRT

logger = logging.getLogger(__name__)

# TensorRT's names of dtypes and numpy's.
DTYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}

Method = TypeVar("Method", bound=Callable[..., Any])


def logged(method: Method) -> Method:
    """Log what a method of an object with a `label` raises.

    TensorRT calls methods from C++, which prints an exception to stderr and fails without a reason later on.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:
            traceback = not isinstance(error, PluginError)
            logger.error("plugin %s, %s: %s", self.label, method.__name__, error, exc_info=traceback)
            raise

    return cast(Method, wrapper)


class PlanLauncher(Protocol):
    """What plugins need of a Launcher."""

    @property
    def gpu(self) -> Gpu: ...
    def load(self, plan: Plan) -> None: ...
    def launch(
        self, plan: Plan, pointers: Mapping[str, int], workspace_pointer: int, stream: int
    ) -> None: ...


@dataclass(slots=True, eq=False)
class Node:
    """What a plugin and its clones stand for, and share."""

    name: str
    signature: Signature
    kernels: Kernels
    fields: NodeFields  # replaced when the workspace grows, which TensorRT may ask any clone about
    launcher: Callable[[], PlanLauncher]


class Plugin:
    """One node of a network. `plugin_type` adds TensorRT's classes, whose methods these are.

    Tensors are dense and lie one after another in memory as declared; an output that shares an input's
    memory has to get its very address.
    """

    def __init__(self, trt: TensorRT, node: Node, plan: Plan | None = None) -> None:
        for capability in _capabilities(trt):
            capability.__init__(self)
        spec = node.signature.spec
        self.label = f"{node.name} ({spec.name})"
        self.plugin_name = spec.name
        self.plugin_namespace = DOMAIN
        self.plugin_version = str(OPSET_VERSION)
        self.num_outputs = len(spec.outputs)
        self._trt = trt
        self._node = node
        self._plan = plan  # of the shapes that the next launch has
        self._serialized: Collection | None = None  # alive while TensorRT reads it

    def get_capability_interface(self, type_: Any) -> Plugin:
        return self

    def clone(self) -> Plugin:
        return type(self)(self._trt, self._node, self._plan)

    # While an engine is built.

    @logged
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        dtypes = self._node.signature.output_dtypes([self._dtype(type_) for type_ in input_types])
        names = {dtype: name for name, dtype in DTYPES.items()}
        return [getattr(self._trt.DataType, names[dtype]) for dtype in dtypes]

    @logged
    def get_output_shapes(
        self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
    ) -> list[Any]:
        return [
            self._trt.DimsExprs(
                [builder.constant(dim) if isinstance(dim, int) else inputs[dim[0]][dim[1]] for dim in dims]
            )
            for dims in self._node.signature.output_dims([len(dims) for dims in inputs])
        ]

    @logged
    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        # Those behind `position` are not decided yet.
        dtypes = [DTYPES.get(tensor.desc.type.name) for tensor in in_out[: position + 1]]
        is_linear = in_out[position].desc.format == self._trt.TensorFormat.LINEAR
        return is_linear and self._node.signature.accepts(dtypes)

    def get_aliased_input(self, output: int) -> int:
        position = self._node.signature.aliased_input(output)
        return -1 if position is None else position

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing is fixed here: kernels follow from the shapes of each step."""

    @logged
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes that suffice for every shape of the profile."""
        dtypes = [self._dtype(tensor.desc.type) for tensor in inputs]
        num_bytes = max(
            workspace_layout(self._make_plan([tuple(getattr(tensor, bound)) for tensor in inputs], dtypes))[1]
            for bound in ("min", "opt", "max")
        )
        fields = self._node.fields
        if num_bytes > fields.workspace_bytes:
            self._node.fields = replace(fields, workspace_bytes=num_bytes)
        return num_bytes

    @logged
    def get_fields_to_serialize(self) -> Any:
        self._serialized = self._node.fields.for_engine(self._trt)
        return self._serialized.fields

    # While an engine runs.

    def attach_to_context(self, context: Any) -> Plugin:
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """There are no tactics."""

    @logged
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Plan the launches and load their kernels, so that `enqueue` does nothing but launch."""
        plan = self._make_plan(
            [tuple(tensor.dims) for tensor in inputs], [self._dtype(tensor.type) for tensor in inputs]
        )
        self._node.launcher().load(plan)
        self._plan = plan

    @logged
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        if self._plan is None:
            raise PluginError(f"{self.label} was enqueued before it got shapes")
        needed, reserved = workspace_layout(self._plan)[1], self._node.fields.workspace_bytes
        if needed > reserved:
            raise PluginError(
                f"{self.label} needs {needed} bytes of workspace for these shapes; {reserved} sufficed for "
                "those that the engine was built for"
            )
        signature = self._node.signature
        for position, (tensor, address) in enumerate(zip(signature.spec.outputs, outputs, strict=True)):
            source = signature.aliased_input(position)
            if source is not None and inputs[source] != address:
                raise PluginError(
                    f"{self.label}: {tensor.name} is at {address:#x} and not in the memory of "
                    f"{signature.inputs[source].name}, at {inputs[source]:#x}: build the engine with "
                    "PreviewFeature.ALIASED_PLUGIN_IO_10_03 and bind both to one address"
                )
        tensors = (*signature.inputs, *signature.spec.outputs)
        pointers = {
            tensor.name: address for tensor, address in zip(tensors, (*inputs, *outputs), strict=True)
        }
        self._node.launcher().launch(self._plan, pointers, workspace, stream)

    def _make_plan(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> Plan:
        call = self._node.signature.call(shapes, dtypes, self._node.fields.attributes)
        return self._node.kernels.plan(call, self._node.launcher().gpu)

    def _dtype(self, type_: Any) -> str:
        if type_.name not in DTYPES:
            raise PluginError(f"{self.label}: no operator takes {type_.name}; there are {sorted(DTYPES)}")
        return DTYPES[type_.name]


def plugin_type(trt: TensorRT) -> type[Plugin]:
    """Plugin as a class of this TensorRT's."""
    return type("OperatorPlugin", (Plugin, *_capabilities(trt)), {})


def _capabilities(trt: TensorRT) -> tuple[Any, ...]:
    return trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime
