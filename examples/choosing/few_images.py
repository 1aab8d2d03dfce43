"""Make the few-image data of docs/evidence/images.md.

    python few_images.py SOURCE TARGET [--images 4] [--test 50] [--pooled CLASSES]

SOURCE holds train/<class>/ and test/<class>/. TARGET gets links: of each class `--images` training images for train, 8 others
for val, and at most `--test` test images. With `--pooled`, for sets with hardly any test images: of CLASSES classes, evenly
spaced in the alphabet, the images of both splits together, 1 for val, 2 for test and the others for train.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

VALIDATION = 8


def images_of(source: Path, split: str, name: str) -> list[Path]:
    """The images of a class in a split, in an order that is random and always the same."""
    images = sorted((source / split / name).iterdir()) if (source / split / name).is_dir() else []
    random.Random(f"{source.name}{name}").shuffle(images)
    return images


def main(source: Path, target: Path, per_class: int, test: int, pooled: int | None) -> None:
    names = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    step = len(names) // pooled if pooled else 1
    for name in names[::step][:pooled]:
        train, tested = images_of(source, "train", name), images_of(source, "test", name)
        if pooled is None:
            chosen = {"train": train[:per_class], "val": train[-VALIDATION:], "test": tested[:test]}
        else:
            together = tested + train
            chosen = {"train": together[3:], "val": together[:1], "test": together[1:3]}
        for split, images in chosen.items():
            links = target / split / name
            links.mkdir(parents=True)
            for image in images:
                (links / image.name).symlink_to(image.resolve())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--pooled", type=int)
    options = parser.parse_args()
    main(options.source, options.target, options.images, options.test, options.pooled)
