"""Adapter files: format, checks, writing, model card, hub."""
