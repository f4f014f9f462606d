"""A projection that keeps its weight's name and layout."""
