"""Who runs in a step, and in which blocks of the cache. Standard library only."""
