"""One way to run the graph each, and which of them a build is for."""
