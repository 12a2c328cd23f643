"""Table and plots of a comparison, made from the metrics files alone."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

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


TIMES = (
    "Seconds are training time without evaluation and compilation; the total is with "
    "compilation"
)
SCORES = ("accuracy", "squared_error", "bits_per_character")


def make_table(runs: Sequence[RunRecords], baseline: str = "adam") -> Table:
    """Builds the table of a comparison."""
    reference = next((run for run in runs if run.optimizer == baseline), runs[0])
    goal = reference.best_train_loss()
    first = runs[0].config
    title = f"{first['data']['title']}, {first['config']['model']}"
    table = Table(title=title, caption=caption(reference, goal), box=box.SIMPLE_HEAD)
    table.add_column("optimiser", no_wrap=True)
    score = score_of(runs)
    for name in (
        "train loss",
        "test loss",
        f"test {score.replace('_', ' ')}",
        "steps",
        "seconds",
        "compile s",
        "total s",
        f"steps to {reference.title}'s best",
        "seconds to it",
    ):
        table.add_column(name, justify="right", min_width=7)
    for run in runs:
        table.add_row(*row(run, goal, score))
    return table


def row(run: RunRecords, goal: float | None, score: str) -> list[str]:
    title = run.title if run.status == "finished" else f"{run.title} ({run.status})"
    final: dict[str, Any] = run.evals[-1] if run.evals else {}
    last = final.get(f"test_{score}")
    percent = score == "accuracy" and last is not None
    reached = None if goal is None else run.first_at(goal)
    taken = final.get("seconds")
    compiling = run.end["compile_seconds"] if run.end else None
    return [
        title,
        number(final.get("train_loss")),
        number(final.get("test_loss")),
        f"{last:.2%}" if percent else number(last),
        str(final.get("step", "-")),
        seconds(taken),
        seconds(compiling),
        seconds(None if taken is None or compiling is None else taken + compiling),
        "-" if reached is None else str(reached["step"]),
        "-" if reached is None else seconds(reached["seconds"]),
    ]


def caption(reference: RunRecords, goal: float | None) -> str:
    """Says what the last two columns compare with."""
    if goal is None:
        return f"{TIMES}."
    return f"{reference.title}'s best training loss: {number(goal)}. {TIMES}."


def score_of(runs: Sequence[RunRecords]) -> str:
    """Returns which measure besides the loss the evaluations of the runs have."""
    seen = {name for run in runs for record in run.evals for name in record}
    return next((name for name in SCORES if f"test_{name}" in seen), SCORES[0])


def number(value: float | None) -> str:
    """Formats a number with four digits; a dash stands for none."""
    return "-" if value is None else f"{value:.4g}"


def seconds(value: float | None) -> str:
    """Formats seconds with one decimal; a dash stands for none."""
    return "-" if value is None else f"{value:.1f}"


# One colour per optimiser, the same in every plot; told apart by colour-blind readers.
COLOURS = {
    "kfac": "#d55e00",
    "sgd": "#009e73",
    "adam": "#0072b2",
    "adamw": "#cc79a7",
}
AXES = {"steps": ("step", "steps"), "seconds": ("seconds", "seconds of training")}


def save_plots(runs: Sequence[RunRecords], folder: Path) -> list[Path]:
    """Writes ``loss_vs_steps.png`` and ``loss_vs_seconds.png``."""
    paths = []
    for name, (field, label) in AXES.items():
        figure = draw(runs, field, label)
        path = folder / f"loss_vs_{name}.png"
        try:
            FigureCanvasAgg(figure).print_png(path)
        except OSError as error:
            raise MetricsError(f"{path} cannot be written: {error}.") from error
        paths.append(path)
    return paths


def draw(runs: Sequence[RunRecords], field: str, label: str) -> Figure:
    """Draws training and test loss side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    first = runs[0].config
    figure.suptitle(f"{first['data']['title']}, {first['config']['model']}")
    axes = figure.subplots(1, 2)
    for axis, split in zip(axes, ("train", "test"), strict=True):
        for run in runs:
            points = [
                (record[field], record[f"{split}_loss"])
                for record in run.evals
                if record[f"{split}_loss"] is not None
            ]
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=run.title,
                color=COLOURS.get(run.optimizer),
                marker=".",
            )
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(f"{'training' if split == 'train' else 'test'} loss")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    return figure


__all__ = ["RunRecords", "make_table", "read_runs", "save_plots"]
