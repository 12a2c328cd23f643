"""The optimisers whose steps are timed, each as a job that takes one step of each kind.

Every job goes on training, as a user's loop does. Where steps are of fixed kinds, a
small part of the state (a counter, K-FAC's clock) is set to what selects the kind.
"""

import dataclasses
import functools
import statistics
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
from experiments.stepping import step as one_step
from kfac_jax_lite.core.pytree import find_states, leaves_by_path, replace_leaves
from kfac_jax_lite.kronecker.precondition import gather, precondition, scatter

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


def optax_job(name: str, tx: optax.GradientTransformation, problem: Problem) -> Job:
    loss, batch = problem.plain_loss(), problem.batches[0]

    def step(params, state, batch):
        return one_step(loss, tx, params, state, (batch,))

    step = jax.jit(step, donate_argnums=(0, 1))
    seconds, state = timed(tx.init, problem.params)
    first, (params, state, _) = timed(step, *copy_tree((problem.params, state)), batch)
    run = stepper(step, (params, state), {"step": lambda state: state}, batch)
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
    run = stepper(step, (params, state), {"step": lambda state: state}, *rest)
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
        self.problem, self.taken = problem, 0
        self.tagged = tagged = kfac.tag(
            problem.marked_loss(), problem.params, problem.batches[0], fisher=fisher
        )
        settings = {"damping": DAMPING, "momentum": MOMENTUM, **options}
        tx = kfac.kfac(tagged.layers, RATE, **settings)

        def step(params, state, batch, key):
            options = {"key": key, "deferred": True}
            return one_step(tagged, tx, params, state, (batch,), **options)

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.key = jax.random.key(0)
        self.setup, state = timed(tx.init, problem.params)
        self.now = copy_tree((problem.params, state))

    def warm_up(self, steps: int) -> tuple[str, float]:
        """Takes steps; what the first one did, and its seconds."""
        return [self.advance() for _ in range(steps)][0]

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


def clock_of(state: Any, older: int = 0) -> tuple[Any, Any]:
    """The number of steps and the clock, copied; inverses may be made older."""
    count, clock = copy_tree((kfac_of(state).count, kfac_of(state).clock))
    return count, clock._replace(last_inverse=clock.last_inverse - older)


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
    saved["refresh+invert"] = clock_of(run.now[1], inverse)
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
    kind, first = run.warm_up(warm_up)
    start, counted = run.taken, counters(run.now[1])

    def notes():
        taken = max(1, run.taken - start)
        pairs = zip(counters(run.now[1]), counted, strict=True)
        rates = [float(np.mean(now - before)) / taken for now, before in pairs]
        return {
            "steps": [start + 1, run.taken],
            "mean_interval": float(np.mean(kfac_of(run.now[1]).clock.interval)),
            "refreshes_per_layer_and_step": rates[0],
            "inversions_per_layer_and_step": rates[1],
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
    kind, first = run.warm_up(warm_up)
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
