r"""Draw the three text tasks of docs/evidence/language.md.

    python text_tasks.py MATH_DIRECTORY LLM_ADAPTERS_DIRECTORY TARGET [--train 240] [--test 120]

TARGET gets <task>.jsonl and <task>_test.jsonl, drawn at random, with question and answer. Choices are not shown, so that every
word of an answer has to be written:

- algebra: the rationale of a problem of AQuA's train file, in MATH_DIRECTORY;
- advice: the right solution to a goal of PIQA, of its 1,838 validation questions;
- science: the right answer to a question of ARC-Easy's train file.

These are texts of the benchmarks, not their scores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

QUESTION = re.compile(r"Please choose the correct \w+ to the question: (.*?)\n\n(.*)\n\nAnswer format: ", re.DOTALL)


def algebra(source: Path) -> Iterator[tuple[str, str]]:
    for line in (source / "flan_cot_aqua_train.tsv").read_text(encoding="utf-8").splitlines():
        question, _, rationale = line.replace("\\n", "\n").split("\t")
        yield question.split("\nOptions:")[0], rationale


def right_choices(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each question and the text of its right choice, of a file in LLM-Adapters' format."""
    for row in json.loads(file.read_text(encoding="utf-8")):
        found = QUESTION.match(row["instruction"])
        if found is None:
            raise SystemExit(f"{file} has another form: {row['instruction']}")
        name = row["answer"].capitalize()  # Answer2, Solution1
        texts = re.split(r"\s*\b(?:Answer|Solution)(\d): ", found[2])
        choices = dict(zip(texts[1::2], texts[2::2], strict=True))
        yield found[1].strip(), choices[name[-1]].strip()


def main(math: Path, llm_adapters: Path, target: Path, train: int, test: int) -> None:
    tasks = {
        "algebra": algebra(math),
        "advice": right_choices(llm_adapters / "piqa" / "test.json"),
        "science": right_choices(llm_adapters / "ARC-Easy" / "train.json"),
    }
    target.mkdir(parents=True, exist_ok=True)
    for task, rows in tasks.items():
        pairs = list({question: answer for question, answer in rows if question and answer}.items())
        if train + test > len(pairs):
            raise SystemExit(f"--train {train} --test {test}: {task} has {len(pairs)} questions")
        random.Random(0).shuffle(pairs)
        for name, part in ((task, pairs[:train]), (f"{task}_test", pairs[train : train + test])):
            lines = [json.dumps({"question": question, "answer": answer}, ensure_ascii=False) for question, answer in part]
            (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("math", type=Path)
    parser.add_argument("llm_adapters", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, default=240)
    parser.add_argument("--test", type=int, default=120)
    options = parser.parse_args()
    main(options.math, options.llm_adapters, options.target, options.train, options.test)
