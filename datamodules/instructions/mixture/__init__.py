"""Training on several benchmarks and files at once."""
