"""The documentation's page on mutation testing, from the results."""

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tests.mutation.mutants import HERE, ROOT

PAGE = ROOT / "docs" / "mutation.md"
REASONS = HERE / "survivors.toml"
KINDS = {"formula": "written by hand", "drawn": "drawn at random"}
CAUGHT = ("killed", "timeout", "crashed")
Row = dict[str, Any]
INTRODUCTION = """\
# Mutation testing

A test is worth something if it fails when the code is wrong. `python -m
tests.mutation` makes the code wrong on purpose, one small change at a time, and runs
the tests that execute the changed line. A change that no test notices survives. There
are two sets of changes: formulas spoilt by hand (`tests/mutation/formulas.toml`: a lost
transpose, the other normalisation, a swapped pair), and what
[cosmic-ray](https://cosmic-ray.readthedocs.io) does to one operator, comparison, number
or keyword, at positions drawn at random from all core modules.

Core is every module of the package but `bayes`, `curvature`, `ntk` and those that print
(`diagnostics`). A mutant survives if it passes as many of
the tests that run its line as take {budget:g} seconds unmutated; tests that would have
been run after these might still have caught it. Hanging and crashing count as caught.
The same was done with nothing changed {controls} times, and {passed} times all passed.
Tests were written for what survived earlier runs, which was then tried again: the score
of the drawn ones is that of the suite as it is, not an estimate for other changes.

{command}
"""
COMMAND = """\
```sh
.venv/bin/python -m tests.mutation measure   # the fast suite: which test runs a line
.venv/bin/python -m tests.mutation run       # resumable, a progress bar
.venv/bin/python -m tests.mutation report    # this page
```
"""


def write(rows: dict[str, Row]) -> None:
    """Writes the page.

    Args:
        rows: Results by identity.
    """
    found = [row for row in rows.values() if row["kind"] in KINDS]
    controls = [row for row in rows.values() if row["kind"] == "control"]
    PAGE.write_text("\n".join([
        INTRODUCTION.format(
            budget=min(row["budget"] for row in found),
            controls=len(controls),
            passed=sum(row["outcome"] == "survived" for row in controls),
            command=COMMAND,
        ),
        *score_table(found),
        *part_table(found),
        *survivors(found),
    ]))  # fmt: skip


def judged(rows: Iterable[Row]) -> tuple[int, int, int]:
    """How many mutants there are, are caught, and change nothing that can be seen."""
    rows, same = list(rows), equivalent()
    caught = sum(row["outcome"] in CAUGHT for row in rows)
    alike = sum(row["id"] in same and row["outcome"] == "survived" for row in rows)
    return len(rows), caught, alike


def equivalent() -> dict[str, str]:
    """Survivors that cannot be told from the original, and why."""
    return reasons("equivalent")


def reasons(kind: str) -> dict[str, str]:
    """What is said of survivors, by identity."""
    return tomllib.loads(REASONS.read_text()).get(kind, {})


def interval(caught: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    References:
        Wilson, 1927, JASA 22(158).
    """
    z, p = 1.96, caught / total
    centre, base = p + z**2 / (2 * total), 1 + z**2 / total
    half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return (centre - half) / base, (centre + half) / base


def score_table(rows: Sequence[Row]) -> list[str]:
    """The scores of both sets."""
    lines = [
        "| mutants | tried | caught | score | 95 % interval | less the equivalent |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, name in (*KINDS.items(), (None, "all")):
        total, caught, alike = judged(r for r in rows if kind in (None, r["kind"]))
        if not total:
            continue
        low, high = interval(caught, total)
        bounds = f"{low:.1%} to {high:.1%}" if kind == "drawn" else ""
        rest = f"{caught / (total - alike):.1%}"
        cells = (name, total, caught, f"{caught / total:.1%}", bounds, rest)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def part_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.removeprefix("kfac_jax_lite/").split("/")
    return parts[0] + "/" if len(parts) > 1 else "others"


def part_table(rows: Sequence[Row]) -> list[str]:
    """The scores by part of the package."""
    lines = ["| part | tried | caught | score |", "|---|---:|---:|---:|"]
    for part in sorted({part_of(row["module"]) for row in rows}):
        total, caught, _ = judged(r for r in rows if part_of(r["module"]) == part)
        lines.append(f"| `{part}` | {total} | {caught} | {caught / total:.1%} |")
    outcomes = Counter(row["outcome"] for row in rows)
    told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    return [*lines, "", f"Outcomes: {told}.", ""]


def survivors(rows: Sequence[Row]) -> list[str]:
    """Every mutant that was not caught, with what is known about it."""
    why = equivalent() | reasons("open")
    lines = ["## Survivors", ""]
    for row in sorted(rows, key=lambda row: (row["module"], row["line"])):
        if row["outcome"] in CAUGHT:
            continue
        before, after = (*row["change"], "", "")[:2]
        mark = " (equivalent)" if row["id"] in equivalent() else ""
        reason = why.get(row["id"], "")
        said = f"{row['name']}{mark}. {reason}".strip()
        lines += [
            f"- `{row['module']}`, line {row['line']}: {said}",
            "",
            f"    `{before}`<br>",
            f"    `{after}`",
            "",
        ]
    return lines
