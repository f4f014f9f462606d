"""Compares what a build's runtimes compute. It knows the runtimes and the operators, not the builder."""
