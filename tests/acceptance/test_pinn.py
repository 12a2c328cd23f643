"""Burgers' equation as in jaxpi: a mark for each term, weights that a trainer moves."""

from types import SimpleNamespace

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

PARAMS = {
    "embed": make_linear(0, 2, 6),
    "hidden": make_linear(1, 6, 6),
    "out": make_linear(2, 6, 1),
}
RNG = np.random.default_rng(0)
INSIDE = jnp.asarray(RNG.uniform((-1, 0), (1, 1), (6, 2)))  # points (x, t)
RIM = jnp.asarray([(-1, 0.3), (1, 0.3), (1, 0.8), (-1, 0.9)])
START = jnp.asarray([(-0.7, 0), (-0.2, 0), (0.5, 0)])


def u(p, z, see=unseen):
    h = jnp.sin(linear(p, "embed", z, see))
    return linear(p, "out", jnp.tanh(linear(p, "hidden", h, see)), see)[0]


def residual(p, z, derivative):
    """``u_t + u u_x − ν u_xx``."""
    slope = jax.grad(u, 1)(p, z)
    if derivative == "hessian":
        second = jax.hessian(u, 1)(p, z)[0, 0]
    else:
        along = lambda z: jax.jvp(lambda y: u(p, y), (z,), (X,))[1]  # noqa: E731
        second = jax.jvp(along, (z,), (X,))[1]
    return slope[1] + u(p, z) * slope[0] - 0.01 / jnp.pi * second


X = jnp.array([1.0, 0.0])


def make_loss(derivative="hessian", said=True):
    def loss(p, inside, rim, start, w):
        over = lambda f, x: jax.vmap(lambda z: f(z))(x)  # noqa: E731
        rows = (
            over(lambda z: residual(p, z, derivative), inside),
            over(lambda z: u(p, z), rim),
            over(lambda z: u(p, z) + jnp.sin(jnp.pi * z[0]), start),
        )
        rows = [
            kfac.normal(r, weight=w[k] if said else None) for k, r in enumerate(rows)
        ]
        return sum(w[k] * (r**2).mean() / 2 for k, r in enumerate(rows))

    return loss


ARGS = INSIDE, RIM, START, jnp.array([1.0, 10.0, 50.0])


@pytest.mark.parametrize("derivative", cases(["hessian", "forward"], ["hessian"]))
def test_blocks(derivative):
    loss = make_loss(derivative)
    tagged = kfac.tag(loss, PARAMS, *ARGS, fisher="exact")
    assert coverage(tagged) == 1, tagged
    # Reverse mode applies the transpose of every weight.
    assert notes(tagged) == {
        f"['{name}']['w']": "dense: also used in the opposite direction"
        for name in PARAMS
    }
    tx = kfac.kfac(tagged.layers, 0.1, damping=kfac.damping.adaptive())
    statistics, losses = train(loss, PARAMS, ARGS, tagged, tx)
    assert losses[-1] < losses[0]
    for one in jax.tree.leaves(dict(statistics)):
        assert np.isfinite(one).all()


def test_terms_of_values():
    """Weights of the other terms at zero: the factors are those of plain networks."""
    loss = make_loss()
    args = *ARGS[:3], jnp.array([0.0, 2.0, 5.0])
    tagged = kfac.tag(loss, PARAMS, *args, fisher="exact")
    statistics = jax.jit(tagged.value_and_grad)(PARAMS, *args)[2]
    forward = lambda z, see: u(PARAMS, z, see)  # noqa: E731
    parts = [(2 / 4, forward, RIM, "normal"), (5 / 3, forward, START, "normal")]
    # The use that is met first, in the derivatives, says which direction is forward.
    for name, fields in (("embed", "a g"), ("hidden", "a g"), ("out", "a_out g_out")):
        both = [getattr(statistics[f"{name}/w"], field) for field in fields.split()]
        check_factors({name: SimpleNamespace(a=both[0], g=both[1])}, name, parts)


@pytest.mark.slow
def test_weights_are_measured():
    """Weights that the marks do not say are read off the loss."""
    seen = []
    for said in (True, False):
        tagged = kfac.tag(make_loss(said=said), PARAMS, *ARGS, fisher="exact")
        seen.append(jax.jit(tagged.value_and_grad)(PARAMS, *ARGS)[2])
    for one, two in zip(*map(jax.tree.leaves, seen), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-12)
