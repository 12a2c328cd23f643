"""Factors kept as triangles: the same numbers in half of the bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import cases, kfac_state

MLP = models.mlp("packed", (7, 5, 4))
CASES = {
    "cholesky": (MLP, {}, {}),
    "ekfac": (MLP, {"inverse": "ekfac"}, {}),
    "low_rank": (MLP, {"inverse": "low_rank"}, {}),
    "blocks": (MLP, {}, {"max_factor_dim": 3}),
    "adaptive": (MLP, {"interval": kfac.intervals.adaptive(0.3, "elapsed")}, {}),
    "staleness": (MLP, {"interval": kfac.intervals.staleness(0.3)}, {}),
    "convolution": (models.convolutions()[0], {}, {}),
}


def train(model, tagged, tx, steps=5):
    """Trains from fixed parameters; returns them and the state."""
    params = model.params()

    @jax.jit
    def step(params, state, batch):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(steps):
        params, state = step(params, state, model.batch(8, seed=number))
    return params, state


@pytest.mark.parametrize("name", cases(CASES, ["blocks", "adaptive"]))
def test_the_same_numbers(name):
    model, options, tagging = CASES[name]
    tagged = model.tag(8, **tagging)
    txs = [
        kfac.kfac(tagged.layers, 1e-2, damping=0.1, packed=flag, **options)
        for flag in (False, True)
    ]
    (params, plain), (same, packed) = (train(model, tagged, tx) for tx in txs)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    for x, y in zip(*(kfac_state(s).clock for s in (plain, packed)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)
    # Each layout has the numbers of the other.
    for state, tx in ((plain, txs[1]), (packed, txs[0])):
        like = tx.init(model.params())
        moved = kfac_state(kfac.relayout(state, like, tagged.layers))
        wanted = kfac_state(packed if tx is txs[1] else plain)
        pairs = zip(*map(jax.tree.leaves, (moved.factors, wanted.factors)), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_a_packed_factor_by_hand():
    tagged = MLP.tag(8)
    tx = kfac.scale_by_kfac(tagged.layers, packed=True)
    params, batch = MLP.params(), MLP.batch(8)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *batch)
    update = jax.jit(lambda g, s, x: tx.update(g, s, params, statistics=x)[1])
    state = update(grads, tx.init(params), statistics)
    for layer in tagged.layers:
        held = kfac_state(state).factors[layer.name]
        factors = jax.device_get(statistics[layer.name][:2])
        for packed, whole in zip(held[:2], factors, strict=True):
            rows = [
                whole[i, j] * (1 if i == j else np.sqrt(2))
                for i in range(len(whole))
                for j in range(i, len(whole))
            ]
            np.testing.assert_allclose(packed.values, np.array(rows), rtol=1e-12)


def test_bytes_of_the_state():
    """``d (d + 1) / 2`` numbers a factor; inverses are kept whole."""
    tagged = MLP.tag(8)
    sizes = [(layer.a_shape[-1], layer.g_shape[-1]) for layer in tagged.layers]
    state = kfac.scale_by_kfac(tagged.layers, packed=True).init(MLP.params())
    factors, inverses = (
        sum(x.size for x in jax.tree.leaves(part))
        for part in (state.factors, state.inverses)
    )
    assert factors == sum(a * (a + 1) // 2 + g * (g + 1) // 2 for a, g in sizes)
    assert inverses == sum(a * a + g * g for a, g in sizes)


def test_another_models_state_is_refused():
    tagged = MLP.tag(8)
    tx = kfac.scale_by_kfac(tagged.layers, packed=True)
    params, batch = MLP.params(), MLP.batch(8)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *batch)
    state = tx.init(params)
    name = tagged.layers[0].name
    short = state.factors[name]._replace(
        a=state.factors[name].a._replace(values=jnp.zeros(3))
    )
    broken = state._replace(factors={**state.factors, name: short})
    with pytest.raises(ValueError, match=f"{name} has a packed factor of shape"):
        tx.update(grads, broken, params, statistics=statistics)
