"""From metrics files to the curves of the runs."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.configs.train import OPTIMIZERS
from experiments.errors import MetricsError
from experiments.metrics import FILE_NAME, read_records


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of one run.

    Attributes:
        optimizer: name of the optimiser.
        title: its name in tables and plots.
        config: first record: configuration, data and versions.
        train: mean batch losses, in order of the steps.
        evals: evaluations, in order of the steps.
        end: last record, or None for a run that has not ended.
    """

    optimizer: str
    title: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def status(self) -> str:
        """How the run ended: finished, diverged, or unfinished if it has not."""
        return self.end["status"] if self.end else "unfinished"

    def best_train_loss(self) -> float | None:
        """Returns the smallest training loss of the evaluations."""
        losses = [record["train_loss"] for record in self.evals]
        return min((loss for loss in losses if loss is not None), default=None)

    def first_at(self, loss: float) -> dict[str, Any] | None:
        """Returns the first evaluation whose training loss is no larger than `loss`."""
        for record in self.evals:
            if record["train_loss"] is not None and record["train_loss"] <= loss:
                return record
        return None


def read_runs(folder: Path) -> list[RunRecords]:
    """Reads every run of a run folder.

    Args:
        folder: the run folder, with one folder per optimiser.

    Returns:
        The runs, in the order in which the configuration lists their optimisers.

    Raises:
        MetricsError: if there is none, or a file cannot be read.
    """
    runs = []
    for path in sorted(folder.glob(f"*/{FILE_NAME}")):
        records = read_records(path)
        if not records:
            continue
        if records[0]["kind"] != "config":
            raise MetricsError(f"{path} does not start with a configuration.")
        kinds = {
            kind: [record for record in records if record["kind"] == kind]
            for kind in ("train", "eval", "end")
        }
        runs.append(
            RunRecords(
                optimizer=records[0]["optimizer"],
                title=records[0]["title"],
                config=records[0],
                train=kinds["train"],
                evals=kinds["eval"],
                end=kinds["end"][-1] if kinds["end"] else None,
            )
        )
    if not runs:
        raise MetricsError(f"{folder} holds no {FILE_NAME} with records.")
    return sorted(runs, key=lambda run: order(run.optimizer))


def order(optimizer: str) -> tuple[int, str]:
    """Sorts optimisers as the configuration lists them, others after them."""
    known = OPTIMIZERS.index(optimizer) if optimizer in OPTIMIZERS else len(OPTIMIZERS)
    return known, optimizer
