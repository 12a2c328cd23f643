"""The runs of one cell, one after the other."""

import itertools
import math
import time
from collections.abc import Callable

import jax

from experiments.errors import ExperimentError
from experiments.studies.cells import Cells, Record
from experiments.survey.config import Setting, SurveyConfig
from experiments.survey.data import load
from experiments.survey.measure import checkpoint, size_of
from experiments.survey.problem import (
    Problem,
    Program,
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
    """Trains and measures."""
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
