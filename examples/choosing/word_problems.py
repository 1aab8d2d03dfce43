"""Draw the word problems of docs/evidence/language.md.

    python word_problems.py MATH_DIRECTORY TARGET [--train 300] [--test 200]

TARGET gets train.jsonl and test.jsonl, with question and answer: problems of MATH_DIRECTORY/gsm8k_train.jsonl, drawn at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drawing import count, draw, write_lines


def main(source: Path, target: Path, train: int, test: int) -> None:
    file = source / "gsm8k_train.jsonl"
    parts = draw(str(file), file.read_text(encoding="utf-8").splitlines(), train, test)
    for name, part in zip(("train", "test"), parts, strict=True):
        write_lines(target / f"{name}.jsonl", part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=count, default=300)
    parser.add_argument("--test", type=count, default=200)
    options = parser.parse_args()
    main(options.source, options.target, options.train, options.test)
