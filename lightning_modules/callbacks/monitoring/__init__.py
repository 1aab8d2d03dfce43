"""Callbacks that log a training run."""
