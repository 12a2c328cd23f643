"""Time per step of SGD, Adam, kfac-jax and this package, as ratios to SGD.

    python -m experiments.benchmarks.step_time --models mlp,lenet5 --rounds 15

All rows are measured in one process, one step of each kind per round, in an order that
rotates, so that whatever else slows the machine hits all of them. A row's time is the
mean over one cycle of its intervals of the medians of its kinds of step.

The flop floor is what the row would cost if every product ran as fast as the
gradient's (operations from ``kfac.cost_model``); "nothing/products" compares a step
with nothing due with the gradient and two products per layer, measured.
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
    PEER,
    amortised,
    comma_list,
    import_peer,
    kind_medians,
    machine,
    make_parser,
    positive_int,
    quartiles,
    settings,
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
METHODS = ("cholesky", "eigh", "ekfac", "newton_schulz", "low_rank", "auto")
FISHERS = ("empirical", "mc", "exact")
BASELINE, FLOOR = "SGD + momentum", "gradient + products"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=comma_list(list(SPECS)), default=",".join(SPECS))
    add("--rounds", type=positive_int, default=15, help="timed steps of each kind")
    add("--inverses", type=comma_list(METHODS), default="cholesky,low_rank")
    add("--fishers", type=comma_list(FISHERS), default="empirical,mc")
    add("--threshold", type=float, default=0.3, help="of the adaptive intervals")
    add("--together", type=float, default=0.5, help="of the adaptive intervals")
    add("--warm-up", type=positive_int, default=50, help="adaptive steps, not timed")
    add("--adaptive-steps", type=positive_int, default=10, help="per round")
    add("--staggered-steps", type=positive_int, default=20, help="per round")
    add("--without-peer", action="store_true", help="leave kfac-jax out")
    add(
        "--rows",
        nargs="*",
        default=(),
        help="of ours and Adam, only those with this in them",
    )
    add("--out", type=Path, default=OUT, help="folder of the result")
    return parser.parse_args(argv)


def job_makers(problem: Problem, args: argparse.Namespace) -> dict[str, Callable]:
    """Lists the rows of a network."""
    sgd, adam = optax.sgd(RATE, MOMENTUM), optax.adam(RATE)
    makers: dict[str, Callable[[], Job]] = {
        BASELINE: lambda: optax_job(BASELINE, sgd, problem),
        "Adam": lambda: optax_job("Adam", adam, problem),
        FLOOR: lambda: products_job(problem),
    }
    peer, _ = import_peer()
    if peer is not None and not args.without_peer:
        for pair in INTERVALS:
            name = f"kfac-jax {pair}"
            makers[name] = lambda pair=pair: peer_job(problem, peer, *pair)
    for fisher in args.fishers:
        for method in args.inverses:
            for pair in INTERVALS:
                makers[f"ours {fisher} {method} {pair}"] = (
                    lambda pair=pair, fisher=fisher, method=method: ours_job(
                        problem, *pair, fisher, method
                    )
                )
            makers[f"ours {fisher} {method} adaptive damping"] = (
                lambda fisher=fisher, method=method: ours_job(
                    problem, *INTERVALS[-1], fisher, method, kfac.damping.adaptive()
                )
            )
            makers[f"ours {fisher} {method} staggered"] = (
                lambda fisher=fisher, method=method: staggered_job(
                    problem, fisher, method, args.staggered_steps
                )
            )
            makers[f"ours {fisher} {method} adaptive"] = (
                lambda fisher=fisher, method=method: adaptive_job(
                    problem,
                    fisher,
                    method,
                    args.warm_up,
                    args.adaptive_steps,
                    args.threshold,
                    args.together,
                )
            )
    if not args.rows:
        return makers
    wanted = (BASELINE, FLOOR, *args.rows)
    return {n: make for n, make in makers.items() if any(w in n for w in wanted)}


def make_jobs(
    makers: dict[str, Callable[[], Job]],
) -> tuple[list[Job], dict[str, str]]:
    """Makes and compiles the jobs."""
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
    samples: dict[str, list] = {job.name: [] for job in jobs}
    for number in range(rounds + 1):
        shift = number % len(jobs)
        for job in jobs[shift:] + jobs[:shift]:
            seen = job.run()
            if number:
                samples[job.name].append(seen)
    return samples


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
        ratios = [x / y for x, y in zip(rounds, bases, strict=True)]
        kinds = kind_medians(flat[job.name])
        row = {
            "amortised_ms": 1e3 * seconds,
            "ratio_to_sgd": seconds / base,
            "ratio_quartiles": quartiles(ratios),
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
                pairs = zip(nothing, floors, strict=True)
                row["nothing_to_floor_quartiles"] = quartiles([x / y for x, y in pairs])
        rows[job.name] = row
    return rows


def show(rows: dict[str, dict[str, Any]]) -> str:
    """The table of one network."""
    header = (
        "optimiser",
        "ms/step",
        "ratio to SGD",
        "quartiles",
        "flop floor",
        "to floor",
        "refresh+invert",
        "refresh",
        "nothing",
        "nothing/products",
        "slowest/median",
        "compile s",
        "state MB",
    )
    table = []
    for name, row in rows.items():
        kinds = row["kinds_ms"]
        low, _, high = row["ratio_quartiles"]
        table.append(
            (
                name,
                row["amortised_ms"],
                row["ratio_to_sgd"],
                f"{low:.2f}-{high:.2f}",
                row.get("flop_floor"),
                row.get("ratio_to_flop_floor"),
                *(kinds.get(k) for k in ("refresh+invert", "refresh", "nothing")),
                row.get("nothing_to_floor"),
                row.get("slowest_to_median"),
                row["compile_seconds"],
                row["state_mb"],
            )
        )
    return text_table(header, table)


def benchmark(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one network."""
    start, problem = time.perf_counter(), make_problem(name)
    jobs, failed = make_jobs(job_makers(problem, args))
    rows = summarise(jobs, measure(jobs, args.rounds))
    _, reason = import_peer()
    if reason:
        failed[PEER] = reason
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    shape = problem.batches[0][0].shape
    print(f"\n{name}: {parameters} parameters, batch {shape}, {args.rounds} rounds")
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures the networks asked for and writes ``step_time.json``."""
    args = arguments(argv)
    result: dict[str, Any] = {"machine": machine(), "settings": settings(args)}
    print(" ".join(f"{k}={v}" for k, v in result["machine"].items()))
    result["models"] = {}
    for name in args.models:
        result["models"][name] = benchmark(name, args)
        write_json(args.out / "step_time.json", result)
        jax.clear_caches()
    print(f"\nfloor: {FLOOR}, with SGD. Written to {args.out / 'step_time.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
