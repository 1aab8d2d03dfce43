"""What is adapted and how it is scored."""

from lightning_modules.tasks.base import Task
from lightning_modules.tasks.image_classification import ImageClassification

__all__ = ["ImageClassification", "Task"]
