"""The page of the interval study: HTML, Markdown and the runs as Parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.studies.pages import Page, Plot, Section, Table, save_page, show
from experiments.studies.records import commits, machines, query, save_parquet
from experiments.studies.sizes import EVERY, RULES

EVALUATIONS = """
    SELECT rule, threshold, evaluation.step AS step,
        100 * avg(evaluation.accuracy) AS accuracy
    FROM (SELECT cell.rule, cell.threshold, unnest(evaluations) AS evaluation FROM runs)
    GROUP BY rule, threshold, step
    ORDER BY list_position($rules, rule), threshold, step
"""


def accuracies(file: Path) -> Table:
    """The test accuracy during training, a mean over the seeds."""
    found: dict[tuple, dict[int, float]] = {}
    for row in query(file, EVALUATIONS, rules=[EVERY, *RULES]):
        of_cell = found.setdefault((row["rule"], row["threshold"]), {})
        of_cell[row["step"]] = row["accuracy"]
    steps = sorted({step for of_cell in found.values() for step in of_cell})
    rows = [
        (rule, show(threshold), *(f"{x[s]:.2f}" if s in x else "–" for s in steps))
        for (rule, threshold), x in found.items()
    ]
    header = ("rule", "λ", *(f"step {step}" for step in steps))
    caption = "Test accuracy in %, means over the seeds"
    return Table(header, tuple(rows), caption)


def save_interval_page(
    file: Path, facts: dict[str, Any], table: Table, plots: Sequence[Plot], folder: Path
) -> list[Path]:
    """Writes the page of an interval study and its runs as Parquet."""
    config = facts["config"]
    setting = (
        f"Factor traffic and accuracy of refresh intervals per layer: "
        f"{facts['data']['title']}, {config['model']}, batch {config['batch_size']}, "
        f"{config['steps']} steps. Traffic is what the all-reduces of the statistics "
        "work on, as a share of the same with every layer refreshed at every step."
    )
    sections = (
        Section("Result", (setting, table, *plots)),
        Section("During training", (accuracies(file),)),
    )
    parquet = folder / f"{file.stem}.parquet"
    save_parquet(file, parquet)
    page = Page("Interval study", sections, config, machines(file), commits(file))
    return [*save_page(page, folder, file.stem), parquet]
