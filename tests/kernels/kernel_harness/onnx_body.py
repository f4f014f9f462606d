"""An operator's function body, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from trtforge.plugins.body import STANDARD_OPSET
from trtforge.plugins.function_bodies import add_function_bodies
from trtforge.plugins.op import DOMAIN, OPSET_VERSION, Array, AttributeValue
from trtforge.plugins.operator import Operator
from trtforge.plugins.signature import Signature


def run_body(
    operator: Operator, inputs: Mapping[str, Array], attributes: Mapping[str, AttributeValue]
) -> tuple[Array, ...]:
    """The operator's outputs in declared order. On a CPU ONNX Runtime computes in no bfloat16."""
    model = add_function_bodies(model_of(operator, inputs, attributes))
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return tuple(session.run(None, {}))


def model_of(
    operator: Operator, inputs: Mapping[str, Array], attributes: Mapping[str, AttributeValue]
) -> onnx.ModelProto:
    """A model of one node, without a body. Inputs are constants: ONNX Runtime takes no e4m3 from numpy."""
    spec = operator.spec
    spec.register_schema()
    given = [tensor.name for tensor in spec.inputs if tensor.name in inputs]
    dtypes = Signature(spec, given).output_dtypes([inputs[name].dtype.name for name in given])
    node = helper.make_node(
        spec.name,
        [tensor.name if tensor.name in inputs else "" for tensor in spec.inputs],
        [tensor.name for tensor in spec.outputs],
        domain=DOMAIN,
        **spec.node_attributes(**attributes),
    )
    graph = helper.make_graph(
        [node],
        "test",
        [],
        [
            helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), t.dims)
            for t, dtype in zip(spec.outputs, dtypes, strict=True)
        ],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    opsets = [helper.make_opsetid("", STANDARD_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
