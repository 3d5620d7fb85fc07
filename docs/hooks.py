"""mkdocs' hooks: pages that are files of the repository's root, and links that leave the documentation.

A page that is `<!-- include: FILE -->` shows that file of the root. A relative link goes to the page that shows its target; where
the target is in the repository and in no page, its words stay and the link goes; where there is no target, the build fails.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INCLUDE = re.compile(r"\s*<!-- include: (\S+) -->\s*")
LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^([ \t]*)(```+|~~~+).*?^\1\2[ \t]*$", re.M | re.S)
log = logging.getLogger("mkdocs.hooks.links")


def included(page: Path) -> Path | None:
    """The file of the root that a page shows, or None."""
    found = INCLUDE.fullmatch(page.read_text())
    return ROOT / found[1] if found else None


def shown_as() -> dict[Path, Path]:
    """Files of the root → the pages that show them."""
    return {source: page for page in DOCS.glob("*.md") if (source := included(page))}


def prose(markdown: str) -> list[tuple[bool, str]]:
    """The text cut at its fenced blocks: (whether it is prose, the part), in order."""
    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        parts += [(True, markdown[end : block.start()]), (False, block[0])]
        end = block.end()
    return [*parts, (True, markdown[end:])]


def relinked(markdown: str, source: Path, page: Path, pages: dict[Path, Path]) -> tuple[str, list[str]]:
    """The markdown of `source` with its links as `page` needs them, and the targets that are nowhere."""
    broken: list[str] = []

    def link(found: re.Match[str]) -> str:
        target, anchor = found["target"], found["anchor"] or ""
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = (source.parent / target).resolve()
        if path.is_dir() and (path / "README.md").is_file():
            path = path / "README.md"
        path = pages.get(path, path)
        if path.is_file() and path.is_relative_to(DOCS):
            return f"{found['image']}[{found['words']}]({os.path.relpath(path, page.parent)}{anchor})"
        if not path.exists():
            broken.append(target)
        return found["words"]

    return "".join(LINK.sub(link, part) if is_prose else part for is_prose, part in prose(markdown)), broken


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls this with every page."""
    path = DOCS / page.file.src_uri
    source = included(path)
    text, broken = relinked(source.read_text() if source else markdown, source or path, path, shown_as())
    for target in broken:
        log.warning("%s links to %s, which is not there", page.file.src_uri, target)
    return text
