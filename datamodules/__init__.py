"""Data for the benchmarks: one LightningDataModule per task family."""

from datamodules.images import ImageDataModule

__all__ = ["ImageDataModule"]
