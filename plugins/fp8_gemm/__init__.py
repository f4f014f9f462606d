"""A projection whose weight is stored as 8-bit floats."""
