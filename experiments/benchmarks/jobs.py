"""The optimisers whose steps are timed, each as a job that takes one step of each kind.

A job holds parameters and state as they were before a step of every kind, and steps
from copies of them, made outside the clock, so that the optimisers can donate their
buffers. K-FAC with adaptive intervals has no fixed kinds: its job goes on training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    Samples,
    copy_tree,
    cycle_of,
    kind_medians,
    megabytes,
    timed,
)
from experiments.benchmarks.networks import Problem
from kfac_jax_lite.precondition import gather, precondition, scatter
from kfac_jax_lite.tree import leaves_by_path, replace_leaves

RATE, MOMENTUM, DAMPING = 1e-3, 0.9, 1e-2


@dataclasses.dataclass
class Job:
    """One row of the benchmark.

    Attributes:
        name: the row's name.
        run: takes one step of each kind (or a few steps of whatever kind is due) and
            returns pairs of kind and seconds.
        cycle: steps of each kind in a cycle; None where there is no fixed cycle.
        first: seconds of the first call of each kind, compiling included.
        setup: seconds of making the state, compiling included.
        state_mb: size of the optimiser's state.
        notes: further facts for the result, as JSON values, asked for at the end.
    """

    name: str
    run: Callable[[], list[tuple[str, float]]]
    cycle: dict[str, int] | None
    first: dict[str, float]
    setup: float
    state_mb: float
    notes: Callable[[], dict[str, Any]] = dict

    def compile_seconds(self, samples: Samples) -> float:
        """What the first calls took beyond a usual step, and the set-up."""
        medians = kind_medians(samples)
        usual = max(medians.values())
        extra = [s - medians.get(kind, usual) for kind, s in self.first.items()]
        return self.setup + sum(max(0.0, seconds) for seconds in extra)


def stepper(step: Callable, saved: dict[str, tuple], *rest: Any) -> Callable:
    """Returns a function that takes one step of each kind from copies.

    Args:
        step: ``(params, state, *rest) -> …``; may donate params and state.
        saved: params and state before a step of each kind.
        *rest: the step's other arguments; never donated.

    Returns:
        What a `Job` runs.
    """

    def run():
        samples = []
        for kind, before in saved.items():
            params, state = copy_tree(before)
            samples.append((kind, timed(step, params, state, *rest)[0]))
        return samples

    return run


def optax_job(name: str, tx: optax.GradientTransformation, problem: Problem) -> Job:
    """A first-order optimiser.

    Args:
        name: the row's name.
        tx: the optimiser.
        problem: what it trains.

    Returns:
        The job.
    """
    loss = problem.plain_loss()

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    batch = problem.batches[0]
    seconds, state = timed(tx.init, problem.params)
    first, (params, state, _) = timed(step, *copy_tree((problem.params, state)), batch)
    run = stepper(step, {"step": (params, state)}, batch)
    return Job(name, run, {"step": 1}, {"step": first}, seconds, megabytes(state))


def products_job(problem: Problem) -> Job:
    """Gradient, the two products per layer, SGD: the least that K-FAC's step costs.

    Args:
        problem: what it trains.

    Returns:
        The job; its inverses are the identity.
    """
    params, batch, loss = problem.params, problem.batches[0], problem.plain_loss()
    layers = kfac.tag(problem.marked_loss(), params, batch).layers
    inner: Any = kfac.scale_by_kfac(layers).init(params)
    tx = optax.sgd(RATE, MOMENTUM)

    def step(params, state, factors, inverses, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        leaves, new = leaves_by_path(grads), {}
        for layer in layers:
            if layer.kronecker:
                fixed = factors[layer.name], inverses[layer.name], jnp.asarray(DAMPING)
                u = precondition(layer, gather(layer, leaves), *fixed)
                new |= scatter(layer, u, leaves)
        updates, state = tx.update(replace_leaves(grads, new), state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    rest = (inner.factors, inner.inverses, batch)
    seconds, state = timed(tx.init, params)
    first, _ = timed(step, *copy_tree((params, state)), *rest)
    run = stepper(step, {"step": (params, state)}, *rest)
    size = megabytes(state)
    return Job("gradient + products", run, {"step": 1}, {"step": first}, seconds, size)


class Ours:
    """A real run of this package's K-FAC, its steps classified by their effect."""

    def __init__(self, problem: Problem, fisher: str, **options: Any):
        """Tags the loss and makes the state.

        Args:
            problem: what it trains.
            fisher: how the statistics are made.
            **options: of ``kfac.kfac``.
        """
        self.problem, self.taken = problem, 0
        tagged = kfac.tag(
            problem.marked_loss(), problem.params, problem.batches[0], fisher=fisher
        )
        tx = kfac.kfac(
            tagged.layers, RATE, damping=DAMPING, momentum=MOMENTUM, **options
        )

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
        """Takes one real step, with the next batch.

        Returns:
            Which layers were refreshed and inverted, and the seconds.
        """
        batch = self.problem.batches[self.taken % len(self.problem.batches)]
        before = counters(self.now[1])
        seconds, result = timed(self.step, *self.now, batch, self.key)
        self.now, self.taken = result[:2], self.taken + 1
        return effect(before, counters(self.now[1])), seconds


