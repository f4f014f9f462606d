"""A projection whose weight is stored in four bits."""
