"""What a build costs in quality: perplexity of a text, and how far its logits are from another build's."""
