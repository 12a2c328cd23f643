"""The quadratic model, the step it chooses and the damping that follows it."""

import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import kfac_jax_lite as kfac

SIZES = (3, 4, 2)
N = 5


def forward(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = jnp.tanh(x) if i == 0 else x
    return x


def loss_of(likelihood):
    def loss(params, x, y):
        z = forward(params, x)
        if likelihood == "categorical":
            z = kfac.categorical(z)
            labels = jnp.argmax(y, -1)
            terms = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        elif likelihood == "bernoulli":
            z = kfac.bernoulli(z)
            terms = optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(y)).sum(-1)
        else:
            z = kfac.normal(z, 0.5)
            terms = jnp.square(z - y).sum(-1)  # variance 1/2: (y - z)^2 / (2 * 1/2)
        return terms.mean()

    return loss


def problem(seed=0):
    rng = np.random.default_rng(seed)
    pairs = zip(SIZES[:-1], SIZES[1:], strict=True)
    params = [(rng.normal(size=(i, o)), rng.normal(size=o)) for i, o in pairs]
    return (
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(rng.normal(size=(N, SIZES[0]))),
        jnp.asarray(rng.normal(size=(N, SIZES[-1]))),
    )


def output_hessian(likelihood, z):
    if likelihood == "categorical":
        p = np.exp(z) / np.exp(z).sum()
        return np.diag(p) - np.outer(p, p)
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-z))
        return np.diag(p * (1 - p))
    return np.eye(len(z)) / 0.5


def dense_ggn(likelihood, params, x):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    run = jax.jit(jax.jacrev(lambda v: forward(unravel(v), x)))
    jacobian = np.asarray(run(flat))
    z = np.asarray(forward(params, x))
    hessians = [output_hessian(likelihood, row) for row in z]
    terms = [j.T @ h @ j for j, h in zip(jacobian, hessians, strict=True)]
    return sum(terms) / N


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=3)
def test_products_equal_the_dense_gauss_newton_matrix(likelihood, seed):
    params, x, y = problem(seed)
    loss = loss_of(likelihood)
    tagged = kfac.tag(loss, params, x, y)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    rng = np.random.default_rng(seed + 1)
    vectors = rng.normal(size=(3, flat.size))

    @jax.jit
    def products(vectors):
        return kfac.quadratic_model(tagged, params, x, y).products(vectors)

    value, slopes, gram = products([unravel(jnp.asarray(v)) for v in vectors])
    gradient = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(params, x, y))[0]
    np.testing.assert_allclose(value, loss(params, x, y), rtol=1e-12)
    np.testing.assert_allclose(slopes, vectors @ np.asarray(gradient), rtol=1e-9)
    curvature = dense_ggn(likelihood, params, x)
    np.testing.assert_allclose(gram, vectors @ curvature @ vectors.T, rtol=1e-9)


def test_step_minimises_the_damped_model_over_both_directions():
    params, x, y = problem()
    loss, damping = loss_of("categorical"), 0.3
    tagged = kfac.tag(loss, params, x, y)
    tx = kfac.kfac(tagged.layers, "auto", damping=damping)
    inner = kfac.scale_by_kfac(tagged.layers, damping=damping)
    state, inner_state, previous = tx.init(params), inner.init(params), None
    size = sum(leaf.size for leaf in jax.tree.leaves(params))

    def ravel(tree):
        return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])

    @jax.jit
    def step(params, state, inner_state):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        model = kfac.quadratic_model(tagged, params, x, y)
        u, inner_state = inner.update(grads, inner_state, params, statistics=statistics)
        d, state = tx.update(grads, state, params, statistics=statistics, model=model)
        return grads, u, d, state, inner_state

    for _ in range(4):
        grads, u, d, state, inner_state = step(params, state, inner_state)
        directions = [-ravel(u)] + ([] if previous is None else [previous])
        basis = np.stack(directions)
        curvature = dense_ggn("categorical", params, x) + damping * np.eye(size)
        weights = -np.linalg.solve(basis @ curvature @ basis.T, basis @ ravel(grads))
        np.testing.assert_allclose(ravel(d), weights @ basis, rtol=2e-5, atol=1e-8)
        previous = ravel(d)
        params = optax.apply_updates(params, d)


