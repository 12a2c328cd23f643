"""Pages of the studies: one HTML file that needs nothing else, and Markdown beside it.

A study gives titles, paragraphs, tables and plots; both files get the same contents,
and at the end how they were made: configuration, device, versions, commits, date.
"""

import base64
import html
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console

from experiments.errors import MetricsError
from experiments.studies.records import (
    NOT_RECORDED,
    commits,
    machines,
    save_parquet,
)

NOTHING = "–"
PNG = b"\x89PNG\r\n\x1a\n"
VERSIONS = (
    "python", "jax", "jaxlib", "numpy", "optax", "flax", "kfac_jax", "kfac_jax_missing",
    "kfac_jax_lite",
)  # fmt: skip
NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?\s?%?|–|-|", re.IGNORECASE)
# Pictures stay white in the dark: their axes are black.
CSS = """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem;
  text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption, figcaption { color: var(--soft); font-size: 0.875rem; text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
"""
# A browser that is given this fetches nothing and runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """A table."""

    header: tuple[str, ...]  # titles of the columns
    # Cells, as many in each row as there are columns; None is a dash.
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""  # a line above it

    @classmethod
    def of(
        cls,
        items: Iterable[Any],
        columns: Mapping[str, Callable[[Any], Any]],
        caption: str = "",
    ) -> Self:
        """A row for every item, a cell for what each column makes of it."""
        rows = [tuple(make(item) for make in columns.values()) for item in items]
        return cls(tuple(columns), tuple(rows), caption)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.header):
                raise ValueError(
                    f"row {number} of the table {self.caption!r} has {len(row)} cells; "
                    f"wanted {len(self.header)}: {', '.join(self.header)}."
                )


@dataclass(frozen=True)
class Plot:
    """A picture."""

    path: Path  # a PNG file in the page's folder
    caption: str = ""  # a line below it

    @property
    def title(self) -> str:
        """What stands for the picture where it cannot be seen."""
        return self.caption or self.path.stem


Part = str | Table | Plot


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str  # its heading
    parts: tuple[Part, ...]  # paragraphs of plain text, tables and plots


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str  # its heading
    sections: tuple[Section, ...]  # what it says
    config: dict[str, Any]  # what the runs share, JSON values
    machine: dict[str, Any]  # what they were made with, see `benchmarks.common.machine`
    # Of the code that made them; "not recorded" if there is none.
    commits: tuple[str, ...]


