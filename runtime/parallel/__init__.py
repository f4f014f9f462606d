"""Models on several ranks: one process each, which compute a step together and end together."""
