"""Image files: finding them, reading them, and telling files that can be used from those that cannot."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datamodules.images.decoding import FORMATS, IMAGE_EXTENSIONS, UnusableImageError, decode_rgb, open_image
from fourier_moe.errors import UserError, printable

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
_TAIL_BYTES = 32
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class FoundFiles:
    """What lies below a directory, apart from hidden files and folders.

    Attributes:
        images: the files with an image's name, sorted by their path relative to the directory.
        others: the other files, sorted.
        links: links to folders (or folders behind links) that are not followed, because their images are found elsewhere or
            without end.
    """

    images: list[Path]
    others: list[Path]
    links: list[Path]


def is_hidden(path: Path) -> bool:
    """Return whether the name begins with a dot, as `._x.jpg` of macOS archives and `.ipynb_checkpoints` do."""
    return path.name.startswith(".")


def is_image_name(path: Path) -> bool:
    """Return whether the name is that of an image that can be read."""
    return path.suffix.lower() in IMAGE_EXTENSIONS


def find_files(directory: Path) -> FoundFiles:
    """Return all files under `directory`, at any depth, also behind links to folders.

    A link is not followed to a folder inside of `directory` or that holds `directory`, and no folder is read twice.

    Raises:
        UserError: A folder cannot be listed.
    """
    root = directory.resolve()
    images: list[Path] = []
    others: list[Path] = []
    links: list[Path] = []
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(directory, followlinks=True, onerror=_refuse):
        followed = []
        for path in sorted(Path(folder, name) for name in subfolders):
            if is_hidden(path):
                continue
            target = path.resolve()
            leads_back = path.is_symlink() and (target.is_relative_to(root) or root.is_relative_to(target))
            if leads_back or target in seen:
                links.append(path)
                continue
            seen.add(target)
            followed.append(path.name)
        subfolders[:] = followed
        for path in (Path(folder, name) for name in names):
            if not is_hidden(path):
                (images if is_image_name(path) else others).append(path)
    for paths in (images, others, links):
        paths.sort(key=lambda path: path.relative_to(directory).as_posix())
    return FoundFiles(images, others, links)


def describe_left_out(directory: Path, found: Iterable[FoundFiles]) -> list[str]:
    """Return what is not used of a directory, a sentence for each kind; none if there is nothing.

    Args:
        directory: the names in the sentences are relative to it.
        found: what lies in parts of it.
    """
    parts = list(found)
    others = [path for part in parts for path in part.others]
    links = [path for part in parts for path in part.links]
    sentences = []
    if others:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
        counts = ", ".join(f"{count} {printable(kind)}" for kind, count in kinds.most_common(_NAMES_SHOWN))
        sentences.append(
            f"'{directory}': {len(others)} file(s) left out, which are not images by their names ({counts}): "
            f"{_shorten_paths(others, directory)}; images are {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    if links:
        sentences.append(
            f"'{directory}': {len(links)} link(s) left out, to folders that are read elsewhere or hold this one: "
            f"{_shorten_paths(links, directory)}"
        )
    return sentences


def read_file(path: Path) -> bytes:
    """Return the content of a regular file. A pipe would never end, and neither would some devices.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    problem = _reading_problem(path)
    if problem:
        raise UserError(problem)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(_unreadable(path, error.strerror)) from error


def check_usable(paths: Iterable[Path]) -> None:
    """Find image files that training could not use, before it starts.

    A JPEG whose last bytes hold the end-of-image marker and a PNG whose last bytes hold the IEND chunk are taken as
    complete, and their headers are read. Anything else is decoded, and the decoder decides.

    Raises:
        UserError: at least one file is truncated, corrupt, too large to decode, of values without a known range, or not a
            regular file; the first five of each kind are named.
    """
    with ThreadPoolExecutor() as pool:
        results = [(path, problem) for path, problem in pool.map(lambda path: (path, _problem(path)), paths) if problem]
    broken = [str(path) for path, problem in results if problem == _BROKEN]
    others = [problem for _, problem in results if problem != _BROKEN]
    messages = []
    if broken:
        messages.append(
            f"{len(broken)} truncated or corrupt image file(s): {shorten(broken)}; download them again or delete them "
            f"(formats that are read, whatever the name: {', '.join(FORMATS)})"
        )
    if others:
        more = f", and {len(others) - _NAMES_SHOWN} more files" if len(others) > _NAMES_SHOWN else ""
        messages.append("; ".join(others[:_NAMES_SHOWN]) + more)
    if messages:
        raise UserError("; ".join(messages))


def shorten(names: Iterable[str]) -> str:
    """Join quoted names, at most five of them, without control characters: `'a', 'b' and 3 more`."""
    quoted = [f"'{printable(name)}'" for name in names]
    more = f" and {len(quoted) - _NAMES_SHOWN} more" if len(quoted) > _NAMES_SHOWN else ""
    return ", ".join(quoted[:_NAMES_SHOWN]) + more


_BROKEN = "broken"


def _problem(path: Path) -> str | None:
    """Return why a file cannot be used, `_BROKEN`, or None."""
    if problem := _reading_problem(path):
        return problem
    try:
        with path.open("rb") as file:
            head = file.read(len(_PNG_START))
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read()
            file.seek(0)
            if (head.startswith(_JPEG_START) and _JPEG_END in tail) or (head == _PNG_START and _PNG_END in tail):
                open_image(file, str(path))
            else:
                decode_rgb(file.read(), str(path))
    except UnusableImageError as error:
        return str(error)
    except ValueError:
        return _BROKEN
    except OSError as error:  # of the disk: what the decoders raise is a ValueError here
        return _unreadable(path, error.strerror)
    return None


def _reading_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"'{printable(str(path))}' is not a file: a pipe, a device, or a link to nothing; replace it or delete it"
    if not os.access(path, os.R_OK):
        return _unreadable(path, "Permission denied")
    return None


def _unreadable(path: Path, reason: str | None) -> str:
    return f"'{printable(str(path))}' cannot be read: {reason}"


def _refuse(error: OSError) -> None:
    raise UserError(f"folder '{printable(str(error.filename))}' cannot be listed: {error.strerror}") from error


def _shorten_paths(paths: Sequence[Path], directory: Path) -> str:
    return shorten(path.relative_to(directory).as_posix() for path in paths)
