"""Make the few-image data of docs/evidence/choosing.md: python few_images.py SOURCE TARGET [IMAGES_PER_CLASS]

SOURCE holds train/<class>/ and test/<class>/. TARGET gets links: of each class IMAGES_PER_CLASS (4) training images for train,
8 others for val, and at most 50 test images.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

VALIDATION, TEST = 8, 50


def main(source: Path, target: Path, per_class: int = 4) -> None:
    for split, origin, chosen in (
        ("train", "train", slice(per_class)),
        ("val", "train", slice(-VALIDATION, None)),
        ("test", "test", slice(TEST)),
    ):
        for folder in sorted(path for path in (source / origin).iterdir() if path.is_dir()):
            images = sorted(folder.iterdir())
            random.Random(f"{source.name}{folder.name}").shuffle(images)
            links = target / split / folder.name
            links.mkdir(parents=True)
            for image in images[chosen]:
                (links / image.name).symlink_to(image.resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
