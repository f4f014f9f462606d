"""What kernels here must not do: a tensor descriptor that the device makes needs scratch memory."""
