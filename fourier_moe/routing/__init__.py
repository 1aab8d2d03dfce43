"""Routers, what they record, and statistics of it."""
