"""Time per step of SGD, Adam, kfac-jax and this package, as ratios to SGD.

    python -m experiments.benchmarks.step_time --models mlp lenet5 --rounds 15

All rows are measured in one process, one step of each kind per round, in an order that
rotates, so that whatever else slows the machine hits all of them. A row's time is the
mean over one cycle of its intervals of the medians of its kinds of step.

The flop floor is what the row would cost if every product ran as fast as the
gradient's (operations from ``kfac.cost_model``); "nothing/products" compares a step
with nothing due with the gradient and two products per layer, measured.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    PEER,
    amortised,
    begin,
    import_peer,
    in_turns,
    kind_medians,
    parse,
    ratios,
    spread,
    text_table,
    write_json,
)
from experiments.benchmarks.jobs import (
    MOMENTUM,
    RATE,
    Job,
    adaptive_job,
    optax_job,
    ours_job,
    peer_job,
    products_job,
    staggered_job,
)
from experiments.benchmarks.networks import SPECS, Problem, make_problem
from experiments.progress import ended

INTERVALS = ((1, 5), (10, 100))
BASELINE, FLOOR = "SGD + momentum", "gradient + products"
Method = Literal["cholesky", "eigh", "ekfac", "newton_schulz", "low_rank", "auto"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the steps of SGD, Adam, kfac-jax and this package."""

    models: tuple[str, ...] = tuple(SPECS)
    """Networks: mlp, autoencoder, lenet5, resnet."""
    rounds: int = 15
    """Timed steps of each kind."""
    inverses: tuple[Method, ...] = ("cholesky", "low_rank")
    """How factors are inverted."""
    fishers: tuple[Literal["empirical", "mc", "exact"], ...] = ("empirical", "mc")
    """How factors are estimated."""
    threshold: float = 0.3
    """Of the adaptive intervals."""
    together: float = 0.5
    """Of the adaptive intervals."""
    warm_up: int = 50
    """Adaptive steps that are not timed."""
    adaptive_steps: int = 10
    """Adaptive steps per round."""
    staggered_steps: int = 20
    """Staggered steps per round."""
    without_peer: bool = False
    """Leave kfac-jax out."""
    rows: tuple[str, ...] = ()
    """Of ours and Adam, only rows with this in their names."""
    out: Path = OUT
    """Folder of the result."""


def job_makers(problem: Problem, config: Config) -> dict[str, Callable[[], Job]]:
    sgd, adam = optax.sgd(RATE, MOMENTUM), optax.adam(RATE)
    part = functools.partial
    makers: dict[str, Callable[[], Job]] = {
        BASELINE: part(optax_job, BASELINE, sgd, problem),
        "Adam": part(optax_job, "Adam", adam, problem),
        FLOOR: part(products_job, problem),
    }
    peer, _ = import_peer()
    if peer is not None and not config.without_peer:
        for pair in INTERVALS:
            makers[f"kfac-jax {pair}"] = part(peer_job, problem, peer, *pair)
    for kind in itertools.product(config.fishers, config.inverses):
        name, rule = f"ours {kind[0]} {kind[1]}", kfac.damping.adaptive()
        for pair in INTERVALS:
            makers[f"{name} {pair}"] = part(ours_job, problem, *pair, *kind)
        makers[f"{name} adaptive damping"] = part(
            ours_job, problem, *INTERVALS[-1], *kind, rule
        )
        makers[f"{name} staggered"] = part(
            staggered_job, problem, *kind, config.staggered_steps
        )
        steps = config.warm_up, config.adaptive_steps
        makers[f"{name} adaptive"] = part(
            adaptive_job, problem, *kind, *steps, config.threshold, config.together
        )
    if not config.rows:
        return makers
    wanted = (BASELINE, FLOOR, *config.rows)
    return {n: make for n, make in makers.items() if any(w in n for w in wanted)}


