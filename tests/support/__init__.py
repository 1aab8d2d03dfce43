"""What tests share: models, runs in processes of their own, reference implementations."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
