"""The survey as a table of DuckDB, from JSON lines or from Parquet.

    python -m experiments.main survey query "SELECT matrix, avg(trace) FROM survey ..."

``survey`` has the columns of `schema`. ``checkpoints`` is the same with ``checkpoint``,
counted from 0 in every run, ``last``, whether it is the run's last, and ``gap``, test
loss less training loss at the run's last checkpoint.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import duckdb
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.errors import MetricsError
from experiments.studies.records import connect
from experiments.survey.config import (
    RECORD_COLUMNS,
    ROW_COLUMNS,
    RUN_COLUMNS,
    SurveyQuery,
)

PARQUET = "survey.parquet"
MOST_ROWS = 200
SORTED = "dataset, model, run, step, matrix, approximation"
CHECKPOINTS = """
    CREATE VIEW checkpoints AS
    SELECT *, max(round(test_loss::DOUBLE - train_loss::DOUBLE, 6)) FILTER (last)
        OVER (PARTITION BY run) AS gap
    FROM (
        SELECT *, dense_rank() OVER (PARTITION BY run ORDER BY step) - 1 AS checkpoint,
            step = max(step) OVER (PARTITION BY run) AS last
        FROM survey
    )
"""


def source_of(folder: Path) -> Path:
    if any(path.stat().st_size for path in folder.glob("*.jsonl")):
        return folder
    if (folder / PARQUET).is_file():
        return folder / PARQUET
    raise MetricsError(
        f"{folder} holds no survey: neither JSON lines nor {PARQUET}. Run "
        "`python -m experiments.main survey` first, or give its --folder."
    )


@contextlib.contextmanager
def open_survey(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory with ``survey`` and ``checkpoints``."""
    source = source_of(folder)
    with connect(source) as base:
        try:
            if source == folder:
                base.execute(unfold())
            else:
                base.execute("CREATE TABLE survey AS FROM runs")
            base.execute(CHECKPOINTS)
        except duckdb.Error as error:
            raise MetricsError(f"{source} is no survey: {first_line(error)}") from error
        yield base


def unfold() -> str:
    """The statement that makes ``survey`` of the runs: a row for each of their rows."""
    run = [f'"{c.source}"::{c.kind} AS {c.name}' for c in RUN_COLUMNS]
    row = [f'entry."{c.source}"::{c.kind} AS {c.name}' for c in ROW_COLUMNS]
    columns = ", ".join([*run, *row, *RECORD_COLUMNS])
    return (
        f"CREATE TABLE survey AS SELECT {columns} "
        "FROM (SELECT *, unnest(rows) AS entry FROM runs WHERE kind = 'run') "
        f"ORDER BY {SORTED}"
    )


def save_survey(folder: Path, path: Path) -> None:
    """Writes the table for any program that reads Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    name = str(temporary).replace("'", "''")
    options = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 19"
    with open_survey(folder) as base:
        base.execute(f"COPY survey TO '{name}' ({options})")
    os.replace(temporary, path)


def run_query(config: SurveyQuery, console: Console) -> None:
    """Prints the answer of a query; ``COPY (...) TO 'file.csv'`` writes it instead."""
    with open_survey(config.folder) as base:
        try:
            answer = base.sql(config.sql)
            if answer is None:
                console.print("Done.")
                return
            names = answer.columns
            text = answer.select("COLUMNS(*)::VARCHAR")
            rows = text.limit(MOST_ROWS + 1).fetchall()
        except duckdb.Error as error:
            raise MetricsError(f"The query failed: {first_line(error)}") from error
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text(value or "") for value in row))
    console.print(table, highlight=False)
    if len(rows) > MOST_ROWS:
        console.print(
            f"Only the first {MOST_ROWS} rows; COPY (SELECT …) TO 'file.csv' writes "
            "all.",
            soft_wrap=True,
        )


def first_line(error: Exception) -> str:
    """What DuckDB says, without the picture of the place."""
    return str(error).splitlines()[0]
