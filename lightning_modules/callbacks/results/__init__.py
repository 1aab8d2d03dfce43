"""Callbacks that write the results of a run: adapter, predictions, evaluation."""
