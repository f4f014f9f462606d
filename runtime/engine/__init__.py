"""The engine core: its loop, its process and the client of that process."""
