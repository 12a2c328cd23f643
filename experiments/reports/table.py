"""The table at the end of a comparison."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.reports.reading import RunRecords

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
    """Returns the cells of one run."""
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
