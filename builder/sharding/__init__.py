"""The graphs of tensor-parallel ranks and pipeline stages, out of the graph of the whole model."""
