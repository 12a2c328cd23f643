"""From metrics files to the curves of the runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.configs.train import OPTIMIZERS
from experiments.errors import MetricsError
from experiments.metrics import FILE_NAME, read_records

STATUSES = ("finished", "diverged")
MISSING = object()


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_score(value: Any) -> bool:
    """Whether it is a number, or null for one that was not finite."""
    return value is None or is_number(value)


Check = tuple[str, Callable[[Any], bool]]
NUMBER: Check = ("a number", is_number)
SCORE: Check = ("a number or null", is_score)
TEXT: Check = ("a text", lambda value: isinstance(value, str))
# What tables and plots read, by kind of record.
FIELDS: dict[str, dict[str, Check]] = {
    "config": {
        "optimizer": TEXT, "title": TEXT, "config.model": TEXT, "data.title": TEXT,
    },
    "train": {"loss": SCORE},
    "eval": {"seconds": NUMBER, "train_loss": SCORE, "test_loss": SCORE},
    "end": {
        "status": (" or ".join(STATUSES), lambda value: value in STATUSES),
        "compile_seconds": NUMBER,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of one run."""

    optimizer: str  # name of the optimiser
    title: str  # its name in tables and plots
    config: dict[str, Any]  # first record: configuration, data and versions
    train: list[dict[str, Any]]  # mean batch losses, in order of the steps
    evals: list[dict[str, Any]]  # evaluations, in order of the steps
    end: dict[str, Any] | None  # last record, or None for a run that has not ended

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
    """Reads every run of a run folder."""
    runs = []
    for path in sorted(folder.glob(f"*/{FILE_NAME}")):
        records = read_records(path)
        if not records:
            continue
        check_records(path, records)
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


def check_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Raises if a record lacks a field that a table or a plot reads, or has another."""
    for line, record in enumerate(records, start=1):
        kind = record["kind"]
        for name, (wanted, right) in FIELDS.get(kind, {}).items():
            value: Any = record
            for part in name.split("."):
                known = isinstance(value, dict) and part in value
                value = value[part] if known else MISSING
            if value is MISSING:
                raise MetricsError(
                    f"{path}, line {line} ({kind}) has no {name}; wanted {wanted}."
                )
            if not right(value):
                raise MetricsError(
                    f"{path}, line {line} ({kind}): {name} is {value!r}; wanted "
                    f"{wanted}."
                )
        for name, value in record.items():
            if kind == "eval" and name.startswith("test_") and not is_score(value):
                raise MetricsError(
                    f"{path}, line {line} ({kind}): {name} is {value!r}; wanted a "
                    "number or null."
                )


def order(optimizer: str) -> tuple[int, str]:
    """Sorts optimisers as the configuration lists them, others after them."""
    known = OPTIMIZERS.index(optimizer) if optimizer in OPTIMIZERS else len(OPTIMIZERS)
    return known, optimizer
