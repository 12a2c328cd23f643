"""Seconds of several trials of a search trained as one program, and one after another.

    python -m experiments.benchmarks.mapped_trials --datasets digits,mnist5k --count 8

Whole trials with their evaluations, compiled before. Each round has one call of the
program of all trials, and as many calls of the program of one, in turns.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna

from experiments.benchmarks.common import (
    OUT,
    comma_list,
    machine,
    make_parser,
    positive_int,
    quartiles,
    settings,
    text_table,
    write_json,
)
from experiments.configs.tune import TUNED, default_tuning
from experiments.progress import ended
from experiments.tuning.trials import Program, in_loop, make_problem, stacked

DATASETS = ["digits", "mnist5k"]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--datasets", type=comma_list(DATASETS), default=",".join(DATASETS))
    add("--optimizers", type=comma_list(list(TUNED)), default=",".join(TUNED))
    add("--model", default="mlp", help="network, as in train")
    add("--epochs", type=positive_int, help="of a trial; that of tune if not given")
    add("--count", type=positive_int, default=8, help="trials")
    add("--rounds", type=positive_int, default=5, help="timed calls")
    add("--out", type=Path, default=OUT, help="folder of the result")
    return parser.parse_args(argv)


def run(program: Program, trials: list[dict[str, float]]) -> tuple[float, np.ndarray]:
    """Trains some trials at once."""
    began, problem = time.perf_counter(), program.problem
    values = stacked(trials, program.count)
    carry, found = program.start(values, [0] * program.count), {}
    for number in range(0, problem.steps, problem.every):
        carry, _ = program.advance(carry, values, number)
        found = program.evaluate(carry)
    return time.perf_counter() - began, found["loss"]


def benchmark(args: argparse.Namespace, dataset: str, name: str) -> dict[str, Any]:
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
    ratios = [x / y for x, y in zip(alone, together, strict=True)]
    jax.clear_caches()
    return {
        "mapping": "loop" if in_loop(config) else "vmap",
        "steps": problem.steps,
        "seconds_together": quartiles(together),
        "seconds_one_by_one": quartiles(alone),
        "speedup": quartiles(ratios),
        "first_call_seconds": first,
        "largest_relative_difference": largest,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures what is asked for and writes ``mapped_trials.json``."""
    args = arguments(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result: dict[str, Any] = {"machine": machine(), "settings": settings(args)}
    result["rows"], table = {}, []
    for dataset in args.datasets:
        for name in args.optimizers:
            row = benchmark(args, dataset, name)
            result["rows"][f"{dataset}, {name}"] = row
            write_json(args.out / "mapped_trials.json", result)
            low, middle, high = row["speedup"]
            seconds = row["seconds_together"][1], row["seconds_one_by_one"][1]
            table.append(
                (
                    dataset,
                    name,
                    row["mapping"],
                    *seconds,
                    middle,
                    f"{low:.2f}-{high:.2f}",
                )
            )
    header = ("data", "optimiser", "mapping", "together, s", "one by one, s")
    header += ("ratio", "quartiles")
    print(text_table(header, table))
    print(f"Written to {args.out / 'mapped_trials.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
