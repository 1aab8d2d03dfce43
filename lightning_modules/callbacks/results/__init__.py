"""What a run leaves: adapter, predictions, evaluation."""
