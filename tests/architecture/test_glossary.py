"""One word for one thing: words that the project has replaced do not come back, in names, text or docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("fourier_moe", "datamodules", "lightning_modules", "benchmarks", "examples", "configs", "docs", "tests")
INSTEAD = {
    r"\bof_sets?\b|\bof_first\b": "rows_in_set, rank0_error",
    r"\w+_AT_ONCE\b|\bMOST_|\bLEAST_": "CHUNK, MAX_LABELS, MIN_STEP",
    r"\banew\b": "again",
    r"\bat hand\b": "current",
    r"\bin the midst of\b": "during",
    r"\b(?:left|leave) in peace\b": "ignored",
    r"\bshares? out\b": "split",
    r"\bfor ever\b|\bwithout a word\b": "forever, silently",
    r"\bwhich (?:it has|they have) not\b": "has none",
    r"\b[Gg]o(?:es)? on (?:from|with)\b": "resume from, continue with",
}


def test_replaced_words_stay_away():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml")]
    pattern = re.compile("|".join(f"({words})" for words in INSTEAD))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}; say {list(INSTEAD.values())[match.lastindex - 1]}"
        for path in (*files, ROOT / "train.py", ROOT / "README.md")
        if path != Path(__file__)
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
