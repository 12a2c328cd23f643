"""Time per step of the variational optimisers, as ratios to Adam.

    python -m experiments.benchmarks.bayes_steps --models mlp lenet5 resnet

All rows train in one process, a cycle of real steps each per round, in an order that
rotates. K-FAC refreshes every 10 and inverts every 100 steps, so that a cycle of 100
steps holds every kind; ratios are made round by round.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    begin,
    copy_tree,
    in_turns,
    megabytes,
    parse,
    quartiles,
    ratios,
    spread,
    text_table,
    write_json,
)
from experiments.benchmarks.networks import Problem, make_problem
from experiments.progress import ended
from experiments.stepping import step as one_step

RATE, DAMPING, NUM_DATA = 1e-3, 1e-2, 50_000
REFRESH, INVERT = 10, 100
BASELINE = "Adam"


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the steps of the variational optimisers."""

    models: tuple[str, ...] = ("mlp", "lenet5", "resnet")
    """Networks of step_time."""
    rounds: int = 5
    """Timed cycles of every row."""
    cycle: int = INVERT
    """Steps of a cycle."""
    samples: int = 1
    """Draws per step."""
    out: Path = OUT
    """Folder of the result."""


def optimisers(problem: Problem) -> dict[str, tuple[Any, Any]]:
    """Loss and optimiser of every row."""
    marked, first = problem.marked_loss(), problem.batches[0]
    tagged = kfac.tag(marked, problem.params, first, fisher="mc")
    squares = kfac.tag(marked, problem.params, first, statistics="squares")
    every = {"interval": kfac.intervals.every(REFRESH), "inverse_interval": INVERT}
    layers, bayes = tagged.layers, kfac.bayes
    noisy = {"damping": DAMPING, **every}
    exact = bayes.noisy_kfac(layers, NUM_DATA, RATE, inverse="eigh", **noisy)
    return {
        BASELINE: (problem.plain_loss(), optax.adam(RATE)),
        "K-FAC": (tagged, kfac.kfac(layers, RATE, damping=DAMPING, **every)),
        "noisy K-FAC": (tagged, bayes.noisy_kfac(layers, NUM_DATA, RATE, **noisy)),
        "noisy K-FAC eigh": (tagged, exact),
        "VOGN": (squares, bayes.vogn(squares.layers, NUM_DATA, RATE)),
        "IVON": (problem.plain_loss(), bayes.ivon(NUM_DATA, RATE)),
    }


class Row:
    """One optimiser in training."""

    def __init__(self, problem: Problem, name: str, loss: Any, tx: Any, samples: int):
        self.problem, self.taken = problem, 0

        def step(params, state, batch, key):
            options = {"key": key, "deferred": True}
            if name in (BASELINE, "K-FAC"):
                return one_step(loss, tx, params, state, (batch,), **options)[:2]
            options |= {"opt_state": state, "num_samples": samples}
            _, grads, found = kfac.bayes.value_and_grad(loss, params, batch, **options)
            updates, state = tx.update(grads, state, params, statistics=found)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.now = copy_tree((problem.params, tx.init(problem.params)))
        self.state_mb, start = megabytes(self.now[1]), time.perf_counter()
        self.run(1)
        self.first_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Goes on training; the seconds of a step."""
        batches, key = self.problem.batches, jax.random.key(0)
        start = time.perf_counter()
        for _ in range(steps):
            batch = batches[self.taken % len(batches)]
            number = jax.random.fold_in(key, self.taken)
            self.now = self.step(*self.now, batch, number)
            self.taken += 1
        jax.block_until_ready(self.now)
        return (time.perf_counter() - start) / steps


def benchmark(name: str, config: Config) -> dict[str, Any]:
    problem = make_problem(name)
    rows = {
        row: Row(problem, row, loss, tx, config.samples)
        for row, (loss, tx) in optimisers(problem).items()
    }
    calls = {n: lambda row=row: row.run(config.cycle) for n, row in rows.items()}
    seconds = in_turns(calls, config.rounds, warm_up=1)
    found = {
        row: {
            "ms": 1e3 * quartiles(values)[1],
            "ratio_to_adam": ratios(values, seconds[BASELINE]),
            "first_seconds": rows[row].first_seconds,
            "state_mb": rows[row].state_mb,
        }
        for row, values in seconds.items()
    }
    print(f"\n{name}, batch {problem.batches[0][0].shape}")
    header = ("optimiser", "ms/step", "ratio to Adam", "quartiles", "state MB")
    lines = [
        (n, r["ms"], r["ratio_to_adam"][1], spread(r["ratio_to_adam"]), r["state_mb"])
        for n, r in found.items()
    ]
    print(text_table(header, lines))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the networks asked for and writes ``bayes_steps.json``."""
    config = parse(Config, argv, "bayes_steps")
    result = begin(config, models={})
    for name in config.models:
        result["models"][name] = benchmark(name, config)
        write_json(config.out / "bayes_steps.json", result)
        jax.clear_caches()
    print(f"\nWritten to {config.out / 'bayes_steps.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