def counters(state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Refreshes and inversions of every layer until now."""
    clock = state.kfac.clock
    return tuple(jax.device_get((clock.refreshes, clock.inversions)))


def effect(before: tuple, after: tuple) -> str:
    """What a step did, from the counters before and after it.

    Args:
        before: refreshes and inversions by layer.
        after: the same.

    Returns:
        ``nothing``, ``refresh`` or ``refresh+invert`` where all layers fared alike,
        else a digit per layer: 0 nothing, 1 refreshed, 2 inverted, 3 both.
    """
    refreshed, inverted = (a > b for a, b in zip(after, before, strict=True))
    codes = refreshed + 2 * inverted
    names = {0: "nothing", 1: "refresh", 2: "invert", 3: "refresh+invert"}
    if np.all(codes == codes[0]):
        return names[int(codes[0])]
    return "".join(str(code) for code in codes)


def aged(state: Any, steps: int) -> Any:
    """The state as if its inverses had been made `steps` steps earlier."""
    clock = state.kfac.clock
    clock = clock._replace(last_inverse=clock.last_inverse - steps)
    return state._replace(kfac=state.kfac._replace(clock=clock))


def ours_job(
    problem: Problem, factor: int, inverse: int, fisher: str, method: str
) -> Job:
    """This package's K-FAC with fixed intervals.

    The run takes real steps until statistics are due for the second time. The state
    before that step is kept twice: as it is, and with inverses old enough to be due.

    Args:
        problem: what it trains.
        factor: steps between refreshes of the statistics.
        inverse: steps between inversions.
        fisher: how the statistics are made.
        method: how the factors are inverted.

    Returns:
        The job.

    Raises:
        RuntimeError: if a step does not do what its kind says.
    """
    run = Ours(
        problem,
        fisher,
        interval=kfac.intervals.every(factor),
        inverse=method,
        inverse_interval=inverse,
    )
    cycle = cycle_of(factor, inverse)
    saved: dict[str, tuple] = {}
    kind, first = run.advance()
    for _ in range(factor - 1):
        saved["nothing"] = copy_tree(run.now)
        run.advance()
    params, state = copy_tree(run.now)
    saved["refresh"] = (params, state)
    saved["refresh+invert"] = (params, aged(state, inverse))
    saved = {kind: saved[kind] for kind in cycle}
    batch = problem.batches[0]
    for kind, before in saved.items():
        after = run.step(*copy_tree(before), batch, run.key)[1]
        seen = effect(counters(before[1]), counters(after))
        if seen != kind:
            raise RuntimeError(f"a step that should {kind} did {seen}.")
    name = f"ours {label(fisher, method)} ({factor}, {inverse})"
    steps = stepper(run.step, saved, batch, run.key)
    size = megabytes(run.now[1])
    return Job(name, steps, cycle, {"refresh+invert": first}, run.setup, size)


def adaptive_job(
    problem: Problem,
    fisher: str,
    method: str,
    warm_up: int,
    per_round: int,
    threshold: float,
) -> Job:
    """This package's K-FAC with adaptive intervals, inverting at every refresh.

    Args:
        problem: what it trains.
        fisher: how the statistics are made.
        method: how the factors are inverted.
        warm_up: real steps before the first that is timed.
        per_round: real steps per round.
        threshold: relative change below which the interval grows.

    Returns:
        The job.
    """
    rule = kfac.intervals.adaptive(threshold, rule="elapsed")
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
            "mean_interval": float(np.mean(run.now[1].kfac.clock.interval)),
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


def label(fisher: str, method: str) -> str:
    """How a variant is called in a row's name."""
    return fisher if method == "cholesky" else f"{fisher} {method}"


def peer_job(problem: Problem, kfac_jax: Any, factor: int, inverse: int) -> Job:
    """kfac-jax with fixed intervals; the step counter in its state selects the kind.

    Args:
        problem: what it trains.
        kfac_jax: the module.
        factor: steps between updates of the curvature.
        inverse: steps between updates of the inverses.

    Returns:
        The job.
    """
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(problem.peer_loss(kfac_jax)),
        l2_reg=0.0,
        learning_rate_schedule=lambda step: RATE,
        momentum_schedule=lambda step: MOMENTUM,
        damping_schedule=lambda step: DAMPING,
        curvature_update_period=factor,
        inverse_update_period=inverse,
        num_burnin_steps=0,
    )
    key, batch = jax.random.PRNGKey(0), problem.batches[0]
    setup, state = timed(optimizer.init, problem.params, key, copy_tree(batch))
    size, now = megabytes(state), (problem.params, state)
    counter = {"refresh+invert": 0, "refresh": factor, "nothing": 1}
    cycle = cycle_of(factor, inverse)

    def step(kind, before):
        params, state = copy_tree(before)
        state.step_counter = jnp.array(counter[kind])
        fresh = copy_tree(batch)
        return timed(
            lambda: optimizer.step(
                params, state, key, batch=fresh, global_step_int=counter[kind]
            )[:2]
        )

    first: dict[str, float] = {}
    for kind in cycle:
        first[kind], now = step(kind, now)

    def run():
        return [(kind, step(kind, now)[0]) for kind in cycle]

    return Job(f"kfac-jax ({factor}, {inverse})", run, cycle, first, setup, size)
