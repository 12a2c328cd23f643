"""Poisson's equation as least squares, and the methods that solve it.

``−Δu = f`` on the unit square, ``u = 0`` on its boundary, with the solution
``u* = sin πx sin πy``. A row of the marked output is a residual at a point, inside or
on the boundary, weighted so that the loss is half the mean square of all rows.

References:
    Raissi, Perdikaris & Karniadakis, 2019, J. Comput. Phys. 378; Müller & Zeinhofer,
    2023, arXiv:2302.13163, for the natural gradient with a line search; Dangel, Müller
    & Zeinhofer, 2024, arXiv:2405.15603, for K-FAC.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.studies.pinn.config import ADAM, DUAL, KFAC, LBFGS, PinnStudy
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
    """Compiles nothing yet."""
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
