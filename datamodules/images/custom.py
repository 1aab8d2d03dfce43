"""A directory of class folders: `{train,test[,val]}/<class name>/*.jpg`."""

from pathlib import Path

from datamodules.images.dataset import FileSplit, ImageSplit
from datamodules.images.files import FoundFiles, describe_left_out, find_files, is_hidden, shorten
from datamodules.images.source import SPLIT_NAMES, ImageSource, check_classes
from datamodules.shared.splits import TRAIN
from fourier_moe.errors import UserError


def find_split_folders(directory: Path) -> dict[str, Path]:
    """Return the folders of `directory` that are splits, by split; upper or lower case does not matter.

    Raises:
        UserError: two folders are the same split, such as `val` and `validation`.
    """
    folders: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        found = sorted(path for path in directory.iterdir() if path.name.lower() in names and path.is_dir())
        if len(found) > 1:
            raise UserError(
                f"directory '{directory}' has {len(found)} folders for the {split} split: "
                f"{shorten(folder.name for folder in found)}; keep one"
            )
        if found:
            folders[split] = found[0]
    return folders


class ClassFolders(ImageSource):
    """Images in class folders, at any depth. The classes are the folders of train, in alphabetical order.

    Args:
        directory: the parent of the split folders; ids are relative to it.
        folders: the folder of each split.

    Raises:
        UserError: A split has no class folders, a class folder has no images, a class has no train folder, or its name is
            not UTF-8.
    """

    def __init__(self, directory: Path, folders: dict[str, Path]) -> None:
        self.origin = f"class folders in '{directory}'"
        self.splits = frozenset(folders)
        self._directory = directory
        found = {split: _list_class_folders(folder) for split, folder in folders.items()}
        self._files = {split: {name: files.images for name, files in of_split.items()} for split, of_split in found.items()}
        check_classes(self._files, self.origin)
        self.class_names = list(self._files[TRAIN])
        self.notes = [
            *_describe_strays(directory, folders),
            *describe_left_out(directory, (files for of_split in found.values() for files in of_split.values())),
        ]

    def load(self, split: str) -> ImageSplit:
        index_of = {name: index for index, name in enumerate(self.class_names)}
        examples = [(path, index_of[name]) for name, paths in self._files[split].items() for path in paths]
        return FileSplit(self._directory, [path for path, _ in examples], [label for _, label in examples])


def _list_class_folders(folder: Path) -> dict[str, FoundFiles]:
    """Return the files of each class, by sorted class name. Hidden folders, such as `.ipynb_checkpoints`, are not classes."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))
    if not classes:
        raise UserError(f"no class folders in '{folder}': images are expected in {folder.name}/<class name>/")
    files = {path.name: find_files(path) for path in classes}
    empty = [str(folder / name) for name, found in files.items() if not found.images]
    if empty:
        raise UserError(f"{len(empty)} class folder(s) without images: {shorten(empty)}; fill them or delete them")
    return files


def _describe_strays(directory: Path, folders: dict[str, Path]) -> list[str]:
    """Return sentences on folders that are no splits, and on files of splits outside of class folders."""
    strange = sorted(
        path.name for path in directory.iterdir() if path.is_dir() and not is_hidden(path) and path not in folders.values()
    )
    loose = sorted(
        path.relative_to(directory).as_posix()
        for folder in folders.values()
        for path in folder.iterdir()
        if not path.is_dir() and not is_hidden(path)
    )
    sentences = []
    if strange:
        names = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        sentences.append(
            f"'{directory}': {len(strange)} folder(s) left out, which are no splits by their names: {shorten(strange)}; "
            f"splits are {names}"
        )
    if loose:
        sentences.append(f"'{directory}': {len(loose)} file(s) left out, which are in no class folder: {shorten(loose)}")
    return sentences
