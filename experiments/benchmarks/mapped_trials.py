"""Seconds of several trials of a search trained as one program, and one after another.

    python -m experiments.benchmarks.mapped_trials --datasets digits mnist5k --count 8

Whole trials with their evaluations, compiled before. Each round has one call of the
program of all trials, and as many calls of the program of one, in turns.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna

from experiments.benchmarks.common import (
    OUT,
    begin,
    parse,
    quartiles,
    ratios,
    spread,
    text_table,
    write_json,
)
from experiments.configs.train import DatasetName, ModelName
from experiments.configs.tune import TUNED, TunedName, default_tuning
from experiments.progress import ended
from experiments.tuning.trials import Program, in_loop, make_problem, stacked


@dataclasses.dataclass(frozen=True)
class Config:
    """Times trials trained as one program, and one after another."""

    datasets: tuple[DatasetName, ...] = ("digits", "mnist5k")
    """Data sets."""
    optimizers: tuple[TunedName, ...] = TUNED
    """Optimisers."""
    model: ModelName = "mlp"
    """Network, as in train."""
    epochs: int | None = None
    """Of a trial; that of tune if not given."""
    count: int = 8
    """Trials."""
    rounds: int = 5
    """Timed calls."""
    out: Path = OUT
    """Folder of the result."""


def run(program: Program, trials: list[dict[str, float]]) -> tuple[float, np.ndarray]:
    began, problem = time.perf_counter(), program.problem
    values = stacked(trials, program.count)
    carry, found = program.start(values, [0] * program.count), {}
    for number in range(0, problem.steps, problem.every):
        carry, _ = program.advance(carry, values, number)
        found = program.evaluate(carry)
    return time.perf_counter() - began, found["loss"]


def benchmark(args: Config, dataset: str, name: str) -> dict[str, Any]:
    """Measures an optimiser on a data set."""
    config = dataclasses.replace(default_tuning(dataset, args.model), optimizer=name)
    if args.epochs is not None:
        config = dataclasses.replace(config, epochs=args.epochs)
    problem = make_problem(config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    more = [study.ask(config.space.distributions()) for _ in range(args.count - 1)]
    trials = [config.space.usual(), *(trial.params for trial in more)]
    one, many = Program(problem, 1), Program(problem, args.count)
    first = {"one": run(one, trials[:1])[0], "many": run(many, trials)[0]}
    alone, together, largest = [], [], 0.0
    for _ in range(args.rounds):
        seconds, losses = run(many, trials)
        together.append(seconds)
        singles = [run(one, [trial]) for trial in trials]
        alone.append(sum(seconds for seconds, _ in singles))
        apart = np.array([loss[0] for _, loss in singles])
        same = np.isfinite(losses) & np.isfinite(apart)
        gap = np.abs(losses - apart)[same] / np.abs(apart)[same]
        largest = max(largest, float(gap.max(initial=0.0)))
    jax.clear_caches()
    return {
        "mapping": "loop" if in_loop(config) else "vmap",
        "steps": problem.steps,
        "seconds_together": quartiles(together),
        "seconds_one_by_one": quartiles(alone),
        "speedup": ratios(alone, together),
        "first_call_seconds": first,
        "largest_relative_difference": largest,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what is asked for and writes ``mapped_trials.json``."""
    config = parse(Config, argv, "mapped_trials")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result, table = begin(config, rows={}), []
    for dataset, name in itertools.product(config.datasets, config.optimizers):
        row = benchmark(config, dataset, name)
        result["rows"][f"{dataset}, {name}"] = row
        write_json(config.out / "mapped_trials.json", result)
        seconds = row["seconds_together"][1], row["seconds_one_by_one"][1]
        speedup = row["speedup"][1], spread(row["speedup"])
        table.append((dataset, name, row["mapping"], *seconds, *speedup))
    header = ("data", "optimiser", "mapping", "together, s", "one by one, s")
    print(text_table((*header, "ratio", "quartiles"), table))
    print(f"Written to {config.out / 'mapped_trials.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
