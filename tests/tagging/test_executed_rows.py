"""Rows count as they are executed, and where a derivative of the loss passes.

Oracle: the same loss without the loop, the branch or the dead code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac

KEY = jax.random.key
N = 6
PARAMS = {
    "w": 0.5 * jax.random.normal(KEY(0), (3, 3)),
    "h": jax.random.normal(KEY(1), (3, 2)),
}
X = jax.random.normal(KEY(2), (N, 3))


def turn(p, c):
    return c + 0.3 * jnp.tanh(c @ p["w"])


def loss_of(states):
    def loss(p, x, k):
        return 0.5 * (kfac.normal(states(p, x, k) @ p["h"]) ** 2).sum(-1).mean()

    return loss


def looped(p, x, k):
    """Some of twelve turns are taken, as a bounded solver takes them."""
    step = lambda c: turn(p, c)  # noqa: E731
    body = lambda c, i: (lax.cond(i < k, step, lambda c: c, c), None)  # noqa: E731
    return lax.scan(body, x, jnp.arange(12))[0]


def nested(p, x, k):
    """Blocks of turns, each behind a branch, with a branch inside."""

    def block(c, i):
        one = lambda c: turn(p, c)  # noqa: E731
        inner = lambda c, j: (lax.cond(3 * i + j < k, one, lambda c: c, c), None)  # noqa: E731
        return lax.scan(inner, c, jnp.arange(3))[0]

    body = lambda c, i: (lax.cond(3 * i < k, block, lambda c, i: c, c, i), None)  # noqa: E731
    return lax.scan(body, x, jnp.arange(4))[0]


def either(p, x, k):
    """Both branches use the layer, one of them twice."""
    for i in range(3):
        twice = lambda c: turn(p, turn(p, c))  # noqa: E731
        x = lax.cond(i < k - 3, twice, lambda c: turn(p, c), x)
    return x


def plain(p, x, k):
    for _ in range(int(k)):
        x = turn(p, x)
    return x


def statistics(states, k, **options):
    loss, traced = loss_of(states), jnp.int32(k)
    if states is plain:
        loss, traced = loss_of(lambda p, x, _: plain(p, x, k)), jnp.int32(k)
    tagged = kfac.tag(loss, PARAMS, X, traced, **options)
    state = kfac.kfac(tagged.layers, 0.1).init(PARAMS)
    return jax.jit(tagged.value_and_grad)(PARAMS, X, traced, opt_state=state)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("states", [looped, nested, either])
def test_turns_not_taken(states, sharing):
    options = {"fisher": "exact", "weight_sharing": sharing}
    seen, wanted = (statistics(s, 4, **options) for s in (states, plain))
    for one, two in zip(jax.tree.leaves(seen), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_no_turn_at_all():
    seen = statistics(looped, 0, fisher="exact")[2]["w"]
    assert not np.any(seen.a) and not np.any(seen.g)


def dead(kind):
    """A second use of the layers that no derivative of the loss passes through."""

    def states(p, x, k):
        other = turn(p, x**2) @ p["h"]
        c = plain(p, x, 2)
        if kind == "unread":
            return c
        if kind == "stopped":
            return c * jnp.exp(0 * lax.stop_gradient(other.sum()))
        if kind == "compared":
            return jnp.where(other.sum() > 1e9, 0.0, 1.0) * c
        if kind == "rounded":
            return c + 0 * jnp.round(other.sum())
        if kind == "carried":  # a loop's second carry, read by nobody
            both = lambda c, _: ((turn(p, c[0]), turn(p, c[1])), None)  # noqa: E731
            return lax.scan(both, (x, x**2), None, length=2)[0][0]
        if kind == "derivative":  # leaves the network's own value behind
            pair = jax.jvp(lambda y: turn(p, y), (x**2,), (x,))
            return c + 0 * lax.stop_gradient(pair[1])
        raise ValueError(kind)

    return states


KINDS = ["unread", "stopped", "compared", "rounded", "carried", "derivative"]


@pytest.mark.parametrize("kind", KINDS)
def test_dead_uses(kind):
    seen = statistics(dead(kind), 2, fisher="exact")[2]
    wanted = statistics(plain, 2, fisher="exact")[2]
    for name in ("w", "h"):
        for one, two in zip(seen[name], wanted[name], strict=True):
            if one is not None:
                np.testing.assert_allclose(one, two, rtol=1e-9)


def test_marks_behind_stop_gradient_and_unread_marks():
    """A target network's mark is no output; a mark that nothing reads is one."""

    def marked(p, x):
        return kfac.normal(turn(p, x) @ p["h"])

    def target(p, x):
        goal = lax.stop_gradient(marked(p, x[:2]).sum())
        return 0.5 * ((marked(p, x) - goal) ** 2).sum(-1).mean()

    def unread(p, x):
        marked(p, x)
        return (turn(p, x**2) @ p["h"]).mean() ** 3

    def only(p, x):
        return 0.5 * (marked(p, x) ** 2).sum(-1).mean()

    wanted = kfac.tag(only, PARAMS, X, fisher="exact").value_and_grad(PARAMS, X)[2]
    for loss in (target, unread):
        tagged = kfac.tag(loss, PARAMS, X, fisher="exact")
        _, grads, seen = tagged.value_and_grad(PARAMS, X)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
            grads,
            jax.grad(loss)(PARAMS, X),
        )
        for name in ("w", "h"):
            np.testing.assert_allclose(seen[name].g, wanted[name].g, rtol=1e-9)
            np.testing.assert_allclose(seen[name].a, wanted[name].a, rtol=1e-9)


def test_auxiliary_uses():
    """What only ``aux`` reads is no use."""

    def loss(p, x):
        z = kfac.normal(turn(p, x) @ p["h"])
        return 0.5 * (z**2).sum(-1).mean(), turn(p, x**3) @ p["h"]

    tagged = kfac.tag(loss, PARAMS, X, has_aux=True, fisher="exact")
    seen = tagged.value_and_grad(PARAMS, X)[2]["w"]
    np.testing.assert_allclose(seen.a, X.T @ X / N, rtol=1e-12)
