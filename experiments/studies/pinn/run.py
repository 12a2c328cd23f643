"""Runs the PINN study.

    python -m experiments.main study pinn --size small --out <folder>

Every method has one hyper-parameter and as many values of it to try, on a seed of its
own; the best by the error at the end is then run with the other seeds, all for the same
processor time. Compiling and evaluations are not in it. A finished run is a line of its
method's file; the same command goes on after it.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

import kfac_jax_lite as kfac
from experiments.studies.pinn.config import ADAM, DUAL, KFAC, LBFGS, PinnStudy
from experiments.studies.records import Cells, Record
from kfac_jax_lite import TaggedLoss

# Points along each axis on which the error is measured.
TEST_POINTS = 50
# Steps between evaluations.
STEPS = {ADAM: 50, LBFGS: 10, KFAC: 5, DUAL: 2}
Batch = tuple[jax.Array, jax.Array, jax.Array]


def solution(x: Any) -> jax.Array:
    """``u*(x)`` of points ``[n, 2]``."""
    return jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1])


def network(params: Any, x: jax.Array) -> jax.Array:
    """``u(x)``, ``[n]``."""
    *hidden, last = params
    for w, b in hidden:
        x = jnp.tanh(x @ w + b)
    return (x @ last[0] + last[1])[:, 0]


def laplacian(params: Any, x: jax.Array) -> jax.Array:
    """``Δu(x)``, ``[n]``, by forward mode over forward mode along each axis."""

    def second(axis):
        along = jnp.zeros_like(x).at[:, axis].set(1)
        slope = lambda y: jax.jvp(lambda z: network(params, z), (y,), (along,))[1]  # noqa: E731
        return jax.jvp(slope, (x,), (along,))[1]

    return second(0) + second(1)


def loss(params: Any, x: jax.Array, inside: jax.Array, weight: jax.Array) -> jax.Array:
    """Half the mean square of the weighted residuals at the points."""
    equation = -laplacian(params, x) - 2 * jnp.pi**2 * solution(x)
    rows = weight * jnp.where(inside, equation, network(params, x) - solution(x))
    return 0.5 * jnp.mean(kfac.normal(rows) ** 2)


def points(config: PinnStudy) -> Batch:
    """All points ``[n, 2]``, which are inside, and the rows' weights, ``[n]`` each."""
    ticks = (np.arange(config.interior) + 0.5) / config.interior
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    t = (np.arange(config.boundary) + 0.5) / config.boundary
    sides = [
        np.stack(pair, -1) for v in (0 * t, 0 * t + 1) for pair in ((t, v), (v, t))
    ]
    x = np.concatenate([grid, *sides])
    inside = np.arange(len(x)) < len(grid)
    share = config.boundary_weight * len(x) / (len(x) - len(grid))
    weight = np.sqrt(np.where(inside, len(x) / len(grid), share))
    return jnp.asarray(x), jnp.asarray(inside), jnp.asarray(weight)


def start(config: PinnStudy, seed: int) -> Any:
    """Glorot-normal weights and zero biases."""
    sizes = [2, *[config.width] * config.hidden, 1]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        (jax.random.normal(key, (i, o)) * np.sqrt(2 / (i + o)), jnp.zeros(o))
        for key, i, o in shapes
    ]


def error(params: Any) -> jax.Array:
    """``‖u − u*‖ / ‖u*‖`` on a finer grid."""
    ticks = jnp.linspace(0, 1, TEST_POINTS)
    x = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    wanted = solution(x)
    return jnp.linalg.norm(network(params, x) - wanted) / jnp.linalg.norm(wanted)


class Program(NamedTuple):
    """A method, compiled."""

    # ``(seed, value) -> carry``; the value is the method's hyper-parameter.
    start: Callable[[int, float], Any]
    # ``(carry, value) -> carry``, `STEPS` steps on.
    advance: Callable[[Any, float], Any]
    measure: Callable[[Any], tuple[jax.Array, jax.Array]]  # ``carry -> (loss, error)``


def tag(config: PinnStudy) -> TaggedLoss:
    """The tagged loss; with one output the exact Fisher matrix takes one more pass."""
    return kfac.tag(loss, start(config, 0), *points(config), fisher="exact")


def make_program(config: PinnStudy, method: str) -> Program:
    batch = points(config)
    step = {ADAM: adam, LBFGS: lbfgs, KFAC: kronecker, DUAL: dual}[method]
    # A number of pairs decides shapes.
    static = (1,) if method == LBFGS else ()

    def begin(seed, value):
        params = start(config, seed)
        return params, step(config, batch, value)[0].init(params)

    def advance(carry, value):
        body = step(config, batch, value)[1]
        return jax.lax.fori_loop(0, STEPS[method], lambda _, c: body(*c), carry)

    def measure(carry):
        return loss(carry[0], *batch), error(carry[0])

    return Program(
        jax.jit(begin, static_argnums=static),
        jax.jit(advance, static_argnums=static),
        jax.jit(measure),
    )


