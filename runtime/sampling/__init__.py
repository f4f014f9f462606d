"""From logits to tokens: filters, penalties, grammars, random draws, log-probabilities."""
