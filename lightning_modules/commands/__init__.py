"""The commands beside Lightning's own."""
