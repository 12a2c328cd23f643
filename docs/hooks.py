"""Puts texts and figures of the repository into the site, so that none exists twice.

``<!-- README: Quickstart -->`` becomes the section of ``README.md`` with that heading,
without the heading; ``<!-- CHANGELOG -->`` becomes the whole file. The committed
figures under ``experiments`` are files of the site, with the paths of the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCES = ("README", "CHANGELOG", "CONTRIBUTING", "experiments/README")
MARK = re.compile(rf"^<!-- ({'|'.join(SOURCES)})(?:: (.+?))? -->$", re.M)
# A link, perhaps around an image, to a file: its path has a dot or a slash.
LINK = re.compile(
    r"(!?)\[((?:[^][]|!\[[^][]*\]\([^)]*\))*)\]"
    r"\((?!https?:)(?=[^)#]*[./])([^)#\s]+)(#[^)]*)?\)"
)
# Texts outside ``docs`` that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/README.md": "experiments.md",
}


def figures() -> list[str]:
    """The committed figures, relative to the repository."""
    found = (ROOT / "experiments").glob("**/results/**/*.png")
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


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


def linked(text: str, folder: str) -> str:
    """A text whose links are those of a page at the top of the site.

    Args:
        text: Markdown of a file in the repository.
        folder: The folder of that file, relative to the repository.

    Returns:
        The text. Links to files that are not part of the site become plain text.
    """

    def seen(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        label = linked(label, folder) if "](" in label else label
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path in PAGES:
            path = PAGES[path]
        elif path not in figures():
            return "" if image else label
        return f"{image}[{label}]({path}{anchor or ''})"

    return LINK.sub(seen, text)


def included(match: re.Match[str]) -> str:
    """The text that a mark stands for, its links seen from a page of the site."""
    source = ROOT / f"{match[1]}.md"
    text = source.read_text(encoding="utf-8")
    if match[2]:
        text = section(text, match[2])
    elif match[1] == "experiments/README":
        text = text.split("\n", 1)[1].strip()
    return linked(text, source.parent.relative_to(ROOT).as_posix())


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the files of the site; adds the figures.

    Args:
        files: The files.
        config: The configuration.

    Returns:
        The files.
    """
    from mkdocs.structure.files import File  # not everybody who tests has MkDocs

    for name in figures():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Called by MkDocs for every page.

    Args:
        markdown: The page's text.
        page: The page.
        **context: The configuration and the files; not needed.

    Returns:
        The text with its marks replaced, its links to the repository's files resolved.
    """
    del context
    if page.file.src_uri == "coverage.md":  # ['path']['of a parameter'] is no link
        return markdown.replace("['", "\\['")
    if "/" not in page.file.src_uri:
        markdown = linked(markdown, "docs")
    return MARK.sub(included, markdown)
