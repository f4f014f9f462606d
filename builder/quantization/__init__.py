"""Weights in fewer bits: how they are rounded, read from checkpoints, and placed in the graph."""
