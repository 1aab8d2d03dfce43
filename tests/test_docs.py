"""README.md and docs/: links and anchors lead somewhere, every page and public name has its place, the site builds."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY)
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "examples").rglob("*.md")]
    if ".venv" not in path.parts
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", (REPOSITORY / page).read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them, and of what mkdocstrings documents there."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    documented = re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}.union(documented)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(text_of(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        target = (REPOSITORY / page.parent / path).resolve() if path else REPOSITORY / page
        if not target.exists() or (anchor and anchor not in anchors(target.relative_to(REPOSITORY))):
            broken.append(link)
    assert not broken


def test_lines_are_short_enough_to_read_side_by_side():
    lines = {
        f"{page}:{number}": len(line)
        for page in PAGES
        for number, line in enumerate((REPOSITORY / page).read_text(encoding="utf-8").splitlines(), 1)
    }
    assert not {line: length for line, length in lines.items() if length > 160}


def test_every_page_has_its_place_in_the_navigation_and_in_the_list_of_pages():
    pages = {str(page.relative_to("docs")) for page in PAGES if page.parts[0] == "docs"}
    in_navigation = re.findall(r"[\w/]+\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert sorted(in_navigation) == sorted(pages)
    listed = {link.partition("#")[0] for link in LINK.findall(text_of(Path("docs/index.md")))}
    assert {page for page in pages if not page.startswith("evidence/")} <= listed | {"index.md"}


@pytest.mark.parametrize("package", ["fourier_moe", "lightning_modules.tasks", "lightning_modules.callbacks", "datamodules"])
def test_api_reference_has_every_public_name(package):
    page = f"docs/reference/api/{package.partition('.')[0]}.md"
    names = re.findall(
        rf"^::: {re.escape(package)}(?:\.[a-z]\w*)?\.(\w+)$", (REPOSITORY / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    public = {name for name in importlib.import_module(package).__all__ if not name.startswith("__")}
    assert public <= set(names)


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site/reference/api/fourier_moe/index.html").read_text(encoding="utf-8")
    assert "num_coefficients" in page
