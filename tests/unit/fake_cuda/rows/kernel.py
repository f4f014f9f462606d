"""What the bundles of these tests name as the source of their kernels."""
