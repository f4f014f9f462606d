"""Makes operators known to TensorRT.

An engine keeps what a node has as plugin fields, and no kernels. They come from the bundle that the creators
were registered with, the one in the engine's folder: register it before an engine is built or deserialized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import onnx

from trtforge.errors import PluginError
from trtforge.plugins.launch import Kernels
from trtforge.plugins.op import DOMAIN, OPSET_VERSION, OpSpec
from trtforge.plugins.signature import Signature
from trtforge.plugins.trt_fields import INPUT_NAMES, Fields, TensorRT, read_fields
from trtforge.plugins.trt_plugin import Node, PlanLauncher, Plugin, logged, plugin_type

Operators: TypeAlias = Mapping[OpSpec, Kernels]

_registered: list[Any] = []  # TensorRT's registry does not keep creators alive


def name_inputs(model: onnx.ModelProto, operators: Operators) -> None:
    """Leave the nodes of `operators` only the inputs that they have, and an attribute that names them.

    TensorRT knows inputs by position, and has none to pass for one that is left out in front of another one.
    It alone reads the model afterwards.
    """
    specs = {spec.name: spec for spec in operators}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in specs:
            continue
        tensors = zip(specs[node.op_type].inputs, node.input, strict=False)
        given = [(tensor.name, value) for tensor, value in tensors if value]
        names = ",".join(name for name, _ in given)
        node.attribute.append(onnx.helper.make_attribute(INPUT_NAMES, names))
        node.ClearField("input")
        node.input.extend(value for _, value in given)


def register(trt: TensorRT, operators: Operators, make_launcher: Callable[[], PlanLauncher]) -> None:
    """Register a creator for each of `operators` with TensorRT until the process ends.

    The launcher is made when a plugin first needs it. Raises PluginError for TensorRT-RTX, whose parser
    aborts the process where it finds a creator, and for an operator that is registered already.
    """
    if trt.__name__.startswith("tensorrt_rtx"):
        raise PluginError("TensorRT-RTX takes no plugins: add the operators' function bodies to the model")
    registry = trt.get_plugin_registry()
    for creator in make_creators(trt, operators, make_launcher):
        if not registry.register_creator(creator, DOMAIN):
            raise PluginError(f"{creator.name} is registered already: a process serves engines of one bundle")
        _registered.append(creator)


def make_creators(
    trt: TensorRT, operators: Operators, make_launcher: Callable[[], PlanLauncher]
) -> tuple[Any, ...]:
    """An IPluginCreatorV3One for each of `operators`; their plugins share the launcher."""
    creator_type = type("OperatorCreator", (_Creator, trt.IPluginCreatorV3One), {})
    plugin, launcher = plugin_type(trt), functools.cache(make_launcher)
    return tuple(creator_type(trt, spec, kernels, plugin, launcher) for spec, kernels in operators.items())


class _Creator:
    """Makes the plugins of one operator, from the fields of a parsed node or of an engine alike."""

    def __init__(
        self,
        trt: TensorRT,
        spec: OpSpec,
        kernels: Kernels,
        plugin: type[Plugin],
        launcher: Callable[[], PlanLauncher],
    ) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.label = self.name = spec.name
        self.plugin_namespace = DOMAIN
        self.plugin_version = str(OPSET_VERSION)
        self._fields = Fields(trt, spec)
        self.field_names = self._fields.collection
        self._trt, self._spec, self._kernels, self._plugin, self._launcher = (
            trt,
            spec,
            kernels,
            plugin,
            launcher,
        )

    @logged
    def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> Plugin:
        attributes, input_names = read_fields(self._spec, fields)
        signature = Signature(self._spec, input_names)
        return self._plugin(self._trt, Node(name, signature, self._kernels, attributes, self._launcher))
