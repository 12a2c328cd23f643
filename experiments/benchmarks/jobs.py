"""The optimisers whose steps are timed, each as a job that takes one step of each kind.

Every job goes on training, as a user's loop does. Where steps are of fixed kinds, a
small part of the state (a counter, K-FAC's clock) is set to what selects the kind.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
    """One row of the benchmark."""

    name: str  # the row's name
    # Takes one step of each kind (or a few steps of whatever kind is due) and returns
    # pairs of kind and seconds.
    run: Callable[[], list[tuple[str, float]]]
    # Steps of each kind in a cycle; None where there is no fixed cycle.
    cycle: dict[str, int] | None
    # Seconds of the first call of each kind, compiling included.
    first: dict[str, float]
    setup: float  # seconds of making the state, compiling included
    state_mb: float  # size of the optimiser's state
    # Further facts for the result, as JSON values, asked for at the end.
    notes: Callable[[], dict[str, Any]] = dict

    def compile_seconds(self, samples: Samples) -> float:
        """What the first calls took beyond a usual step, and the set-up."""
        medians = kind_medians(samples)
        usual = max(medians.values())
        extra = [s - medians.get(kind, usual) for kind, s in self.first.items()]
        return self.setup + sum(max(0.0, seconds) for seconds in extra)


def stepper(
    step: Callable, now: tuple, kinds: dict[str, Callable[[Any], Any]], *rest: Any
) -> Callable:
    """Returns a function that goes on training, by one step of each kind.

    A step of the last kind goes before them, outside the clock: the jobs that ran in
    the meantime have emptied the caches.
    """
    live = [copy_tree(now)]

    def run():
        samples = []
        for kind in (list(kinds)[-1], *kinds):
            params, state = live.pop()
            state = jax.block_until_ready(kinds[kind](state))
            seconds, result = timed(step, params, state, *rest)
            live.append(result[:2])
            samples.append((kind, seconds))
        return samples[1:]

    return run


def unchanged(state: Any) -> Any:
    """The state as it is: there is one kind of step."""
    return state


def optax_job(name: str, tx: optax.GradientTransformation, problem: Problem) -> Job:
    """A first-order optimiser."""
    loss = problem.plain_loss()

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    batch = problem.batches[0]
    seconds, state = timed(tx.init, problem.params)
    first, (params, state, _) = timed(step, *copy_tree((problem.params, state)), batch)
    run = stepper(step, (params, state), {"step": unchanged}, batch)
    return Job(name, run, {"step": 1}, {"step": first}, seconds, megabytes(state))


def products_job(problem: Problem) -> Job:
    """Gradient, the two products per layer, SGD: the least that K-FAC's step costs."""
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
    run = stepper(step, (params, state), {"step": unchanged}, *rest)
    size = megabytes(state)
    return Job("gradient + products", run, {"step": 1}, {"step": first}, seconds, size)


def peer_job(problem: Problem, kfac_jax: Any, factor: int, inverse: int) -> Job:
    """kfac-jax with fixed intervals; the step counter in its state selects the kind."""
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

    def step(params, prepared):
        state, fresh, number = prepared
        return optimizer.step(params, state, key, batch=fresh, global_step_int=number)

    def turned(kind):
        def put(state):  # the batch is donated: its copy is made outside the clock
            state.step_counter = jnp.array(counter[kind])
            return state, copy_tree(batch), counter[kind]

        return put

    first: dict[str, float] = {}
    for kind in cycle:
        params, state = copy_tree(now)
        first[kind], result = timed(step, params, turned(kind)(state))
        now = result[:2]
    run = stepper(step, now, {kind: turned(kind) for kind in cycle})
    return Job(f"kfac-jax ({factor}, {inverse})", run, cycle, first, setup, size)
