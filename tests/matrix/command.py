"""The command: which cells there are, which are left, and the table."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from tests.matrix import page
from tests.matrix.cell import COUNTS, PINNED, Cell, run_cell, succeeded
from tests.matrix.sources import ROOT, MatrixError, build, copy, digest, tracked


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Tests the wheel under several Pythons, with oldest and newest packages."""

    python: tuple[str, ...] = ("python3.11", "python3.12", "python3.13")
    """Interpreters: names on the PATH, or paths."""
    packages: tuple[str, ...] = ("oldest", "newest")
    """Sets of packages; "0.11" is the newest of all with jax 0.11."""
    full: bool = False
    """The whole fast suite over the checkout's sources, not a part over the wheel."""
    out: Path = ROOT / "tests" / "results" / "matrix.jsonl"
    """The result file; finished cells in it are skipped."""
    folder: Path = ROOT / "runs" / "matrix"
    """Environments and logs; an environment is removed when its cell is finished."""
    minutes: float = 60.0
    """How long the tests of a cell may take."""

    @property
    def suite(self) -> str:
        """The name of the selected tests."""
        return "full" if self.full else "smoke"


def full_version(interpreter: str) -> str | None:
    """The version of an interpreter such as ``3.12.1``, None if there is none."""
    path = shutil.which(interpreter)
    if path is None:
        return None
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([path, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def cells(config: Matrix, sources: str) -> tuple[list[Cell], list[str]]:
    """The cells of a configuration.

    Args:
        config: the command's settings.
        sources: what `digest` says of the files.

    Returns:
        The cells, and the interpreters that were not found.

    Raises:
        MatrixError: if there is no such set of packages.
    """
    for packages in config.packages:
        if packages not in ("oldest", "newest", *page.MINORS):
            known = ", ".join(("oldest", "newest", *page.MINORS))
            raise MatrixError(f"--packages {packages}: wanted one of {known}.")
    found, missing = [], []
    for name in config.python:
        version = full_version(name)
        if version is None:
            missing.append(name)
            continue
        found += [
            Cell(shutil.which(name) or name, version, packages, config.suite, sources)
            for packages in config.packages
        ]
    return found, missing


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the result file, those of a file that ends within one without it."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def store(path: Path, row: dict[str, Any]) -> None:
    """Puts a row into the result file, in place of an earlier one of its cell."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        minor = re.match(r"\d+\.\d+", row["python"])
        assert minor
        return minor[0], row["packages"], row["suite"]

    kept = [other for other in rows(path) if key(other) != key(row)]
    kept = sorted([*kept, row], key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    new.replace(path)


def table(found: list[dict[str, Any]]) -> Table:
    """The rows of the result file as a table."""
    result = Table("Python", "packages", "suite", *PINNED, *COUNTS, "seconds")
    for row in found:
        versions = [row["versions"].get(name, "") for name in PINNED]
        numbers = [str(row[name]) for name in (*COUNTS, "seconds")]
        style = None if succeeded(row) else "red"
        start = [row[name] for name in ("python", "packages", "suite")]
        result.add_row(*start, *versions, *numbers, style=style)
    return result


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Runs what is not finished, and prints the table.

    Args:
        argv: the command line; that of the process by default.
        console: where to print.

    Returns:
        0 if every cell passed, 1 if one did not or an interpreter is missing.
    """
    config = tyro.cli(Matrix, args=argv, prog="tests.matrix")
    console = console or Console()
    files = tracked()
    config = dataclasses.replace(config, folder=config.folder.resolve())
    config.folder.mkdir(parents=True, exist_ok=True)
    try:
        wanted, missing = cells(config, digest(files))
    except MatrixError as error:
        console.print(str(error))
        return 1
    for name in missing:
        console.print(f"{name} was not found: give its path with --python.")
    done = rows(config.out)
    left = [c for c in wanted if not any(c.is_that_of(row) for row in done)]
    failed = run_cells(left, config, files, console) if left else []
    console.print(table(rows(config.out)))
    if config.out == Matrix.out:
        page.write(rows(config.out))
    return int(bool(failed or missing))


def run_cells(
    left: list[Cell], config: Matrix, files: list[Path], console: Console
) -> list[Cell]:
    """Runs cells one after the other and stores what they gave.

    Args:
        left: the cells.
        config: the command's settings.
        files: the files of the checkout.
        console: where progress goes.

    Returns:
        The cells that did not pass.
    """
    wheel = build(files, config.folder)
    tree = config.folder / "tree"
    copy([f for f in files if config.full or f.parts[0] != "kfac_jax_lite"], tree)
    failed = []
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("cells", total=len(left))
        for cell in left:
            progress.update(task, description=cell.title)
            log = config.folder / f"{cell.title}.log"
            try:
                row = run_cell(cell, config.folder, wheel, tree, config.minutes)
            except MatrixError as error:
                failed.append(cell)
                console.print(f"{cell.title}: {error}")
            else:
                store(config.out, row)
                if not succeeded(row):
                    failed.append(cell)
                    number = row["failed"] + row["errors"]
                    console.print(f"{cell.title}: {number} tests failed; see {log}")
            progress.advance(task)
    return failed
