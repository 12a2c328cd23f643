"""Time per step of the variational optimisers, as ratios to Adam.

    python -m experiments.benchmarks.bayes_steps --models mlp,lenet5,resnet

All rows train in one process, a cycle of real steps each per round, in an order that
rotates. K-FAC refreshes every 10 and inverts every 100 steps, so that a cycle of 100
steps holds every kind; ratios are made round by round.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    comma_list,
    copy_tree,
    machine,
    make_parser,
    megabytes,
    positive_int,
    quartiles,
    settings,
    text_table,
    write_json,
)
from experiments.benchmarks.networks import SPECS, Problem, make_problem
from experiments.progress import ended

RATE, DAMPING, NUM_DATA = 1e-3, 1e-2, 50_000
REFRESH, INVERT = 10, 100
BASELINE = "Adam"
Step = Callable[..., tuple[Any, Any]]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=comma_list(list(SPECS)), default="mlp,lenet5,resnet")
    add("--rounds", type=positive_int, default=5, help="timed cycles of every row")
    add("--cycle", type=positive_int, default=INVERT, help="steps of a cycle")
    add("--samples", type=positive_int, default=1, help="draws per step")
    add("--out", type=Path, default=OUT, help="folder of the result")
    return parser.parse_args(argv)


def optimisers(problem: Problem) -> dict[str, tuple[Any, Any]]:
    """Loss and optimiser of every row."""
    marked, first = problem.marked_loss(), problem.batches[0]
    tagged = kfac.tag(marked, problem.params, first, fisher="mc")
    squares = kfac.tag(marked, problem.params, first, statistics="squares")
    every = {"interval": kfac.intervals.every(REFRESH), "inverse_interval": INVERT}
    exact = {**every, "inverse": "eigh"}
    layers, bayes = tagged.layers, kfac.bayes
    return {
        BASELINE: (problem.plain_loss(), optax.adam(RATE)),
        "K-FAC": (tagged, kfac.kfac(layers, RATE, DAMPING, **every)),
        "noisy K-FAC": (
            tagged,
            bayes.noisy_kfac(layers, NUM_DATA, RATE, damping=DAMPING, **every),
        ),
        "noisy K-FAC eigh": (
            tagged,
            bayes.noisy_kfac(layers, NUM_DATA, RATE, damping=DAMPING, **exact),
        ),
        "VOGN": (squares, bayes.vogn(squares.layers, NUM_DATA, RATE)),
        "IVON": (problem.plain_loss(), bayes.ivon(NUM_DATA, RATE)),
    }


def make_step(loss: Any, tx: Any, bayesian: bool, samples: int) -> Step:
    """A compiled step."""

    def step(params, state, batch, key):
        statistics: dict[str, Any] = {}
        if bayesian:
            options = {"opt_state": state, "key": key, "deferred": True}
            _, grads, found = kfac.bayes.value_and_grad(
                loss, params, batch, num_samples=samples, **options
            )
            statistics = {"statistics": found}
        elif isinstance(loss, kfac.TaggedLoss):
            options = {"opt_state": state, "key": key, "deferred": True}
            _, grads, found = loss.value_and_grad(params, batch, **options)
            statistics = {"statistics": found}
        else:
            grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, **statistics)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


class Row:
    """One optimiser in training."""

    def __init__(self, problem: Problem, name: str, loss: Any, tx: Any, samples: int):
        """Compiles its step and takes it once."""
        bayesian = name not in (BASELINE, "K-FAC")
        self.problem, self.taken = problem, 0
        self.step = make_step(loss, tx, bayesian, samples)
        self.now = copy_tree((problem.params, tx.init(problem.params)))
        self.state_mb, start = megabytes(self.now[1]), time.perf_counter()
        self.run(1)
        self.first_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Goes on training."""
        batches, key = self.problem.batches, jax.random.key(0)
        start = time.perf_counter()
        for _ in range(steps):
            batch = batches[self.taken % len(batches)]
            number = jax.random.fold_in(key, self.taken)
            self.now = self.step(*self.now, batch, number)
            self.taken += 1
        jax.block_until_ready(self.now)
        return (time.perf_counter() - start) / steps


def benchmark(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one network."""
    problem = make_problem(name)
    rows = {
        row: Row(problem, row, loss, tx, args.samples)
        for row, (loss, tx) in optimisers(problem).items()
    }
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    names = list(rows)
    for number in range(args.rounds + 1):
        shift = number % len(names)
        for row in names[shift:] + names[:shift]:
            found = rows[row].run(args.cycle)
            if number:  # the first round warms up
                seconds[row].append(found)
    base = seconds[BASELINE]
    found = {
        row: {
            "ms": 1e3 * quartiles(values)[1],
            "ratio_to_adam": quartiles(
                [x / y for x, y in zip(values, base, strict=True)]
            ),
            "first_seconds": rows[row].first_seconds,
            "state_mb": rows[row].state_mb,
        }
        for row, values in seconds.items()
    }
    print(f"\n{name}, batch {problem.batches[0][0].shape}")
    header = ("optimiser", "ms/step", "ratio to Adam", "quartiles", "state MB")
    print(text_table(header, [line(row, values) for row, values in found.items()]))
    return found


def line(name: str, row: dict[str, Any]) -> tuple:
    """A row of the table."""
    low, middle, high = row["ratio_to_adam"]
    return name, row["ms"], middle, f"{low:.2f}-{high:.2f}", row["state_mb"]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures the networks asked for and writes ``bayes_steps.json``."""
    args = arguments(argv)
    result: dict[str, Any] = {"machine": machine(), "settings": settings(args)}
    result["models"] = {}
    for name in args.models:
        result["models"][name] = benchmark(name, args)
        write_json(args.out / "bayes_steps.json", result)
        jax.clear_caches()
    print(f"\nWritten to {args.out / 'bayes_steps.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
