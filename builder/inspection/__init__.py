"""What is inside a build: its manifest, its graphs and the state of its files."""
