"""The residual of a layer is added and the sum normalized."""
