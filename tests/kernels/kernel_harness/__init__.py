"""What the tests of kernels are written with; on the path of the tests in this folder."""
