"""Momentum and trust region that follow schedules, against plain Python."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import (
    batches_of,
    close,
    first_pass,
    identical,
    kfac_state,
    random_like,
    random_statistics,
    train,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]
DAMPING = 0.01
STEPS = 7


def falling(count):
    """A momentum that changes at every step; for Python numbers and for arrays."""
    return 0.9 / (1 + count)


def shrinking(count):
    """A learning rate."""
    return 0.1 / (2 + count)


def growing(count):
    """A bound of the trust region."""
    return 1e-4 * (1 + count)


def poisoned(tree):
    """The tree with one number that is none."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[0] = leaves[0].at[0].set(jnp.nan)
    return jax.tree.unflatten(structure, leaves)


def compiled(tx, calls):
    """The update under ``jit``, counting how often it is traced."""

    @jax.jit
    def update(grads, state, params, **extra_args):
        calls["traced"] += 1
        return tx.update(grads, state, params, **extra_args)

    return update


@pytest.mark.parametrize("bad", [(), (1, 2, 5)], ids=["clean", "rejected"])
def test_heavy_ball(rng, bad):
    """Python counts the accepted batches and keeps its own velocity."""
    layers, params = first_pass("mlp")[0].layers, MODEL.params()
    tx = kfac.kfac(layers, shrinking, damping=DAMPING, momentum=falling, kl_clip=None)
    plain = kfac.scale_by_kfac(layers, damping=DAMPING)
    state, plain_state, calls = tx.init(params), plain.init(params), {"traced": 0}
    update, accepted = compiled(tx, calls), 0
    velocity = jax.tree.map(np.zeros_like, params)
    for number in range(STEPS):
        grads = random_like(rng, params)
        statistics = random_statistics(rng, first_pass("mlp")[-1])
        given = poisoned(grads) if number in bad else grads
        updates, state = update(given, state, params, statistics=statistics)
        if number in bad:
            identical(updates, jax.tree.map(jnp.zeros_like, params))
            continue
        u, plain_state = plain.update(grads, plain_state, params, statistics=statistics)
        decay, rate = falling(accepted), shrinking(accepted)
        velocity = jax.tree.map(lambda v, u, m=decay: m * v + u, velocity, u)
        close(updates, jax.tree.map(lambda v, n=rate: -n * v, velocity), 1e-12)
        accepted += 1
    assert calls["traced"] == 1
    assert int(kfac_state(state).count) == accepted == STEPS - len(bad)


@pytest.mark.parametrize("bad", [(), (0, 3)], ids=["clean", "rejected"])
def test_trust_region(rng, bad):
    layers, params = first_pass("mlp")[0].layers, MODEL.params()
    tx = kfac.kfac(layers, shrinking, damping=DAMPING, momentum=None, kl_clip=growing)
    plain = kfac.scale_by_kfac(layers, damping=DAMPING)
    state, plain_state, calls = tx.init(params), plain.init(params), {"traced": 0}
    update, factors = compiled(tx, calls), []
    for number in range(STEPS):
        grads = random_like(rng, params)
        statistics = random_statistics(rng, first_pass("mlp")[-1])
        given = poisoned(grads) if number in bad else grads
        updates, state = update(given, state, params, statistics=statistics)
        if number in bad:
            continue
        u, plain_state = plain.update(grads, plain_state, params, statistics=statistics)
        count = len(factors)
        size = shrinking(count) ** 2 * float(optax.tree.vdot(u, grads))
        factors.append(min(1.0, np.sqrt(growing(count) / size)))
        scale = -shrinking(count) * factors[-1]
        close(updates, jax.tree.map(lambda u, s=scale: s * u, u), 1e-12)
        np.testing.assert_allclose(state.trust, factors[-1], rtol=1e-6)
    assert calls["traced"] == 1
    assert max(factors) < 1


@pytest.mark.parametrize("bad", [(), (1, 4)], ids=["clean", "rejected"])
def test_heavy_ball_beside_an_adaptive_damping(bad):
    """``d = −η u + m d_prev``: the velocity is the last step."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    rule = kfac.damping.levenberg_marquardt(0.5, factor=0.9, interval=2)
    tx = kfac.kfac(tagged.layers, shrinking, damping=rule, momentum=falling)
    plain = kfac.scale_by_kfac(tagged.layers)
    state, plain_state, accepted = tx.init(params), plain.init(params), 0
    calls = collections.Counter()

    @jax.jit
    def step(params, state, x, y):
        calls["traced"] += 1
        _, grads, statistics = tagged.value_and_grad(params, x, y)
        model = kfac.quadratic_model(tagged, params, x, y)
        new = tx.update(grads, state, params, statistics=statistics, model=model)
        return *new, grads, statistics

    previous = jax.tree.map(np.zeros_like, params)
    for number, (x, y) in enumerate(batches_of(MODEL, STEPS)):
        given = x.at[0, 0].set(jnp.nan) if number in bad else x
        damping = state.damping
        d, state, grads, statistics = step(params, state, given, y)
        if number in bad:
            identical(d, jax.tree.map(jnp.zeros_like, params))
            continue
        u, plain_state = plain.update(
            grads, plain_state, params, statistics=statistics, damping=damping
        )
        m, rate = falling(accepted), shrinking(accepted)
        # Both are kept as float32 in the state.
        previous = jax.tree.map(lambda v, u, m=m, n=rate: m * v - n * u, previous, u)
        close(d, previous, 1e-6)
        np.testing.assert_allclose(state.momentum, m, rtol=1e-6)
        params = optax.apply_updates(params, d)
        accepted += 1
    assert calls["traced"] == 1
    assert int(kfac_state(state).count) == STEPS - len(bad)


def test_a_constant_schedule_continues_the_state_of_a_number():
    """The same state, so that a checkpoint goes on with either."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    number = kfac.kfac(tagged.layers, 0.05, momentum=0.7)
    schedule = kfac.kfac(tagged.layers, 0.05, momentum=lambda count: 0.7)
    identical(schedule.init(params), number.init(params))
    batches = batches_of(MODEL, 3)
    identical(
        train(tagged, schedule, params, batches), train(tagged, number, params, batches)
    )


@pytest.mark.parametrize("strong", [False, True], ids=["weak", "strong"])
def test_every_leaf_keeps_its_dtype(strong):
    """Also where leaves differ, whatever the schedule returns."""

    def momentum(count):
        value = 0.9 / (1 + count)
        return jnp.asarray(value, jnp.float32) if strong else value

    def loss(params, x):
        x = jnp.tanh(x @ params["first"])
        out = x.astype(jnp.bfloat16) @ params["second"]
        return jnp.square(kfac.normal(out.astype(jnp.float32))).sum(-1).mean()

    rng = np.random.default_rng(0)
    params = {
        "first": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(4, 2)), jnp.bfloat16),
    }
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    tagged = kfac.tag(loss, params, x)
    tx = kfac.kfac(tagged.layers, 0.05, momentum=momentum)
    before = tx.init(params)
    _, grads, statistics = tagged.value_and_grad(params, x)
    updates, after = tx.update(grads, before, params, statistics=statistics)
    chex.assert_trees_all_equal_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
