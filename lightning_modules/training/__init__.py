"""What training does beyond Lightning: schedules, accumulated means, weight averages, checks."""
