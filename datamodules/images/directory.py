"""A local directory of labeled images, in whichever of the two layouts it has."""

from pathlib import Path

from datamodules.images.custom import ClassFolders, find_split_folders
from datamodules.images.parquet import ParquetFiles, find_parquet_files
from datamodules.images.source import ImageSource
from datamodules.shared.splits import TEST, TRAIN
from fourier_moe.errors import UserError

LAYOUTS = (
    "class folders {train,test[,val]}/<class name>/*.jpg, or parquet files train*.parquet, test*.parquet"
    "[, validation*.parquet] in the directory or in its data folder"
)


def open_directory(directory: Path, cache_dir: Path | None = None) -> ImageSource:
    """Open class folders or, where there are none, parquet files.

    Args:
        directory: the parent of the split folders, or the folder of the parquet files or of their `data` folder.
        cache_dir: where `datasets` keeps its copy of parquet files; None for its default.

    Raises:
        UserError: the directory or one of its splits is missing, or what it holds is not usable.
    """
    if not directory.is_dir():
        raise UserError(f"directory '{directory}' does not exist; expected a directory with {LAYOUTS}")
    folders = find_split_folders(directory)
    files = {} if folders else find_parquet_files(directory)
    missing = [split for split in (TRAIN, TEST) if split not in (folders or files)]
    if missing:
        raise UserError(f"directory '{directory}' has no {' and no '.join(missing)} split; expected {LAYOUTS}")
    return ClassFolders(directory, folders) if folders else ParquetFiles(files, f"parquet files in '{directory}'", cache_dir)
