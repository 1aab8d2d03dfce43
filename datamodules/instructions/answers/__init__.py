"""How answers are read from what a model writes, and graded."""
