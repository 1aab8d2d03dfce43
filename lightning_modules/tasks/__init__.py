"""Tasks: the model to adapt, its loss and its scores."""

from lightning_modules.tasks.base import Evaluation, Task, TaskData
from lightning_modules.tasks.causal_language_model import CausalLanguageModel
from lightning_modules.tasks.generation import GenerationSettings
from lightning_modules.tasks.image_classification import ImageClassification
from lightning_modules.tasks.sequence_classification import SequenceClassification

__all__ = [
    "CausalLanguageModel",
    "Evaluation",
    "GenerationSettings",
    "ImageClassification",
    "SequenceClassification",
    "Task",
    "TaskData",
]