def make_jobs(
    makers: dict[str, Callable[[], Job]],
) -> tuple[list[Job], dict[str, str]]:
    jobs, failed = [], {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            jobs.append(make())
            print(
                f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True
            )
        except Exception as error:
            if not name.startswith("kfac-jax"):
                raise
            # Another project's failure is a result, not an error of this program.
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return jobs, failed


def measure(jobs: list[Job], rounds: int) -> dict[str, list[list[tuple[str, float]]]]:
    """Runs all jobs in turn, once per round."""
    return in_turns({job.name: job.run for job in jobs}, rounds, warm_up=1)


def summarise(jobs: list[Job], samples: dict[str, list]) -> dict[str, dict[str, Any]]:
    """Turns samples into the rows of the result."""
    flat = {name: sum(rounds, []) for name, rounds in samples.items()}
    base = amortised(flat[BASELINE])
    bases = [amortised(one) for one in samples[BASELINE]]
    floors = [amortised(one) for one in samples[FLOOR]]
    rows = {}
    for job in jobs:
        seconds = amortised(flat[job.name], job.cycle)
        rounds = [amortised(one, job.cycle) for one in samples[job.name]]
        kinds = kind_medians(flat[job.name])
        row = {
            "amortised_ms": 1e3 * seconds,
            "ratio_to_sgd": seconds / base,
            "ratio_quartiles": ratios(rounds, bases),
            "kinds_ms": {kind: 1e3 * value for kind, value in kinds.items()},
            "cycle": job.cycle,
            "compile_seconds": job.compile_seconds(flat[job.name]),
            "state_mb": job.state_mb,
            **job.notes(),
        }
        if row.get("flop_floor") is not None:
            row["ratio_to_flop_floor"] = row["ratio_to_sgd"] / row["flop_floor"]
        if "nothing" in kinds:
            row["nothing_to_floor"] = kinds["nothing"] / amortised(flat[FLOOR])
            if job.cycle is not None and job.cycle.get("nothing"):
                nothing = [dict(one)["nothing"] for one in samples[job.name]]
                row["nothing_to_floor_quartiles"] = ratios(nothing, floors)
        rows[job.name] = row
    return rows


def show(rows: dict[str, dict[str, Any]]) -> str:
    kinds = ("refresh+invert", "refresh", "nothing")
    fields = {"flop floor": "flop_floor", "to floor": "ratio_to_flop_floor"}
    later = {
        "nothing/products": "nothing_to_floor",
        "slowest/median": "slowest_to_median",
        "compile s": "compile_seconds",
        "state MB": "state_mb",
    }
    table = [
        (
            name,
            row["amortised_ms"],
            row["ratio_to_sgd"],
            spread(row["ratio_quartiles"]),
            *(row.get(field) for field in fields.values()),
            *(row["kinds_ms"].get(kind) for kind in kinds),
            *(row.get(field) for field in later.values()),
        )
        for name, row in rows.items()
    ]
    header = ("optimiser", "ms/step", "ratio to SGD", "quartiles", *fields, *kinds)
    return text_table((*header, *later), table)


def benchmark(name: str, config: Config) -> dict[str, Any]:
    start, problem = time.perf_counter(), make_problem(name)
    jobs, failed = make_jobs(job_makers(problem, config))
    rows = summarise(jobs, measure(jobs, config.rounds))
    _, reason = import_peer()
    if reason:
        failed[PEER] = reason
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    shape = problem.batches[0][0].shape
    print(f"\n{name}: {parameters} parameters, batch {shape}, {config.rounds} rounds")
    print(show(rows))
    for row, why in failed.items():
        print(f"{row}: missing, {why}")
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return {
        "parameters": parameters,
        "batch": list(shape),
        "rows": rows,
        "missing": failed,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the networks asked for and writes ``step_time.json``."""
    config = parse(Config, argv, "step_time")
    result = begin(config, models={})
    print(" ".join(f"{k}={v}" for k, v in result["machine"].items()))
    for name in config.models:
        result["models"][name] = benchmark(name, config)
        write_json(config.out / "step_time.json", result)
        jax.clear_caches()
    print(f"\nfloor: {FLOOR}, with SGD. Written to {config.out / 'step_time.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
