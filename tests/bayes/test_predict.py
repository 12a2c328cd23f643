"""Predictions over draws against sums by hand over the same draws."""

import dataclasses
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kfac_jax_lite.bayes import posterior
from kfac_jax_lite.bayes.predictive import predict, predict_each

LINKS = {
    "categorical": lambda z: scipy.special.softmax(z, -1),
    "bernoulli": scipy.special.expit,
    "normal": lambda z: z,
}
KEY = jax.random.key(3)


class Cloud(NamedTuple):
    """A posterior of independent normals around the mean; a tree of arrays."""

    deviation: jax.Array

    def draw(self, params, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            tree,
            [
                leaf + self.deviation * jax.random.normal(k, leaf.shape, leaf.dtype)
                for leaf, k in zip(leaves, keys, strict=True)
            ],
        )


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A posterior that is no tree of arrays."""

    deviation: float

    def draw(self, params, key):
        return Cloud(jnp.asarray(self.deviation)).draw(params, key)


def network(weights, x):
    """A linear network with bias."""
    return x @ weights["w"] + weights["b"]


def problem(n=7, outputs=3):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, outputs)), "b": rng.normal(size=outputs)}
    return jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(n, 4)))


def by_hand(params, x, likelihood, num_samples, deviation=0.5):
    """Every draw's prediction in numpy."""
    cloud, found = Cloud(jnp.asarray(deviation)), []
    for key in jax.random.split(KEY, num_samples):
        weights = cloud.draw(params, key)
        z = np.asarray(x) @ np.asarray(weights["w"]) + np.asarray(weights["b"])
        found.append(LINKS[likelihood](z))
    return np.stack(found)


@hypothesis.given(
    st.sampled_from([1, 7]), st.sampled_from([None, 1, 3, 9]), st.sampled_from([*LINKS])
)
def test_each_and_mean_are_sums_by_hand(n, batch_size, likelihood):
    params, x = problem(n)
    state = Cloud(jnp.asarray(0.5))
    wanted = by_hand(params, x, likelihood, 3)
    options = {"likelihood": likelihood, "batch_size": batch_size}
    each = predict_each(network, state, params, x, KEY, 3, **options)
    np.testing.assert_allclose(each, wanted, rtol=1e-12)
    found = predict(network, state, params, x, KEY, 3, **options)
    if likelihood == "normal":
        np.testing.assert_allclose(found.variance, wanted.var(0) + 1, rtol=1e-12)
        found = found.mean
    np.testing.assert_allclose(found, wanted.mean(0), rtol=1e-12)


def test_total_variance_is_exact_and_stable():
    """Linear in the weights: ``x² s² + variance``; a large mean costs no digits."""
    params = {"w": jnp.full((1, 1), 3.0), "b": jnp.zeros(1)}
    x, deviation = jnp.array([[0.0], [1.0], [2.0]]), 0.5
    state = Cloud(jnp.asarray(deviation))
    noise = 0.25
    found = predict(
        network, state, params, x, KEY, 1500, likelihood="normal", variance=noise
    )
    wanted = deviation**2 * (1 + np.asarray(x) ** 2) + noise
    np.testing.assert_allclose(found.variance, wanted, rtol=0.15)
    np.testing.assert_allclose(found.mean, 3 * x, atol=0.1)
    far = jax.tree.map(lambda p: (p + 1e4).astype(jnp.float32), params)
    moved = predict(
        network,
        Cloud(jnp.float32(deviation)),
        far,
        x.astype(jnp.float32),
        KEY,
        200,
        likelihood="normal",
        variance=0.0,
    )
    near = by_hand(far, x, "normal", 200, jnp.float32(deviation)).var(0)
    np.testing.assert_allclose(moved.variance, near, rtol=0.02)


def test_variance_broadcasts():
    params, x = problem(5, 2)
    noise = np.arange(10.0).reshape(5, 2)
    found = predict(network, None, params, x, likelihood="normal", variance=noise)
    np.testing.assert_allclose(found.variance, noise)


@pytest.mark.parametrize("state", [None, Cloud(jnp.asarray(0.5))], ids=str)
def test_without_draws_the_mean_predicts(state):
    params, x = problem()
    number = 32 if state is None else 0
    wanted = LINKS["categorical"](np.asarray(network(params, x)))
    found = predict(network, state, params, x, num_samples=number, batch_size=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    each = predict_each(network, state, params, x, num_samples=number)
    np.testing.assert_allclose(each, wanted[None], rtol=1e-12)


def test_draws_are_those_of_sample():
    params, x = problem()
    state = Cloud(jnp.asarray(0.5))
    first = posterior.sample(state, params, jax.random.split(KEY, 2)[0])
    each = predict_each(network, state, params, x, KEY, 2, likelihood="normal")
    np.testing.assert_allclose(each[0], network(first, x), rtol=1e-12)
    assert not np.allclose(each[0], each[1])


def test_states_of_any_kind():
    """A posterior inside an optax state, or one that is no tree of arrays."""
    params, x = problem()
    cloud = Cloud(jnp.asarray(0.5))
    wanted = predict(network, cloud, params, x, KEY, 3)
    inside = (optax.EmptyState(), {"inner": cloud}, optax.sgd(0.1, 0.9).init(params))
    for state in (inside, Opaque(0.5)):
        found = predict(network, state, params, x, KEY, 3)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_trees_of_inputs_and_numpy_inputs():
    params, x = problem(5)
    tree = {"first": np.asarray(x)[:, :2], "second": np.asarray(x)[:, 2:]}

    def joined(weights, inputs):
        return network(weights, jnp.concatenate([*inputs.values()], -1))

    state = Cloud(jnp.asarray(0.5))
    wanted = predict(network, state, params, x, KEY, 3)
    found = predict(joined, state, params, tree, KEY, 3, batch_size=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_one_program_for_all_batches_and_draws():
    traced = []

    def counted(weights, x):
        traced.append(x.shape)
        return network(weights, x)

    params, x = problem(7)
    state = Cloud(jnp.asarray(0.5))
    predict(counted, state, params, x, KEY, 4, batch_size=3)
    assert set(traced) == {(3, 4)}
    number = len(traced)
    assert number <= 2  # once for the shape of the output, once to compile
    predict(counted, state, params, x[:5], jax.random.key(1), 4, batch_size=3)
    assert traced[number:] in ([], [(3, 4)])


def test_half_precision_is_averaged_in_float32():
    params, x = problem()
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    state = Cloud(jnp.asarray(0.5, jnp.bfloat16))
    found = predict(network, state, low, x.astype(jnp.bfloat16), KEY, 5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_a_bar_changes_nothing():
    params, x = problem()
    state = Cloud(jnp.asarray(0.5))
    wanted = predict(network, state, params, x, KEY, 3)
    found = predict(network, state, params, x, KEY, 3, progress=True)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood is 'poisson'; wanted one of categ"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"key": None}, "draws of the weights want a key"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"inputs": {}}, "of no array"),
        ({"inputs": jnp.float32(1)}, r"got shapes \(\)"),
        ({"inputs": {"a": jnp.ones((2, 1)), "b": jnp.ones(3)}}, r"\(2, 1\), \(3,\)"),
        ({"apply_fn": lambda w, x: x.sum()}, r"shape \(\) for 7 inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_values_are_told(options, message):
    params, x = problem()
    given = {"apply_fn": network, "state": Cloud(jnp.asarray(0.5)), "params": params}
    given |= {"inputs": x, "key": KEY} | options
    for function in (predict, predict_each):
        with pytest.raises(ValueError, match=message):
            function(**given)