def save_page(page: Page, folder: Path, name: str = "page") -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    sections = (*page.sections, how_it_was_made(page))
    for section in sections:
        for part in section.parts:
            if isinstance(part, Plot):
                check_plot(part, folder)
    paths = folder / f"{name}.html", folder / f"{name}.md"
    texts = html_of(page.title, sections), markdown_of(page.title, sections)
    for path, text in zip(paths, texts, strict=True):
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def publish(
    title: str,
    sections: Iterable[Section],
    config: dict[str, Any],
    source: Path,
    folder: Path,
    console: Console,
) -> None:
    """Writes a study's page, and its runs as ``runs.parquet``; tells where they are."""
    parquet = folder / "runs.parquet"
    save_parquet(source, parquet)
    made_with = machines(source), commits(source)
    page = Page(title, tuple(sections), config, *made_with)
    for path in (*save_page(page, folder), parquet):
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def finish(figure: Figure, path: Path, legend: str = "", dpi: int = 110) -> None:
    """Writes a figure and forgets it; a legend, if it has a place, is one for all."""
    if legend:
        named = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        place: Any = {"loc": legend, "ncols": max(1, min(6, len(named)))}
        figure.legend(list(named.values()), list(named), fontsize=8, **place)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def panels(rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its grid ``[rows, columns]`` of axes with lines behind them."""
    given: Any = {"squeeze": False, "layout": "constrained", **options}
    figure, grid = plt.subplots(rows, columns, **given)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid


def one_configuration(records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Raises where records are not of one configuration."""
    marks = {record["fingerprint"] for record in records}
    if len(marks) != 1:
        raise MetricsError(
            f"{folder} holds runs of {len(marks)} configurations; wanted one."
        )


def check_plot(plot: Plot, folder: Path) -> None:
    """Checks that a plot can be shown."""
    if not plot.path.is_file():
        raise MetricsError(f"The plot {plot.path} of the page does not exist.")
    if plot.path.resolve().parent != folder.resolve():
        raise MetricsError(
            f"The plot {plot.path} is not in the page's folder {folder}."
        )
    with plot.path.open("rb") as file:
        start = file.read(len(PNG))
    if start != PNG:
        raise MetricsError(f"The plot {plot.path} is no PNG: it starts with {start!r}.")


def how_it_was_made(page: Page) -> Section:
    machine = {k: v for k, v in page.machine.items() if k not in ("date", "commit")}
    versions = {name: machine.pop(name) for name in VERSIONS if name in machine}
    commits = page.commits or (NOT_RECORDED,)
    date = page.machine.get("date")
    return Section(
        "How it was made",
        (
            f"{'Commit' if len(commits) == 1 else 'Commits'}: {', '.join(commits)}.",
            f"Date: {NOT_RECORDED if date is None else show(date)}.",
            two_columns("setting", page.config, "Configuration"),
            two_columns("device", machine, "Device"),
            two_columns("package", versions, "Versions"),
        ),
    )


def two_columns(title: str, values: dict[str, Any], caption: str) -> Table:
    """A table of names and values; one row says so where there are none."""
    rows = tuple((name, show(value)) for name, value in values.items())
    return Table((title, "value"), rows or ((NOT_RECORDED, NOTHING),), caption)


def show(value: Any) -> str:
    """A JSON value as the text of a cell."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} = {show(v)}" for k, v in value.items()) or NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or NOTHING
    return str(value)


# -------------------------------------------------------------------------------- HTML


def html_of(title: str, sections: Iterable[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [html_part(part) for part in section.parts]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{CSS}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>"]
    return "\n".join([*lines, "<body>", *body, "</body>", "</html>", ""])


def html_part(part: Part) -> str:
    """A paragraph, a table or a plot."""
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Plot):
        data = base64.b64encode(part.path.read_bytes()).decode("ascii")
        image = (
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(part.title)}">'
        )
        caption = f"<figcaption>{html.escape(part.title)}</figcaption>"
        return f"<figure>{image}{caption}</figure>"
    lines = ['<div class="wide"><table>']
    if part.caption:
        lines.append(f"<caption>{html.escape(part.caption)}</caption>")
    cells = "".join(f'<th scope="col">{html.escape(show(h))}</th>' for h in part.header)
    lines.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for row in part.rows:
        lines.append(
            "<tr>" + "".join(html_cell(show(value)) for value in row) + "</tr>"
        )
    return "\n".join([*lines, "</tbody></table></div>"])


def html_cell(text: str) -> str:
    """A cell; numbers are to the right."""
    look = ' class="n"' if NUMBER.fullmatch(text) else ""
    return f"<td{look}>{html.escape(text)}</td>"


# ---------------------------------------------------------------------------- Markdown


def markdown_of(title: str, sections: Iterable[Section]) -> str:
    blocks = [f"# {plain(title)}"]
    for section in sections:
        blocks.append(f"## {plain(section.title)}")
        blocks += [markdown_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def markdown_part(part: Part) -> str:
    """A paragraph, a table or a plot."""
    if isinstance(part, str):
        # What would make a heading, a list or a quotation at the start of a line.
        return re.sub(r"^([#+>=-]|\d+(?=[.)]))", escape_start, plain(part))
    if isinstance(part, Plot):
        return f"![{plain(part.title)}]({quote(part.path.name)})"
    rows = [[plain(show(value)) for value in row] for row in (part.header, *part.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(part.header))
    caption = [plain(part.caption), ""] if part.caption else []
    return "\n".join([*caption, *lines])


def escape_start(match: re.Match) -> str:
    """Keeps the start of a paragraph from being read as more than text."""
    text = match.group()
    return f"{text}\\" if text.isdigit() else f"\\{text}"


def plain(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    line = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<|&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
