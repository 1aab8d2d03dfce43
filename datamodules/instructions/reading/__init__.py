"""From files, the benchmarks' repository and the hub to checked records."""
