"""Training beyond Lightning's own: schedules, means over accumulated batches, weight averages, checks."""
