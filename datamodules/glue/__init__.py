"""GLUE, or sentences of one's own: classification of sentences and sentence pairs, one task or several together."""

from datamodules.glue.data_module import GlueDataModule
from datamodules.glue.mixture import GlueMixtureDataModule
from datamodules.mixture import MixtureTask

__all__ = ["GlueDataModule", "GlueMixtureDataModule", "MixtureTask"]
