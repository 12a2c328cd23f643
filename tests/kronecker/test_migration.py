"""The factors between dampings that the migration guides give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from experiments.benchmarks.common import import_peer


def moments(rows):
    """Mean of the outer products of rows ``[..., d]``, as kfac-pytorch has them."""
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


def with_one(rows):
    return jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1))], -1)


def their_factors(apply, x, shape, inputs, params, positions=1):
    """Factors of a layer with inputs ``inputs`` whose output is moved by ``shape``."""
    labels = jnp.arange(len(x)) % 3

    def loss(params, x, labels, moved=0.0):
        logits = kfac.categorical(apply(params, x, moved))
        named = labels if logits.ndim == 2 else labels[:, None].repeat(5, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, named).mean()

    c = jax.grad(loss, 3)(params, x, labels, jnp.zeros(shape))
    tagged = kfac.tag(loss, params, x, labels)
    layer = next(layer for layer in tagged.layers if "['w']" in layer.params)
    ours = tagged.value_and_grad(params, x, labels)[2][layer.name]
    return ours, moments(with_one(inputs) / positions), moments(c / positions)


@pytest.mark.parametrize(
    ("case", "factor"),
    [("plain", 6**2), ("tokens", 30**2), ("positions", 6**2 * 5)],
)
def test_factor_of_kfac_pytorch(case, factor):
    """``s`` of the page: their curvature is ours over ``s``."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 5, 4))
    x = x[:, 0] if case == "plain" else x
    params = {"w": jax.random.normal(keys[1], (4, 7)), "b": jnp.zeros(7)}
    params["v"] = jax.random.normal(keys[2], (7, 3))

    def apply(params, x, moved):
        h = jnp.tanh(x @ params["w"] + params["b"] + moved)
        return (h.mean(1) if case == "positions" else h) @ params["v"]

    ours, a, g = their_factors(apply, x, (*x.shape[:-1], 7), x, params)
    np.testing.assert_allclose(np.kron(ours.a, ours.g), factor * np.kron(a, g))


def test_factor_of_kfac_pytorch_in_convolutions():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 4, 4, 2))
    params = {"w": jax.random.normal(keys[1], (3, 3, 2, 4)), "b": jnp.zeros(4)}
    params["v"] = jax.random.normal(keys[2], (4, 3))
    layout = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def apply(params, x, moved):
        z = jax.lax.conv_general_dilated(x, params["w"], (1, 1), **layout)
        return jnp.tanh(z + params["b"] + moved).mean((1, 2)) @ params["v"]

    patches = jax.lax.conv_general_dilated_patches(x, (3, 3), (1, 1), **layout)
    ours, a, g = their_factors(apply, x, (6, 4, 4, 4), patches, params, positions=16)
    seen = np.trace(ours.a) * np.trace(ours.g), np.trace(a) * np.trace(g)
    np.testing.assert_allclose(seen[0], 6**2 * 16**5 * seen[1])


def classifier(register):
    """A loss of a network that sees 5 positions of an example, its output marked."""

    def loss(params, x, labels):
        hidden = jnp.tanh(x @ params["w"] + params["b"]).mean(1)
        logits = register(hidden @ params["v"], labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


@pytest.mark.parametrize(
    ("mode", "fisher", "factor"),
    [("fisher_exact", "exact", 1), ("fisher_empirical", "empirical", 6)],
)
def test_factor_of_kfac_jax(mode, fisher, factor):
    """Its curvature is ours over the number of terms, or ours."""
    peer, missing = import_peer()
    if peer is None:
        pytest.skip(f"kfac-jax: {missing}")

    def register(logits, labels):
        peer.register_softmax_cross_entropy_loss(logits, labels)
        return logits

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (4, 5)), "b": jnp.zeros(5)}
    params["v"] = jax.random.normal(keys[1], (5, 3))
    batch = jax.random.normal(keys[2], (6, 5, 4)), jnp.arange(6) % 3
    arguments = (params, *batch)
    tagged = kfac.tag(
        classifier(lambda z, _: kfac.categorical(z)), *arguments, fisher=fisher
    )
    found = tagged.value_and_grad(*arguments)[2].values()
    ours = [np.trace(s.a) * np.trace(s.g) for s in found]
    estimator = peer.BlockDiagonalCurvature(
        func=classifier(register), default_estimation_mode=mode
    )
    estimator.finalize(arguments)
    key = jax.random.key(0)
    state = estimator.init(key, arguments, set(), set())
    state = estimator.update_curvature_matrix_estimate(
        state, 0.0, 1.0, 0.0, 6, key, arguments, mode
    )
    theirs = map(np.trace, estimator.to_diagonal_block_dense_matrix(state))
    np.testing.assert_allclose(sorted(ours), factor * np.array(sorted(theirs)))
