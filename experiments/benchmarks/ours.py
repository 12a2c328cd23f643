"""This package's K-FAC as jobs: fixed, staggered and adaptive intervals.

Steps are told apart by their effect on the counters of refreshes and inversions.
"""

import functools
import statistics
from typing import Any

import jax
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    copy_tree,
    cycle_of,
    kind_medians,
    megabytes,
    timed,
)
from experiments.benchmarks.jobs import DAMPING, MOMENTUM, RATE, Job, stepper
from experiments.benchmarks.networks import Problem
from kfac_jax_lite.tree import find_states


def flop_floor(
    problem: Problem, tagged: Any, factor: int, inverse: int, method: str
) -> float:
    """What a mean step must cost in SGD steps, if all products run equally fast.

    ``(gradient + statistics / n + inversion / m + products) / gradient`` in operations,
    with refreshes every ``n`` and inversions every ``m`` steps. A sampled Fisher's
    second backward pass is a third of a gradient: derivatives by inputs only.
    """
    rows = kfac.layer_rows(tagged, problem.params, problem.batches[0])
    cost = kfac.cost_model(
        tagged.layers, rows=rows, inverse=method, inverse_interval=inverse
    )
    parts = cost.flops_per_step(1 / factor)
    sampled = {"empirical": 0, "mc": 1}.get(tagged.fisher, 0)
    return (sum(parts) + sampled * parts.gradient / 3 / factor) / parts.gradient


class Ours:
    """A real run of this package's K-FAC, its steps classified by their effect."""

    def __init__(self, problem: Problem, fisher: str, **options: Any):
        """Tags the loss and makes the state."""
        self.problem, self.taken = problem, 0
        self.tagged = tagged = kfac.tag(
            problem.marked_loss(), problem.params, problem.batches[0], fisher=fisher
        )
        settings = {"damping": DAMPING, "momentum": MOMENTUM, **options}
        tx = kfac.kfac(tagged.layers, RATE, **settings)

        def step(params, state, batch, key):
            value, grads, statistics = tagged.value_and_grad(
                params, batch, opt_state=state, key=key, deferred=True
            )
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return optax.apply_updates(params, updates), state, value

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.key = jax.random.key(0)
        self.setup, state = timed(tx.init, problem.params)
        self.now = copy_tree((problem.params, state))

    def advance(self) -> tuple[str, float]:
        """Takes one real step, with the next batch."""
        batch = self.problem.batches[self.taken % len(self.problem.batches)]
        before = counters(self.now[1])
        seconds, result = timed(self.step, *self.now, batch, self.key)
        self.now, self.taken = result[:2], self.taken + 1
        return effect(before, counters(self.now[1])), seconds


def kfac_of(state: Any) -> kfac.KFACState:
    """K-FAC's state inside that of ``kfac.kfac``."""
    (found,) = find_states(state)
    return found


def with_kfac(state: Any, new: kfac.KFACState) -> Any:
    """The state of ``kfac.kfac`` with another state of K-FAC."""
    if isinstance(state, kfac.AdaptedState):
        return state._replace(inner=with_kfac(state.inner, new))
    return state._replace(kfac=new)


