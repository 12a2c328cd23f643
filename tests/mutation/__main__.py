"""The command line of mutation testing; see the package's docstring."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tyro
from tqdm import tqdm

from tests.matrix.sources import copy, tracked
from tests.mutation import mutants
from tests.mutation.covering import Covering, measure, within
from tests.mutation.mutants import ROOT, Mutant
from tests.mutation.page import write
from tests.mutation.trial import attempt

LEAST_LIMIT = 120  # seconds that even the quickest tests are given
AGAIN = ("survived", "timeout", "error")
RESULTS = mutants.HERE / "results" / "mutants.jsonl"


@dataclass(frozen=True)
class Run:
    """Tries mutants; those that are in the results already are left out.

    Attributes:
        drawn: Mutants drawn from the core modules.
        controls: Mutants that change nothing.
        seed: Of the draw.
        budget: Seconds of tests, as they were measured, that a mutant has to survive.
        workers: Mutants at once.
        again: Try once more what was not caught (with a larger budget, say).
        out: The results, as JSON lines.
    """

    drawn: int = 300
    controls: int = 10
    seed: int = 0
    budget: float = 60.0
    workers: int = 2
    again: bool = False
    out: Path = RESULTS


@dataclass(frozen=True)
class Measure:
    """Runs the fast suite once and notes which test runs which line."""


@dataclass(frozen=True)
class Report:
    """Writes the page of the documentation from the results."""

    results: Path = field(default=RESULTS)


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of every mutant, the last line of each."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: row for row in rows}


def valid(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without formulas that have been rewritten since; their successors were tried."""
    formulas = {mutant.identity for mutant in mutants.formulas()}
    return {k: r for k, r in rows.items() if r["kind"] != "formula" or k in formulas}


def wanted(run: Run) -> Iterator[Mutant]:
    """All mutants of a run that are still to be tried."""
    known = recorded(run.out)
    once_more = {k for k, r in known.items() if run.again and r["outcome"] in AGAIN}
    drawn = [known[k] for k in once_more if known[k]["kind"] == "drawn"]
    yielded = set()
    for mutant in (
        *mutants.formulas(),
        *filter(None, map(mutants.replayed, drawn)),
        *mutants.controls(run.controls, run.seed),
        *mutants.drawn(run.drawn, run.seed),
    ):
        key = mutant.identity
        new = key not in known or (key in once_more and mutant.kind != "control")
        if new and key not in yielded:
            yielded.add(key)
            yield mutant


def copied(folder: Path) -> Path:
    """A copy of the checkout, with the cache of compiled programs."""
    copy(tracked(), folder)
    cache = ROOT / ".pytest_cache"
    if cache.exists():
        shutil.copytree(cache, folder / cache.name)
    return folder


def tried(mutant: Mutant, folder: Path, covering: Covering, budget: float) -> dict:
    """Puts a mutant into a copy, runs its tests there, and takes it out again."""
    path = folder / mutant.module
    lines = [number for number, *_ in mutant.differing] or [mutant.line]
    tests = covering.tests(mutant.module, lines)
    tests = within(tests, covering.times, budget)
    try:
        path.write_text(mutant.source)
        outcome, by, seconds = attempt(folder, tests, 4 * budget + LEAST_LIMIT)
    finally:
        path.write_text(mutant.original)
    return {
        "id": mutant.identity,
        "module": mutant.module,
        "line": mutant.line,
        "kind": mutant.kind,
        "name": mutant.name,
        "change": mutant.change,
        "outcome": outcome,
        "by": by,
        "tests": len(tests),
        "budget": budget,
        "seconds": round(seconds, 1),
    }


def go(run: Run) -> None:
    """Tries every mutant in one of several copies, and writes each result at once."""
    covering, todo = Covering(), list(wanted(run))
    run.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(run.workers):
            folders.put(copied(Path(parent) / str(number)))

        def one(mutant: Mutant) -> dict:
            folder = folders.get()
            try:
                return tried(mutant, folder, covering, run.budget)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(run.workers) as pool, run.out.open("a") as file:
            tasks = [pool.submit(one, mutant) for mutant in todo]
            shown = tqdm(as_completed(tasks), total=len(todo), unit="mutant")
            for row in (task.result() for task in shown):
                file.write(json.dumps(row) + "\n")
                file.flush()
                shown.set_postfix_str(f"{row['outcome']}: {row['module']}")


def main(command: Run | Measure | Report) -> int:
    """Does what was asked for and returns the exit status."""
    match command:
        case Measure():
            return measure()
        case Run():
            go(command)
        case Report():
            write(valid(recorded(command.results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Run | Measure | Report)))  # type: ignore[arg-type]
