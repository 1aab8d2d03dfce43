"""What the package must know about other libraries' models."""
