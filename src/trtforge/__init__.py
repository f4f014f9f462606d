"""trtforge: Hugging Face LLMs as TensorRT deployments on a stock Triton Inference Server."""

__version__ = "0.1.0"
