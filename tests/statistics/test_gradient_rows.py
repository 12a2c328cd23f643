"""Layers wider than their batch: gradients as rows, the cheaper order of products."""

import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import kfac_jax_lite as kfac
from kfac_jax_lite.core.pytree import leaves_by_path
from kfac_jax_lite.kronecker import precondition
from kfac_jax_lite.kronecker.precondition import gather
from kfac_jax_lite.optimizer import transform
from kfac_jax_lite.statistics import deferred as thin
from tests import zoo
from tests.helpers import cases, close, kfac_state
from tests.statistics.test_masks import MASK, masked_loss

EXAMPLES = 4


def loss_of(bias):
    """Two dense layers under a softmax."""

    def layer(p, x):
        return x @ p["w"] + p["b"] if bias else x @ p["w"]

    def loss(params, x, y):
        z = kfac.categorical(layer(params[1], jnp.tanh(layer(params[0], x))))
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return loss


def problem(rng, rows, sizes, bias=True):
    """``(loss, params, batch)`` of random numbers."""

    def one(n_in, n_out):
        w = {"w": jnp.asarray(rng.normal(size=(n_in, n_out)))}
        return w | {"b": jnp.asarray(rng.normal(size=n_out))} if bias else w

    params = [one(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
    x = jnp.asarray(rng.normal(size=(rows, sizes[0])))
    return loss_of(bias), params, (x, jnp.asarray(rng.integers(0, sizes[-1], rows)))


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the rows that updates are made of."""
    shapes = []

    def spy(inverse, rows, accepted):
        shapes.append((rows.x.shape, rows.c.shape))
        return precondition.precondition_thin(inverse, rows, accepted)

    monkeypatch.setattr(transform, "precondition_thin", spy)
    return shapes


def one_update(loss, params, batch, deferred, change=None, **options):
    """The update of a first step; ``change`` is applied to the gradients."""
    tagged = kfac.tag(loss, params, *batch)
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.1, **options)
    state = tx.init(params)
    _, grads, statistics = tagged.value_and_grad(
        params, *batch, opt_state=state, deferred=deferred
    )
    grads = change(grads) if change else grads
    return tx.update(grads, state, params, statistics=statistics)


def dense_oracle(params, batch, loss, state):
    """``A⁻¹ V G⁻¹`` with explicit damped factors, from plain gradients."""
    grads = jax.grad(loss)(params, *batch)
    found = []
    for i, g in enumerate(grads):
        (name,) = [k for k in state.factors if f"{i}" in k]
        a, c = (np.asarray(x) for x in (state.factors[name].a, state.factors[name].g))
        v = np.concatenate([g["w"], g["b"][None]]) if "b" in g else np.asarray(g["w"])
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(c) / len(c)))
        left = np.linalg.inv(a + pi * np.sqrt(0.1) * np.eye(len(a)))
        right = np.linalg.inv(c + np.sqrt(0.1) / pi * np.eye(len(c)))
        u = left @ v @ right
        found.append({"w": u[:-1], "b": u[-1]} if "b" in g else {"w": u})
    return found


@hypothesis.given(
    st.integers(1, 4), st.integers(9, 16), st.integers(9, 16), st.booleans()
)
@hypothesis.settings(max_examples=4)
def test_updates_are_those_of_the_dense_oracle(rows, n_in, width, bias):
    rng = np.random.default_rng(rows * n_in + width)
    loss, params, batch = problem(rng, rows, (n_in, width, 3), bias)
    run = jax.jit(functools.partial(one_update, loss, deferred=True))
    updates, state = run(params, batch)
    close(updates, dense_oracle(params, batch, loss, kfac_state(state)), 1e-9)


@pytest.mark.parametrize("inverse", ["cholesky", "newton_schulz"])
def test_rows_are_taken_where_they_are_few(rng, taken, inverse):
    """The wide layer by rows, the narrow one as ever; both as without rows."""
    made = problem(rng, 4, (12, 11, 3))
    by_rows, _ = one_update(*made, True, inverse=inverse)
    assert taken == [((4, 13), (4, 11))]
    plain, _ = one_update(*made, False, inverse=inverse)
    assert len(taken) == 1
    close(by_rows, plain, 1e-9)


@pytest.mark.parametrize("inverse", ["eigh", "ekfac", "low_rank"])
def test_other_inverses_have_no_use_for_rows(rng, taken, inverse):
    made = problem(rng, 4, (12, 11, 3))
    by_rows, _ = one_update(*made, True, inverse=inverse)
    assert not taken
    close(by_rows, one_update(*made, False, inverse=inverse)[0], 1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: jax.tree.map(lambda x: 3 * x, g),
        lambda g: optax.tree.zeros_like(g),
        lambda g: [g[0] | {"b": g[0]["b"] + 1}, g[1]],
    ],
    ids=["scaled", "zeros", "one leaf"],
)
def test_changed_gradients_are_preconditioned_as_they_are(rng, taken, change):
    """The rows stand for the arrays that were returned and for no others."""
    made = problem(rng, 4, (12, 11, 3))
    updates, _ = one_update(*made, True, change)
    assert not taken
    close(updates, one_update(*made, False, change)[0], 1e-12)


def test_many_rows(rng, taken):
    one_update(*problem(rng, 40, (12, 11, 3)), True)
    assert not taken


def test_the_cheaper_order_by_counted_operations():
    """The rule against the operations of both orders, in plain Python."""
    for rows, a, g in [(512, 1001, 1000), (512, 785, 1000), (512, 1001, 10), (7, 8, 8)]:
        by_rows = 2 * rows * a * a + 2 * rows * g * g + 2 * rows * a * g
        plain = 2 * a * a * g + 2 * a * g * g
        assert thin.few(rows, a, g) == (by_rows < 0.9 * plain)
    assert thin.few(512, 1001, 1000) and not thin.few(512, 1001, 10)


def test_no_full_product_is_left(rng):
    """The compiled step holds no product of the two sides' sizes with the gradient."""
    loss, params, batch = problem(rng, 4, (40, 41, 3), False)
    tagged = kfac.tag(loss, params, *batch)
    tx = kfac.scale_by_kfac(tagged.layers, interval=kfac.intervals.every(100))

    def step(state, params):
        _, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state, deferred=True
        )
        return tx.update(grads, state, params, statistics=statistics)[0]

    text = str(jax.make_jaxpr(step)(tx.init(params), params))
    outside = [line for line in text.splitlines() if "dot_general" in line]
    shapes = [re.findall(r"f64\[(\d+),(\d+)\]", line) for line in outside]
    assert [("4", "40")] in shapes and [("4", "41")] in shapes


def test_a_rejected_batch_moves_nothing(rng, taken):
    loss, params, (x, y) = problem(rng, 4, (12, 11, 3))
    updates, state = one_update(loss, params, (x.at[0, 0].set(jnp.nan), y), True)
    assert taken and kfac_state(state).skipped == 1
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, 0)


