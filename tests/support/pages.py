"""The code blocks of the pages under docs."""

import re
from pathlib import Path

from support import REPOSITORY


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of every block of `docs/extend/{page}.md`, in order."""
    text = (REPOSITORY / f"docs/extend/{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def write_files(page: str, directory: Path) -> None:
    """Write the page's blocks that come after "`name.py`" or "`name.yaml`" to files of these names in `directory`."""
    text = (REPOSITORY / f"docs/extend/{page}.md").read_text(encoding="utf-8")
    for language, ending in (("python", "py"), ("yaml", "yaml")):
        name = re.search(rf"`(\w+\.{ending})`", text)
        code = next((code for kind, code in blocks(page) if kind == language), None)
        assert name is not None
        assert code is not None
        (directory / name[1]).write_text(code, encoding="utf-8")


def commands(page: str, directory: Path) -> list[list[str]]:
    """The words behind `python train.py` of the page's commands; files and runs are those in `directory`."""
    code = "".join(code for language, code in blocks(page) if language == "bash").replace("\\\n", " ")
    lines = re.findall(r"^python train\.py (.+)$", code, re.MULTILINE)
    name = re.compile(r"(?<=--config )(\w+\.yaml)|(?<= )runs(?=/)")
    return [name.sub(lambda match: f"{directory}/{match[1] or ''}".rstrip("/"), line).split() for line in lines]


def section_code(page: str, heading: str) -> str:
    """The Python code of one section of `docs/{page}.md`."""
    text = (REPOSITORY / f"docs/{page}.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert code, f"{page} has no code under {heading!r}"
    return "".join(code)
