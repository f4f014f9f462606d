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
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launch import Kernels
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.op import DOMAIN, OPSET_VERSION, OpSpec
from trtforge.plugins.signature import Signature
from trtforge.plugins.trt_fields import INPUT_NAMES, NodeFields, TensorRT, field_names
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


def register(trt: TensorRT, operators: Operators, bundle: Bundle, device: int = 0) -> None:
    """Register a creator for each of `operators` with TensorRT until the process ends.

    Their kernels are those of `bundle`, on the CUDA device of this ordinal, which is used once a plugin needs
    it. Raises PluginError for TensorRT-RTX, whose parser aborts the process where it finds a creator, and for
    an operator that is registered already.
    """
    if trt.__name__.startswith("tensorrt_rtx"):
        raise PluginError("TensorRT-RTX takes no plugins: add the operators' function bodies to the model")
    registry = trt.get_plugin_registry()
    for creator in make_creators(trt, operators, functools.partial(Launcher, bundle, device)):
        if not registry.register_creator(creator, DOMAIN):
            raise PluginError(f"{creator.name} is registered already: a process serves engines of one bundle")
        _registered.append(creator)


def make_creators(
    trt: TensorRT, operators: Operators, make_launcher: Callable[[], PlanLauncher]
) -> tuple[Any, ...]:
    """An IPluginCreatorV3One for each of `operators`; one launcher, made when needed, serves them all."""
    creator_type = type("OperatorCreator", (_Creator, trt.IPluginCreatorV3One), {})
    make_plugin = functools.partial(plugin_type(trt), trt)
    launcher = functools.cache(make_launcher)
    return tuple(
        creator_type(trt, spec, kernels, launcher, make_plugin) for spec, kernels in operators.items()
    )


class _Creator:
    """Makes the plugins of one operator, from the fields of a parsed node or of an engine alike."""

    def __init__(
        self,
        trt: TensorRT,
        spec: OpSpec,
        kernels: Kernels,
        launcher: Callable[[], PlanLauncher],
        make_plugin: Callable[[Node], Plugin],
    ) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.label = self.name = spec.name
        self.plugin_namespace = DOMAIN
        self.plugin_version = str(OPSET_VERSION)
        self._field_names = field_names(trt, spec)
        self.field_names = self._field_names.fields
        self._spec = spec
        self._kernels = kernels
        self._launcher = launcher
        self._make_plugin = make_plugin

    @logged
    def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> Plugin:
        found = NodeFields.read(self._spec, fields)
        signature = Signature(self._spec, found.input_names)
        return self._make_plugin(Node(name, signature, self._kernels, found, self._launcher))
