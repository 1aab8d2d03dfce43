"""Everything that needs a GPU, in one command of nine minutes: python -m benchmarks.gpu; see benchmarks/README.md."""
