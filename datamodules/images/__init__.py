"""Images with class labels: collections, directories and the hub, read by one LightningDataModule."""

from datamodules.images.data_module import ImageDataModule
from datamodules.images.mixture import ImageMixtureDataModule
from datamodules.mixture import MixtureTask

__all__ = ["ImageDataModule", "ImageMixtureDataModule", "MixtureTask"]
