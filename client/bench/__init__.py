"""A load generator for a served model: `trtforge bench`."""
