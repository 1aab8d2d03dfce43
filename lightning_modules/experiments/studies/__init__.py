"""What a sweep varies."""