def counters(state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Refreshes and inversions of every layer until now."""
    clock = kfac_of(state).clock
    return tuple(jax.device_get((clock.refreshes, clock.inversions)))


def effect(before: tuple, after: tuple) -> str:
    """What a step did, from the counters before and after it."""
    refreshed, inverted = (a > b for a, b in zip(after, before, strict=True))
    codes = refreshed + 2 * inverted
    names = {0: "nothing", 1: "refresh", 2: "invert", 3: "refresh+invert"}
    if np.all(codes == codes[0]):
        return names[int(codes[0])]
    return "".join(str(code) for code in codes)


def aged(state: Any, steps: int) -> Any:
    """The state as if its inverses had been made `steps` steps earlier."""
    inner = kfac_of(state)
    clock = inner.clock._replace(last_inverse=inner.clock.last_inverse - steps)
    return with_kfac(state, inner._replace(clock=clock))


def clock_of(state: Any) -> tuple[Any, Any]:
    """The number of steps and the clock, copied."""
    inner = kfac_of(state)
    return copy_tree((inner.count, inner.clock))


def with_clock(saved: tuple[Any, Any], state: Any) -> Any:
    """The state at an earlier time: what is due follows from it."""
    count, clock = copy_tree(saved)
    return with_kfac(state, kfac_of(state)._replace(count=count, clock=clock))


def ours_job(
    problem: Problem,
    factor: int,
    inverse: int,
    fisher: str,
    method: str,
    damping: Any = DAMPING,
) -> Job:
    """This package's K-FAC with fixed intervals.

    The run takes real steps until statistics are due for the second time. The clock
    before that step is kept twice: as it is, and with inverses old enough to be due.
    """
    run = Ours(
        problem,
        fisher,
        interval=kfac.intervals.every(factor),
        inverse=method,
        inverse_interval=inverse,
        damping=damping,
    )
    cycle = cycle_of(factor, inverse)
    saved: dict[str, Any] = {}
    kind, first = run.advance()
    for _ in range(factor - 1):
        saved["nothing"] = clock_of(run.now[1])
        run.advance()
    saved["refresh"] = clock_of(run.now[1])
    saved["refresh+invert"] = clock_of(aged(run.now[1], inverse))
    batch = problem.batches[0]
    kinds = {kind: functools.partial(with_clock, saved[kind]) for kind in cycle}
    for kind, turned in kinds.items():
        params, state = run.now[0], turned(run.now[1])
        before = counters(state)
        run.now = run.step(params, state, batch, run.key)[:2]
        seen = effect(before, counters(run.now[1]))
        if seen != kind:
            raise RuntimeError(f"a step that should {kind} did {seen}.")
    name = f"ours {label(fisher, method)} ({factor}, {inverse})"
    name += "" if damping == DAMPING else ", adaptive damping"
    steps = stepper(run.step, run.now, kinds, batch, run.key)
    size, floor = megabytes(run.now[1]), None
    if fisher != "exact":
        floor = flop_floor(problem, run.tagged, factor, inverse, method)
    first_call = {"refresh+invert": first}
    notes = functools.partial(dict, flop_floor=floor)
    return Job(name, steps, cycle, first_call, run.setup, size, notes)


def adaptive_job(
    problem: Problem,
    fisher: str,
    method: str,
    warm_up: int,
    per_round: int,
    threshold: float,
    together: float,
) -> Job:
    """This package's K-FAC with adaptive intervals, inverting at every refresh."""
    rule = kfac.intervals.adaptive(threshold, rule="elapsed", together=together)
    run = Ours(problem, fisher, interval=rule, inverse=method, inverse_interval=1)
    kind, first = run.advance()
    for _ in range(warm_up - 1):
        run.advance()
    start, counted = run.taken, counters(run.now[1])

    def notes():
        refreshes, inversions = counters(run.now[1])
        taken = max(1, run.taken - start)
        return {
            "steps": [start + 1, run.taken],
            "mean_interval": float(np.mean(kfac_of(run.now[1]).clock.interval)),
            "refreshes_per_layer_and_step": float(np.mean(refreshes - counted[0]))
            / taken,
            "inversions_per_layer_and_step": float(np.mean(inversions - counted[1]))
            / taken,
        }

    return Job(
        f"ours {label(fisher, method)} adaptive",
        lambda: [run.advance() for _ in range(per_round)],
        None,
        {kind: first},
        run.setup,
        megabytes(run.now[1]),
        notes,
    )


def staggered_job(
    problem: Problem, fisher: str, method: str, per_round: int, warm_up: int = 101
) -> Job:
    """This package's K-FAC at (10, 100), refreshes and inversions spread over steps."""
    factor, inverse = 10, 100
    options = {"interval": kfac.intervals.every(factor), "inverse_interval": inverse}
    run = Ours(problem, fisher, inverse=method, stagger=True, **options)
    kind, first = run.advance()
    for _ in range(warm_up - 1):
        run.advance()
    seen: list[tuple[str, float]] = []

    def steps():
        new = [run.advance() for _ in range(per_round)]
        seen.extend(new)
        return new

    def notes():
        kinds = kind_medians(seen)
        median = statistics.median(seconds for _, seconds in seen)
        floor = None
        if fisher != "exact":
            floor = flop_floor(problem, run.tagged, factor, inverse, method)
        return {"slowest_to_median": max(kinds.values()) / median, "flop_floor": floor}

    name = f"ours {label(fisher, method)} staggered"
    size = megabytes(run.now[1])
    return Job(name, steps, None, {kind: first}, run.setup, size, notes)


def label(fisher: str, method: str) -> str:
    """How a variant is called in a row's name."""
    return fisher if method == "cholesky" else f"{fisher} {method}"
