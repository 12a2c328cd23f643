"""Matrix functions against numpy, with blocks small enough to be split."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kfac_jax_lite.core import linalg


def positive_definite(seed, blocks, d):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*blocks, d + 2, d))
    return np.swapaxes(x, -1, -2) @ x / d + 0.1 * np.eye(d)


def conditioned(seed, blocks, d, condition):
    """Eigenvalues from 1 down to the reciprocal of the condition number."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(*blocks, d, d)))
    return (q * np.geomspace(1, 1 / condition, d)) @ np.swapaxes(q, -1, -2)


blocked = jax.jit(linalg.spd_inverse, static_argnums=1)
mapped = jax.jit(jax.vmap(linalg.spd_inverse, (0, None)), static_argnums=1)


@hypothesis.given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([(), (2,), (2, 3)]),
    d=st.integers(1, 17),
    block=st.integers(1, 6),
)
@hypothesis.settings(max_examples=10)
def test_blocked_inverse(seed, blocks, d, block):
    matrix = positive_definite(seed, blocks, d)
    inverse = np.asarray(blocked(matrix, block))
    wanted = np.linalg.inv(matrix)
    atol = 1e-10 * np.abs(wanted).max()
    np.testing.assert_allclose(inverse, wanted, rtol=0, atol=atol)
    np.testing.assert_allclose(inverse, np.swapaxes(inverse, -1, -2), rtol=0, atol=atol)


@hypothesis.given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([(), (3,)]),
    d=st.integers(1, 300),
    condition=st.sampled_from([10.0, 1e4, 1e6]),
)
@hypothesis.settings(max_examples=8)
def test_the_blocks_that_are_chosen(seed, blocks, d, condition):
    """In float64 exact to rounding; in float32 about as good as LAPACK's Cholesky."""
    matrix = conditioned(seed, blocks, d, condition)
    wanted = np.linalg.inv(matrix)
    scale = np.abs(wanted).max()
    for function in (blocked, mapped) if blocks else (blocked,):
        found = np.asarray(function(jnp.asarray(matrix), linalg.BLOCK))
        assert np.abs(found - wanted).max() < 1e-12 * condition * scale
    single = matrix.astype(np.float32)
    wanted = np.linalg.inv(single.astype(np.float64))
    half = np.linalg.inv(np.linalg.cholesky(single))
    theirs = np.abs(np.swapaxes(half, -1, -2) @ half - wanted).max()
    ours = np.abs(np.asarray(blocked(jnp.asarray(single), linalg.BLOCK)) - wanted).max()
    assert ours < 30 * theirs + condition * 2e-8 * scale


@pytest.mark.parametrize("size", [1, 15, 64, 65, 129, 300, 785, 1000, 2049])
def test_blocks_waste_little(size):
    """Fewer rows are filled up than there are blocks."""
    width, count = linalg.block_size(size)
    assert width <= linalg.BLOCK and size <= width * count < size + count


@pytest.mark.parametrize("d, block", [(7, 2), (7, 128), (200, 128)])
@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf, -np.inf])
def test_what_has_no_inverse_is_seen(d, block, place, value):
    """Alone, and beside a matrix that has one."""
    broken = np.eye(d)
    broken[place, place] = value
    good = positive_definite(0, (), d)
    found = np.asarray(blocked(jnp.asarray(np.stack([broken, good])), block))
    assert np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], np.linalg.inv(good), rtol=1e-8, atol=1e-10)


def test_an_indefinite_matrix_with_a_positive_diagonal():
    matrix = np.eye(300)
    matrix[0, 299] = matrix[299, 0] = 1.5
    assert np.isnan(blocked(jnp.asarray(matrix), linalg.BLOCK)).any()


@pytest.mark.parametrize("form", ["plain", "mapped", "stacked", "twice"])
def test_eigenpairs_one_by_one(form):
    """The same as numpy's for every way of adding leading axes."""
    matrices = positive_definite(1, (2, 3), 5)
    function = {
        "plain": linalg.eigh,
        "mapped": jax.vmap(jax.vmap(linalg.eigh)),
        "stacked": jax.vmap(linalg.eigh),
        "twice": jax.vmap(linalg.eigh, 1, 1),
    }[form]
    values, vectors = jax.jit(function)(jnp.asarray(matrices))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), rtol=1e-10)
    again = (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    np.testing.assert_allclose(again, matrices, atol=1e-10)


def test_eigenpairs_can_be_differentiated(rng):
    """Both modes, against JAX's own."""
    matrix = jnp.asarray(positive_definite(2, (2,), 4))
    weights = jnp.asarray(rng.normal(size=(2, 4, 4)))

    def value(function, matrix):
        values, vectors = function(matrix)
        return jnp.sum(weights * vectors**2) + jnp.sum(weights[:, 0] * values)

    for derivative in (jax.grad, jax.jacfwd):
        found, wanted = (
            derivative(value, 1)(f, matrix) for f in (linalg.eigh, jnp.linalg.eigh)
        )
        np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_an_iteration_that_ends_too_early_is_no_inverse(rng):
    x = rng.normal(size=(5, 5))
    matrix = jnp.asarray(x @ x.T + 1e-3 * np.eye(5))
    start = jnp.zeros_like(matrix)
    early = linalg.newton_schulz_inverse(matrix, start, 1e-10, max_iterations=2)
    assert np.isnan(early).all()
    whole = linalg.newton_schulz_inverse(matrix, start, 1e-10)
    np.testing.assert_allclose(whole, np.linalg.inv(matrix), rtol=1e-6)


@pytest.mark.parametrize(
    ("new", "old", "change"),
    [
        ((3.0, 4.0), (0.0, 1.0), 3 * 2**0.5),
        ((1.0,), (0.0,), linalg.LARGEST),
        ((0.0,), (0.0,), 0),
    ],
)
def test_relative_change(new, old, change):
    found = linalg.relative_change(jnp.asarray(new), jnp.asarray(old))
    np.testing.assert_allclose(found, change)
