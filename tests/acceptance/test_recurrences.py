"""A complex diagonal recurrence (LRU, S5), and an equation solved by bounded steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.acceptance.clients import (
    check_factors,
    coverage,
    linear,
    make_linear,
    notes,
    train,
    unseen,
)
from tests.helpers import cases

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


# -------------------------------------------------------------- linear recurrent unit

LRU = {
    "nu": jnp.linspace(-1.5, 0.0, 4),
    "theta": jnp.linspace(-1.0, 1.0, 4),
    "in_re": normal(3, 4) / 2,
    "in_im": normal(3, 4) / 2,
    "out": normal(4, 3) / 2,
    "skip": normal(3),
    "head": make_linear(2, 3, 2),
}


def lru(p, x, see=unseen):
    """``s_t = λ s_{t-1} + B x_t``, ``y = Re(s C) + d x``: ``[T, 3]`` to ``[2]``."""
    rate = jnp.exp(-jnp.exp(p["nu"]) + 1j * p["theta"])
    u = see("in_re", x, x @ p["in_re"]) + 1j * see("in_im", x, x @ p["in_im"])

    def join(one, two):
        return two[0] * one[0], two[0] * one[1] + two[1]

    rates = jnp.broadcast_to(rate, u.shape)
    s = jax.lax.associative_scan(join, (rates, u))[1]
    z = s @ p["out"]
    # Complex rows are two real ones.
    z = see("out", jnp.stack([s.real, s.imag]), jnp.stack([z.real, z.imag]))
    y = jnp.tanh(z[0]) * jnp.cos(z[1]) + p["skip"] * x
    return linear(p, "head", y.mean(0), see)


def test_complex_recurrence():
    x, y = normal(5, 6, 3), jnp.asarray(RNG.integers(0, 2, 5))

    def loss(p, x, y):
        z = kfac.categorical(jax.vmap(lambda x: lru(p, x))(x))
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

    tagged = kfac.tag(loss, LRU, x, y, fisher="exact")
    kinds = {" ".join(t.params): t.kind for t in tagged.layers}
    print(tagged)
    assert kinds["['nu']"] == kinds["['theta']"] == "diagonal"
    assert set(notes(tagged)) == {"['nu']", "['theta']"}
    assert coverage(tagged) == 1 - 8 / sum(p.size for p in jax.tree.leaves(LRU))
    statistics, losses = train(loss, LRU, (x, y), tagged)
    assert losses[-1] < losses[0]
    part = 1 / 5, lambda x, see: lru(LRU, x, see), x, "categorical"
    for name in ("in_re", "in_im", "out", "head"):
        check_factors(statistics, name, [part])


# ------------------------------------------------------ bounded steps of a solver

FIELD = {
    "in": make_linear(0, 3, 5),
    "out": make_linear(1, 5, 2),
    "head": make_linear(2, 2, 2),
}


def slope(p, t, y, see=unseen):
    """``dy/dt`` of ``y [2]``."""
    time = jnp.broadcast_to(t, (*y.shape[:-1], 1))
    h = jnp.tanh(linear(p, "in", jnp.concatenate([y, time], -1), see))
    return linear(p, "out", h, see)


def heun(p, t, y, see=unseen):
    one = slope(p, t, y, see)
    return y + 0.125 * (one + slope(p, t + 0.25, y + 0.25 * one, see))


def solve(p, y, limit):
    """Steps of 1/4 until time 1, in a loop of ``limit`` turns that may do nothing."""

    def turn(state, _):
        def step(state):
            t, y = state
            return t + 0.25, heun(p, t, y)

        return jax.lax.cond(state[0] < 1, step, lambda s: s, state), None

    return jax.lax.scan(turn, (0.0, y), length=limit)[0][1]


def unrolled(p, y, see):
    for k in range(4):
        y = heun(p, 0.25 * k, y, see)
    return linear(p, "head", y, see)


@pytest.mark.parametrize("limit", cases([6, 40], [40]))
def test_bounded_steps(limit):
    """Only turns that were taken count, whatever the bound."""
    y, target = normal(6, 2), normal(6, 2)

    def loss(p, y, target):
        z = kfac.normal(linear(p, "head", solve(p, y, limit)))
        return 0.5 * ((z - target) ** 2).sum(-1).mean()

    tagged = kfac.tag(loss, FIELD, y, target, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, losses = train(loss, FIELD, (y, target), tagged)
    assert losses[-1] < losses[0]
    part = 1 / 6, lambda y, see: unrolled(FIELD, y, see), y, "normal"
    for name in FIELD:
        check_factors(statistics, name, [part])