def test_a_penalty_on_a_weight_is_seen(rng, taken):
    """A parameter that the loss also uses elsewhere has a gradient beyond its rows."""
    loss, params, batch = problem(rng, 4, (12, 11, 3))

    def penalised(params, x, y):
        return loss(params, x, y) + 0.1 * jnp.sum(params[0]["w"] ** 2)

    updates, _ = one_update(penalised, params, batch, True)
    assert not taken
    close(updates, one_update(penalised, params, batch, False)[0], 1e-12)


def test_training_under_shard_map_has_no_rows(rng, taken):
    """A device's rows are not those of the whole batch."""
    loss, params, batch = problem(rng, 8, (24, 23, 3))
    tagged = kfac.tag(loss, params, *(x[:1] for x in batch))
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.1, axis_name="batch")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")

    def step(params, *batch):
        state = tx.init(params)
        _, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state, deferred=True
        )
        grads = jax.tree.map(lambda g: g / 8, grads)
        return tx.update(grads, state, params, statistics=statistics)[0]

    specs = {"in_specs": (whole, split, split), "out_specs": whole}
    updates = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(params, *batch)
    assert not taken
    close(updates, one_update(loss, params, batch, False)[0], 1e-9)


def check_rows(tagged, params, batch, key):
    """``Xᵀ C`` is the gradient, for all layers that have rows; their names."""

    def products(params, *batch):
        found = tagged.value_and_grad(params, *batch, key=key, deferred=True)
        leaves = leaves_by_path(found[1])
        tags = {t.name: t for t in tagged.layers}
        return {
            name: (rows.x.T @ rows.c, gather(tags[name], leaves))
            for name, rows in found[2].rows.items()
        }

    found = jax.jit(products)(params, *batch)
    for made, wanted in found.values():
        close(made, wanted, 1e-9)
    return list(found)


NETS = itertools.product(zoo.NETS, ["empirical", "mc"])
FAST_NETS = [
    (net, ["empirical", "mc"][i % 2]) for i, net in enumerate(zoo.FAST_NETS[::2])
]


@pytest.mark.parametrize(("net", "fisher"), cases(NETS, FAST_NETS), ids=str)
def test_rows_make_the_gradient_in_every_architecture(monkeypatch, net, fisher):
    """Whatever the number of rows: where there are rows, they are the gradient's."""
    monkeypatch.setattr(thin, "few", lambda *sizes: True)
    tagged = net.tag(EXAMPLES, fisher=fisher)
    batch = net.batch(EXAMPLES)
    found = check_rows(tagged, net.params(), batch, jax.random.key(0))
    shared = [t.name for t in tagged.layers if t.tied or t.stack or t.note]
    assert not set(found) & set(shared)


def test_masked_rows(monkeypatch, rng):
    """Rows that the loss does not see have no cotangent."""
    monkeypatch.setattr(thin, "few", lambda *sizes: True)
    params = {
        k: jnp.asarray(rng.normal(size=s))
        for k, s in {"w": (3, 4), "b": 4, "s": 4, "v": (4, 5)}.items()
    }
    x, y = jnp.asarray(rng.normal(size=(4, 3, 3))), jnp.zeros((4, 3), int)
    tagged = kfac.tag(masked_loss, params, x, y, MASK)
    assert check_rows(tagged, params, (x, y, MASK), None)
