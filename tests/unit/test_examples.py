"""Examples are calls that the operators' kernels take, on every architecture."""

from __future__ import annotations

import pytest

from trtforge.plugins.bundle import ARCHS
from trtforge.plugins.examples import EXAMPLES
from trtforge.plugins.graph_calls import kernels_for
from trtforge.plugins.operators import OPERATORS


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_whole_calls(name: str) -> None:
    for operator, call in EXAMPLES[name]:
        spec = OPERATORS[operator].spec
        assert {tensor.name for tensor in spec.inputs if not tensor.optional} <= call.shapes.keys()
        assert call.shapes.keys() == call.dtypes.keys() <= {tensor.name for tensor in spec.inputs}
        assert call.attributes.keys() == {attribute.name for attribute in spec.attributes}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_calls_that_kernels_take(name: str, arch: int) -> None:
    with_kernels = [call for call in EXAMPLES[name] if OPERATORS[call[0]].kernels is not None]
    for call in with_kernels:
        assert kernels_for([call], arch)
    # Layers share kernels: none depends on the sizes of a weight alone.
    assert len(kernels_for(with_kernels, arch)) < sum(len(kernels_for([call], arch)) for call in with_kernels)
