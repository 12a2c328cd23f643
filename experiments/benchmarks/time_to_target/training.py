"""One run: steps until the target or the budget, and the curve of the held-out loss."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.benchmarks.common import first_reach
from experiments.benchmarks.time_to_target.optimisers import Program
from experiments.benchmarks.time_to_target.problems import Problem
from experiments.benchmarks.time_to_target.spaces import to_step
from experiments.datasets import batches


def train(
    problem: Problem,
    program: Program,
    values: dict[str, Any],
    seed: int,
    target: float | None,
) -> dict[str, Any]:
    """Trains once.

    Args:
        problem: what is trained.
        program: the optimiser.
        values: its hyper-parameters.
        seed: of the initial parameters, the order of the data and sampled labels.
        target: the held-out loss at which the run ends; None to use the budget up.

    Returns:
        The curve (step; wall-clock and processor seconds of the steps and of feeding
        them; held-out loss and what else is evaluated), seconds of compiling, and the
        cores that were busy with the steps: 1 where nothing else ran on the only core.
    """
    size, step = problem.size, 0
    params, model_state = jax.jit(problem.task.init)(jax.random.key(seed))
    values = to_step(values, size.steps)
    compiling = program.prepare(values)
    state = jax.block_until_ready(program.start(params, values))
    carry, key = (params, model_state, state), jax.random.key(seed + 1)
    curve: list[dict[str, Any]] = []
    end = -math.inf if target is None else target
    seconds = used = 0.0
    wall, work = time.perf_counter(), time.process_time()
    for batch in batches(problem.data, size.batch, seed, 0, size.steps):
        key, sub = jax.random.split(key)
        carry = program.step(carry, values, step, batch, sub)
        step += 1
        if step % size.eval_every and step < size.steps:
            continue
        jax.block_until_ready(carry)
        seconds += time.perf_counter() - wall
        used += time.process_time() - work
        found = problem.evaluate(*carry[:2])
        times = {"seconds": seconds, "cpu_seconds": used}
        curve.append({"step": step, **times, **found})
        if not math.isfinite(found["loss"]) or found["loss"] <= end:
            break
        wall, work = time.perf_counter(), time.process_time()
    return {
        "curve": curve,
        "best_loss": best_loss(curve),
        "compile_seconds": compiling,
        "cores_busy": used / seconds,
    }


def best_loss(curve: Sequence[Mapping[str, Any]]) -> float | None:
    """The lowest loss of a curve that is a number."""
    losses = [p["loss"] for p in curve if p["loss"] is not None]
    return min(filter(math.isfinite, losses), default=None)


def score(run: Mapping[str, Any], target: float, steps: int) -> float:
    """What a search minimises: the share of the budget that the target takes."""
    point = first_reach(run["curve"], target)
    if point is not None:
        return point["step"] / steps
    if run["best_loss"] is None:
        return 11.0
    return 1 + min(10.0, (run["best_loss"] - target) / abs(target))