Method = tuple[optax.GradientTransformationExtraArgs, Callable[[Any, Any], Any]]


def adam(config: PinnStudy, batch: Batch, value: Any) -> Method:
    """Adam with a constant learning rate."""
    del config
    tx = optax.with_extra_args_support(optax.adam(value))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def lbfgs(config: PinnStudy, batch: Batch, value: Any) -> Method:
    """L-BFGS with optax's zoom line search."""
    del config
    tx = optax.lbfgs(memory_size=int(value))
    fun = lambda params: loss(params, *batch)  # noqa: E731
    known = optax.value_and_grad_from_state(fun)

    def step(params, state):
        value, grads = known(params, state=state)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=fun
        )
        return optax.apply_updates(params, updates), state

    return tx, step


def kronecker(config: PinnStudy, batch: Batch, value: Any) -> Method:
    """K-FAC's direction, and the best of some step sizes along it."""
    tagged = tag(config)
    tx = kfac.scale_by_kfac(
        tagged.layers, damping=value, factor_decay=config.factor_decay
    )

    def step(params, state):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return best_step(config, batch, params, updates), state

    return tx, step


def dual(config: PinnStudy, batch: Batch, value: Any) -> Method:
    """The natural gradient, and the best of some step sizes along it."""
    tagged = tag(config)
    tx = kfac.ntk.dual_natural_gradient(
        tagged, value, solver=config.solver, independent=True, chunk=len(batch[0])
    )

    def step(params, state):
        grads = jax.grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return best_step(config, batch, params, updates), state

    return tx, step


def best_step(config: PinnStudy, batch: Batch, params: Any, direction: Any) -> Any:
    """``θ − η d`` with the ``η = 2⁻ᵏ`` of least loss."""

    def moved(rate):
        return jax.tree.map(
            lambda p, d: p - rate * d.astype(p.dtype), params, direction
        )

    rates = 2.0 ** -jnp.arange(config.step_sizes)
    losses = jax.lax.map(lambda rate: loss(moved(rate), *batch), rates)
    return moved(rates[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))])


TUNING_SEED = 1000


def run_one(
    config: PinnStudy, program: Program, steps: int, value: float, seed: int
) -> Record:
    """A run, after two calls that compile."""
    carry = program.start(seed, value)
    # Twice: the types of a state may change in the first call.
    later = program.advance(program.advance(carry, value), value)
    jax.block_until_ready((later, program.measure(carry)))
    curve: Record = {"steps": [], "seconds": [], "losses": [], "errors": []}
    taken, spent = 0, 0.0
    while True:
        found, distance = map(float, program.measure(carry))
        for name, item in zip(curve, (taken, spent, found, distance), strict=True):
            curve[name].append(item)
        if spent >= config.seconds or not math.isfinite(found + distance):
            return curve
        before = time.process_time()
        carry = jax.block_until_ready(program.advance(carry, value))
        spent += time.process_time() - before
        taken += steps


def final(record: Record) -> float:
    """The error at the end of a run; infinite where it was not finite."""
    last = record["errors"][-1]
    return math.inf if last is None or not math.isfinite(last) else last


def run_method(
    config: PinnStudy, cells: Cells, method: str, tell: Callable[[Record], None]
) -> None:
    """Runs what is missing of a method: its settings, then the seeds of the best."""
    program = make_program(config, method)

    def finish(kind: str, value: float, seed: int) -> Record:
        def make() -> Record:
            found = run_one(config, program, STEPS[method], value, seed)
            return {"step": found["steps"][-1], **found}

        record, new = cells.get(method, kind, make, value=value, seed=seed)
        if new:
            tell(record)
        return record

    settings = config.settings(method)
    trials = [finish("trial", value, TUNING_SEED) for value in settings]
    best = min(trials, key=final)["value"]
    for seed in range(config.seeds):
        finish("run", best, seed)


def run_pinn(config: PinnStudy, console: Console) -> Path:
    cells = Cells(config)
    total = sum(len(config.settings(m)) + config.seeds for m in config.only)
    with (
        jax.enable_x64(config.precision == "float64"),
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        console.print(str(tag(config)), markup=False, highlight=False)
        task = bar.add_task("runs", total=total)
        for method in config.only:
            bar.update(task, description=method)

            def tell(record: Record, method: str = method) -> None:
                bar.advance(task)
                console.print(
                    f"{method} {record['value']:g}, seed {record['seed']}: error "
                    f"{final(record):.2e} after {record['steps'][-1]} steps",
                    highlight=False,
                )

            bar.advance(task, len(cells.read(method)))
            run_method(config, cells, method, tell)
            jax.clear_caches()
    return config.out
