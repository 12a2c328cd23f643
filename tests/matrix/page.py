"""The page ``docs/versions.md``: which versions of JAX were tested, and with what.

``python -m tests.matrix`` writes the table of the page from its result file.
"""

from typing import Any

from tests.matrix.cell import succeeded
from tests.matrix.sources import ROOT

PAGE = ROOT / "docs" / "versions.md"
# Every minor version of JAX from the lower bound of ``setup.cfg`` to the newest one.
MINORS = ("0.10", "0.11", "0.12")
START, END = "<!-- written by python -m tests.matrix -->\n", "<!-- until here -->"


def minor(version: str) -> str:
    """``0.10`` of ``0.10.2``."""
    return ".".join(version.split(".")[:2])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the result file by minor version of JAX, in Markdown.

    Args:
        rows: what the command has stored.

    Returns:
        A table with one line or more for every minor version.
    """
    lines = [
        "| JAX | release | Python | flax | optax | numpy | tests | passed | failed |",
        "|---|---|---|---|---|---|---|---:|---:|",
    ]
    others = {minor(r["versions"]["jax"]) for r in rows} - set(MINORS)
    for name in (*sorted(others), *MINORS):
        found = [r for r in rows if minor(r["versions"]["jax"]) == name]
        if not found:
            lines.append(f"| {name} | not run | | | | | | | |")
        for row in sorted(found, key=lambda r: (r["versions"]["jax"], r["python"])):
            versions = [row["versions"][n] for n in ("flax", "optax", "numpy")]
            bad = row["failed"] + row["errors"]
            counts = [row["suite"], str(row["passed"]), str(bad)]
            if not succeeded(row):
                counts[-1] = f"**{bad}**"
            cells = [name, row["versions"]["jax"], row["python"], *versions, *counts]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]]) -> None:
    """Puts the table into the page.

    Args:
        rows: what the command has stored.
    """
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(START)
    _, tail = rest.split(END)
    PAGE.write_text(head + START + "\n" + table(rows) + "\n" + END + tail, "utf-8")
