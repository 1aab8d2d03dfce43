"""Which frequencies model and data ask for."""
