"""Data for the benchmarks: one LightningDataModule per task family."""

from datamodules.commonsense import CommonsenseDataModule
from datamodules.glue import GlueDataModule, GlueMixtureDataModule
from datamodules.images import ImageDataModule
from datamodules.instructions import InstructionDataModule
from datamodules.math_reasoning import MathReasoningDataModule

__all__ = [
    "CommonsenseDataModule",
    "GlueDataModule",
    "GlueMixtureDataModule",
    "ImageDataModule",
    "InstructionDataModule",
    "MathReasoningDataModule",
]
