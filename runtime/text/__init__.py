"""Text to tokens and back, incrementally."""
