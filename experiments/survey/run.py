"""Runs the survey: what is missing of its cells, in one process or several.

    python -m experiments.main survey --size small --workers 2 --data-dir <folder>

A cell is a data set and a network; its finished runs are the lines of its file, and the
same command goes on after them. Every cell is one process's alone, so a file has one
writer; several machines may run disjoint parts (``--datasets``, ``--models``) into
folders whose files are then put together.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.studies.cells import Cells
from experiments.survey.cell import cell_name, missing, run_cell
from experiments.survey.config import Cell, SurveyConfig

# Worker processes share the processor by cells, not inside of a program.
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
XLA_THREADS = "--xla_cpu_multi_thread_eigen"
Workers = dict[Connection, tuple[Cell, Any]]
# ``(cell, what happened, setting, text)``
Hear = Callable[[Cell, str, str, str], None]


def run_survey(config: SurveyConfig, console: Console) -> list[str]:
    """Runs what is missing."""
    cells = Cells(config)
    total = len(config.cells()) * len(config.settings())
    todo = {cell: missing(config, cells, cell_name(*cell)) for cell in config.cells()}
    left = {cell: len(settings) for cell, settings in todo.items() if settings}
    problems: list[str] = []
    with progress_bar(console) as bar:
        task = bar.add_task("runs", total=total, completed=total - sum(left.values()))

        def hear(cell: Cell, what: str, setting: str, text: str) -> None:
            name = cell_name(*cell)
            if what == "done":
                bar.advance(task)
                left[cell] -= 1
                if not left[cell]:
                    console.print(f"{name}: finished", highlight=False)
                return
            problems.append(f"{name}{setting and ', ' + setting}: {text}")
            console.print(problems[-1], style="red", markup=False, highlight=False)

        if config.workers == 1:
            for cell in left:
                run_cell(config, *cell, tell=lambda *told, c=cell: hear(c, *told))
                jax.clear_caches()
        else:
            run_workers(config, list(left), hear)
    console.print(f"Results: {config.out}", soft_wrap=True, highlight=False)
    return problems


def progress_bar(console: Console) -> Progress:
    """All runs of the survey, with the time that they will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        # Longer than a cell: its first runs compile.
        speed_estimate_period=600,
    )


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def for_workers() -> dict[str, str]:
    """What a worker finds in its environment beside what is there."""
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_THREADS in flags:
        return ONE_THREAD
    return ONE_THREAD | {"XLA_FLAGS": f"{flags} {XLA_THREADS}=false".strip()}


def work(config: SurveyConfig, cell: Cell, pipe: Connection) -> None:
    """What a worker process does: one cell."""
    # The first process is interrupted too, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_cell(config, *cell, tell=lambda *told: pipe.send(told))
    pipe.close()


def run_workers(config: SurveyConfig, cells: list[Cell], hear: Hear) -> None:
    """Runs cells in processes of their own, so many at once as there are workers."""
    context: Any = multiprocessing.get_context("spawn")
    waiting: list[Cell] = list(cells)
    running: Workers = {}
    try:
        while waiting or running:
            while waiting and len(running) < config.workers:
                cell = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=work, args=(config, cell, theirs), daemon=True
                )
                with environment(for_workers()):
                    process.start()
                theirs.close()
                running[ours] = cell, process
            ready = wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                listen(running, pipe, hear)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def listen(running: Workers, pipe: Connection, hear: Hear) -> None:
    """Hears one message of a worker, or that it has ended."""
    cell, process = running[pipe]
    try:
        told = pipe.recv()
    except EOFError:
        del running[pipe]
        process.join()
        if process.exitcode:
            hear(cell, "failed", "", ended(process.exitcode))
    else:
        hear(cell, *told)


def ended(status: int) -> str:
    """How a worker ended that told nothing."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