def test_levenberg_marquardt_follows_the_reduction_ratio():
    params, x, y = problem()
    loss = loss_of("categorical")
    tagged = kfac.tag(loss, params, x, y)
    rule = kfac.damping.levenberg_marquardt(0.5, factor=0.9, interval=2)
    tx = kfac.kfac(tagged.layers, "auto", damping=rule)
    state, damping, judged = tx.init(params), 0.5, np.nan

    def ravel(tree):
        return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])

    @jax.jit
    def step(params, state):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        model = kfac.quadratic_model(tagged, params, x, y)
        d, state = tx.update(grads, state, params, statistics=statistics, model=model)
        return grads, d, state

    for t in range(6):
        grads, d, state = step(params, state)
        new = optax.apply_updates(params, d)
        v, g = ravel(d), ravel(grads)
        curvature = dense_ggn("categorical", params, x) + damping * np.eye(v.size)
        predicted = g @ v + 0.5 * v @ curvature @ v
        ratio = float(loss(new, x, y) - loss(params, x, y)) / predicted
        if t % 2 == 0:
            judged = ratio
            damping *= 0.9**2 if ratio > 0.75 else 1 if ratio >= 0.25 else 0.9**-2
        np.testing.assert_allclose(state.ratio, judged, rtol=1e-4)
        np.testing.assert_allclose(state.damping, damping, rtol=1e-5)
        params = new


@pytest.mark.parametrize(
    "ratio, change", [(0.9, 0.81), (0.5, 1.0), (0.1, 1 / 0.81), (np.nan, 1 / 0.81)]
)
def test_levenberg_marquardt_branches(ratio, change):
    rule = kfac.damping.levenberg_marquardt(1.0, factor=0.9, interval=2)
    new = rule.adjust(jnp.asarray(1.0), jnp.asarray(ratio))
    np.testing.assert_allclose(new, change)


def test_damping_stays_within_its_bounds():
    rule = kfac.damping.levenberg_marquardt(1.0, 0.5, 1, minimum=0.8, maximum=1.5)
    assert float(rule.adjust(jnp.asarray(1.0), jnp.asarray(1.0))) == 0.8
    assert float(rule.adjust(jnp.asarray(1.0), jnp.asarray(0.0))) == 1.5


@pytest.mark.parametrize(
    "values", [(0.0,), (1.0, 1.0), (1.0, 0.5, 0), (1.0, 0.5, 1, 2.0)]
)
def test_wrong_levenberg_marquardt(values):
    with pytest.raises(ValueError):
        kfac.damping.levenberg_marquardt(*values)


def test_model_is_asked_for_by_name():
    params, x, y = problem()
    tagged = kfac.tag(loss_of("normal"), params, x, y)
    tx = kfac.kfac(tagged.layers, "auto")
    _, grads, statistics = tagged.value_and_grad(params, x, y)
    with pytest.raises(ValueError, match="quadratic_model"):
        tx.update(grads, tx.init(params), params, statistics=statistics)


def test_unmarked_output_has_no_model():
    params, x, y = problem()

    def loss(params, x, y):
        return jnp.square(forward(params, x) - y).mean()

    tagged = kfac.tag(loss, params, x, y)
    with pytest.raises(ValueError, match=r"kfac\.categorical"):
        kfac.quadratic_model(tagged, params, x, y)


def test_bad_batch_changes_nothing_of_an_automatic_step():
    params, x, y = problem()
    tagged = kfac.tag(loss_of("categorical"), params, x, y)
    tx = kfac.kfac(tagged.layers, "auto", damping=kfac.damping.levenberg_marquardt(1.0))

    @jax.jit
    def step(params, state, x):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        model = kfac.quadratic_model(tagged, params, x, y)
        return tx.update(grads, state, params, statistics=statistics, model=model)

    _, state = step(params, tx.init(params), x)
    updates, after = step(params, state, x.at[0, 0].set(jnp.nan))
    assert all(not np.asarray(u).any() for u in jax.tree.leaves(updates))
    assert int(after.kfac.skipped) == 1
    same = after._replace(kfac=after.kfac._replace(skipped=state.kfac.skipped))
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(old, new)
