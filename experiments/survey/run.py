"""Runs the survey: what is missing of its cells, in one process or several.

    python -m experiments.main survey --size small --workers 2 --data-dir <folder>

A cell is a data set and a network; its finished runs are the lines of its file, and the
same command goes on after them. Every cell is one process's alone, so a file has one
writer; several machines may run disjoint parts (``--datasets``, ``--models``) into
folders whose files are then put together.
"""

import itertools
import math
import multiprocessing
import os
import signal
import time
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

from experiments.errors import ExperimentError
from experiments.studies.records import Cells, Record
from experiments.survey.config import Cell, Setting, SurveyConfig
from experiments.survey.measure import checkpoint, size_of
from experiments.survey.problem import (
    Problem,
    Program,
    load,
    make_problem,
    make_program,
    train,
)

KIND = "run"
# ``(what happened, setting, text)``: "done", or "failed" with the reason.
Tell = Callable[[str, str, str], None]


def cell_name(dataset: str, model: str) -> str:
    """The name of a cell and of its file."""
    return f"{dataset}-{model}"


def missing(config: SurveyConfig, cells: Cells, name: str) -> list[Setting]:
    """The settings of a cell that have no run yet."""
    done = {record["run"] for record in cells.read(name)}
    return [s for s in config.settings() if f"{name}-{s.name}" not in done]


def run_one(
    config: SurveyConfig, problem: Problem, program: Program, setting: Setting
) -> Record:
    start, rows, size = time.perf_counter(), [], 0
    data = problem.data
    key = jax.random.key(setting.seed)
    for step, params in train(config, problem, program, setting):
        size = size_of(params)
        epoch = step * setting.batch_size / len(data.y_train)
        found = checkpoint(config, problem, params, key)
        rows += [{"step": step, "epoch": round(epoch, 3), **row} for row in found]
        if not math.isfinite(found[0]["train_loss"]):
            break  # it has diverged: these rows have no figures
    return {
        "num_params": size,
        "num_train": len(data.y_train),
        "num_test": len(data.y_test),
        "optimizer": setting.optimizer,
        "learning_rate": setting.learning_rate,
        "batch_size": setting.batch_size,
        "weight_decay": setting.weight_decay,
        "seed": setting.seed,
        "damping": config.damping,
        "data": data.title,
        "source": data.source,
        "seconds": round(time.perf_counter() - start, 3),
        "rows": rows,
    }


def run_cell(config: SurveyConfig, dataset: str, model: str, tell: Tell) -> None:
    """Runs what is missing of a cell; a run that fails does not stop the others."""
    name, cells = cell_name(dataset, model), Cells(config)
    try:
        wanted = missing(config, cells, name)
        problem = make_problem(config, model, load(dataset, config)) if wanted else None
    except ExperimentError as error:
        tell("failed", "", str(error))
        return
    for optimizer, settings in itertools.groupby(wanted, lambda s: s.optimizer):
        assert problem is not None  # there are settings
        program = make_program(config, problem, optimizer)
        for setting in settings:
            try:
                found = run_one(config, problem, program, setting)
                facts = {"run": f"{name}-{setting.name}", "dataset": dataset}
                facts |= {"model": model, **found}
                cells.append(name, KIND, config.steps, **facts)
            except Exception as error:  # noqa: BLE001 - named, and the others go on
                tell("failed", setting.name, f"{type(error).__name__}: {error}")
            else:
                tell("done", setting.name, f"{found['seconds']:.1f} s")


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
