"""Build time: Hugging Face checkpoint → ONNX → engine → Triton model repository."""
