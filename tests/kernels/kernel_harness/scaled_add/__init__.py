"""ScaledAdd: the smallest operator that has all that an operator with kernels has. For tests only."""
