"""Data for the benchmarks: one LightningDataModule per task family."""

from datamodules.glue import GlueDataModule, GlueMixtureDataModule
from datamodules.images import ImageDataModule, ImageMixtureDataModule
from datamodules.instructions import InstructionDataModule
from datamodules.instructions.commonsense import CommonsenseDataModule
from datamodules.instructions.math_reasoning import MathReasoningDataModule
from datamodules.shared.data_module import BaseDataModule

__all__ = [
    "BaseDataModule",
    "CommonsenseDataModule",
    "GlueDataModule",
    "GlueMixtureDataModule",
    "ImageDataModule",
    "ImageMixtureDataModule",
    "InstructionDataModule",
    "MathReasoningDataModule",
]
