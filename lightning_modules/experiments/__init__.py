"""What compare and sweep share: grid, budget, reports, statistics."""
