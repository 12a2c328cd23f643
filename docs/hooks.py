"""Puts parts of the repository's texts into pages, so that the two cannot drift apart.

``<!-- README: Quickstart -->`` becomes the section of ``README.md`` with that heading,
without the heading; ``<!-- CHANGELOG -->`` becomes the whole file.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- (README|CHANGELOG|CONTRIBUTING)(?:: (.+?))? -->$", re.M)


def section(text: str, heading: str) -> str:
    """The section of a Markdown text under a heading, without the heading.

    Args:
        text: The Markdown.
        heading: The heading, of any level.

    Returns:
        What stands between it and the next heading of its level or above.

    Raises:
        KeyError: There is no such heading.
    """
    lines, fenced, level, kept = text.splitlines(), False, 0, []
    for line in lines:
        fenced ^= line.startswith("```")
        found = None if fenced else re.match(r"(#+) (.*?)\s*$", line)
        if level and found and len(found[1]) <= level:
            return "\n".join(kept).strip()
        if level:
            kept.append(line)
        elif found and found[2] == heading:
            level = len(found[1])
    if not level:
        raise KeyError(f"there is no heading {heading!r}")
    return "\n".join(kept).strip()


def included(match: re.Match) -> str:
    """The text that a mark stands for, its links seen from a page of the site."""
    text = (ROOT / f"{match[1]}.md").read_text(encoding="utf-8")
    if match[2]:
        text = section(text, match[2])
    text = re.sub(r"!\[[^]]*\]\(experiments/[^)]*\)\n*", "", text)
    text = re.sub(r"\[([^]]*)\]\((?!https?:|docs/|#)[^)]*\)", r"\1", text)
    return text.replace("](docs/", "](")


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Called by MkDocs for every page.

    Args:
        markdown: The page's text.
        page: The page.
        **context: The configuration and the files; not needed.

    Returns:
        The text with its marks replaced.
    """
    del context
    if page.file.src_uri == "coverage.md":  # ['path']['of a parameter'] is no link
        return markdown.replace("['", "\\['")
    return MARK.sub(included, markdown)
