"""The finished runs of a batch-size study, cell by cell."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import MetricsError
from experiments.studies.batch_size.config import OPTIMIZERS, Cell
from experiments.studies.batch_size.run import final, seeds_of, winner_of
from experiments.studies.batch_size.statistics import Estimate, estimate, paired
from experiments.studies.cells import Record
from experiments.studies.records import query, without_nulls

SGD, KFAC = "sgd", "kfac"
TITLES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "kfac": "K-FAC"}


class Result(NamedTuple):
    """A cell's finished runs."""

    cell: Cell  # optimiser and batch size
    trials: list[Record]  # of the search, in order
    winner: Record  # the best of them
    seeds: dict[int, Record]  # the winner's runs on the test images, by seed

    def accuracies(self) -> dict[int, float]:
        """Test accuracy at the end, by seed."""
        return {seed: final(record) for seed, record in self.seeds.items()}

    def at_end(self, name: str) -> Estimate | None:
        """The last item of a curve of the seeds' runs; None if some have none."""
        ends = [record[name][-1] for record in self.seeds.values()]
        return None if None in ends else estimate(ends)

    def total(self, name: str) -> Estimate:
        """The sum of a curve of the seeds' runs, such as their seconds."""
        return estimate([float(np.sum(r[name])) for r in self.seeds.values()])

    def curve(self, name: str) -> np.ndarray:
        """The mean of a curve over the seeds, as far as all of them go."""
        curves = [record[name] for record in self.seeds.values()]
        length = min(map(len, curves))
        return np.mean([curve[:length] for curve in curves], 0)

    def steps(self) -> int:
        """Iterations of an epoch."""
        record = next(iter(self.seeds.values()))
        return record["step"] // len(record["wall"])


Results = dict[Cell, Result]


def read_results(folder: Path) -> Results:
    """Finished cells, by batch size and optimiser."""
    if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise MetricsError(f"{folder} holds no results of the batch-size study.")
    by_cell: dict[Cell, list[Record]] = {}
    marks = set()
    for record in query(folder, "FROM runs"):
        record["values"] = without_nulls(record["values"])
        cell = Cell(record["optimizer"], record["batch_size"])
        by_cell.setdefault(cell, []).append(record)
        marks.add(record["fingerprint"])
    if len(marks) > 1:
        raise MetricsError(
            f"{folder} holds runs of {len(marks)} configurations; wanted one."
        )
    found = {}
    ordered = sorted(
        by_cell, key=lambda c: (c.batch_size, OPTIMIZERS.index(c.optimizer))
    )
    for cell in ordered:
        trials = [r for r in by_cell[cell] if r["kind"] == "trial"]
        winner = winner_of(trials)
        seeds = seeds_of(by_cell[cell], winner["number"])
        if seeds:
            found[cell] = Result(cell, trials, winner, seeds)
    if not found:
        raise MetricsError(f"{folder}: no cell has runs on the test images yet.")
    return found


def sizes_of(results: Results) -> list[int]:
    """The batch sizes, ascending."""
    return sorted({cell.batch_size for cell in results})


def optimizers_of(results: Results) -> list[str]:
    """The optimisers, in the order of the tables."""
    there = {cell.optimizer for cell in results}
    return [name for name in OPTIMIZERS if name in there]


def leads(results: Results, other: str) -> dict[int, dict[int, float]]:
    """K-FAC's test accuracy less another optimiser's, paired by seed."""
    found = {}
    for size in sizes_of(results):
        ours, theirs = Cell(KFAC, size), Cell(other, size)
        if ours in results and theirs in results:
            pairs = paired(results[ours].accuracies(), results[theirs].accuracies())
            found |= {size: pairs} if pairs else {}
    return found


def best_other(results: Results, size: int) -> str | None:
    """The optimiser other than K-FAC with the highest mean test accuracy."""
    means = {
        cell.optimizer: estimate(list(result.accuracies().values())).mean
        for cell, result in results.items()
        if cell.batch_size == size and cell.optimizer != KFAC
    }
    return max(means, key=lambda name: means[name]) if means else None


def summary(results: Results) -> list[dict[str, Any]]:
    """Numbers of every cell as JSON values."""
    rows = []
    for cell, result in results.items():
        accuracy = estimate(list(result.accuracies().values()))
        rows.append(
            {
                "optimizer": cell.optimizer,
                "batch_size": cell.batch_size,
                "trials": len(result.trials),
                "pruned": sum(r["pruned"] for r in result.trials),
                "diverged": sum(r["diverged"] for r in result.trials),
                "winner": result.winner["number"],
                "validation_accuracy": final(result.winner),
                "values": result.winner["values"],
                "seeds": accuracy.seeds,
                "test_accuracy": accuracy.mean,
                "half_interval": accuracy.half,
            }
        )
    return rows
