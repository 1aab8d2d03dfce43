"""BoolQ's questions as labeled sentences of one's own: python examples/boolq_questions/convert.py LLM_ADAPTERS/boolq OUTPUT

Reads train.json and test.json in LLM-Adapters' layout and writes train.tsv and dev.tsv for `dataset: custom`. The passages are
not in those files: a model answers from what it knows, which is little better than always "true".
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

QUESTION = re.compile(r"question: (.*?)\s*Answer format", re.DOTALL)


def convert(source: Path, output: Path) -> None:
    """Write both files; questions without a match are an error, not left out."""
    output.mkdir(parents=True, exist_ok=True)
    for read, written in (("train.json", "train.tsv"), ("test.json", "dev.tsv")):
        rows = []
        for record in json.loads((source / read).read_text(encoding="utf-8")):
            match = QUESTION.search(record["instruction"])
            if match is None:
                raise ValueError(f"{source / read}: no question in {record['instruction'][:60]!r}")
            rows.append((" ".join(match[1].split()), record["answer"]))
        with (output / written).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("sentence", "label"), *rows])
        print(f"{output / written}: {len(rows):,} questions")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
