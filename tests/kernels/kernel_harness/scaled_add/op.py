"""ScaledAdd: add a scaled tensor to another, in place."""

from __future__ import annotations

from onnxscript import ir

from kernel_harness.scaled_add.launch import choices, plan
from trtforge.plugins.body import Attributes, Body, Inputs
from trtforge.plugins.launch import Kernels
from trtforge.plugins.op import FLOATS, Array, Attribute, OpSpec, Tensor
from trtforge.plugins.operator import Operator

SCALED_ADD = OpSpec(
    name="ScaledAdd",
    doc="total_out = total + scale * x, in float32, rounded once.",
    inputs=(Tensor("total", "T", ("num_rows", "width")), Tensor("x", "T", ("num_rows", "width"))),
    outputs=(Tensor("total_out", "T", ("num_rows", "width")),),
    dtypes={"T": FLOATS},
    attributes=(Attribute("scale", "float", 1.0),),
    aliases={"total_out": "total"},
)


def scaled_add(total: Array, x: Array, *, scale: float) -> Array:
    return (total.astype("float32") + scale * x.astype("float32")).astype(total.dtype)


def write_body(body: Body, inputs: Inputs, attributes: Attributes) -> tuple[ir.Value]:
    x = body("Cast", inputs["x"], to=ir.DataType.FLOAT)
    scaled = body("Mul", x, float(attributes["scale"]))
    total = body("Add", body("Cast", inputs["total"], to=ir.DataType.FLOAT), scaled)
    return (body("CastLike", total, inputs["total"]),)


OPERATOR = Operator(SCALED_ADD, scaled_add, write_body, Kernels(plan, choices))
