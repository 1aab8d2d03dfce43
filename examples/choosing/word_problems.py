"""Draw the word problems of docs/evidence/language.md.

    python word_problems.py MATH_DIRECTORY TARGET [--train 300] [--test 200]

TARGET gets train.jsonl and test.jsonl, with question and answer: problems of MATH_DIRECTORY/gsm8k_train.jsonl, drawn at random.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path


def main(source: Path, target: Path, train: int, test: int) -> None:
    lines = (source / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    if train + test > len(lines):
        raise SystemExit(f"--train {train} --test {test}: {source} has {len(lines)} problems")
    random.Random(0).shuffle(lines)
    target.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", lines[:train]), ("test", lines[train : train + test])):
        (target / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=200)
    options = parser.parse_args()
    main(options.source, options.target, options.train, options.test)
