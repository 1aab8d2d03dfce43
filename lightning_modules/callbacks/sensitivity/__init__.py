"""Spectral sensitivity: the frequencies that a model and its data need."""
