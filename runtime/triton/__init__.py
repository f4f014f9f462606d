"""What Triton loads: tensors to requests, outputs to responses."""
