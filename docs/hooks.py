"""Hooks of the site (mkdocs.yml): links to files outside of docs/, which the site has no page for."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn such links into links to the repository, or into plain text as long as `repo_url` is not set."""
    docs = Path(config["docs_dir"])

    def replace(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = (docs / page.file.src_uri).parent.joinpath(link.partition("#")[0]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        path = target.relative_to(docs.parent).as_posix()
        return f"[{text}]({config['repo_url']}/blob/main/{path})" if config["repo_url"] else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)
