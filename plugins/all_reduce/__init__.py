"""The sum over the tensor-parallel ranks of a pipeline stage."""
