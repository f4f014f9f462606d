"""Talking to a served model: typed clients (sync and asyncio) and the server's launcher."""
