"""Matrix functions against numpy, with blocks small enough to be split."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kfac_jax_lite import linalg


def positive_definite(seed, blocks, d):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*blocks, d + 2, d))
    return np.swapaxes(x, -1, -2) @ x / d + 0.1 * np.eye(d)


blocked = jax.jit(linalg.spd_inverse, static_argnums=1)


@hypothesis.given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([(), (2,), (2, 3)]),
    d=st.integers(1, 17),
    leaf=st.integers(1, 6),
)
@hypothesis.settings(max_examples=10)
def test_blocked_inverse(seed, blocks, d, leaf):
    matrix = positive_definite(seed, blocks, d)
    inverse = np.asarray(blocked(matrix, leaf))
    wanted = np.linalg.inv(matrix)
    atol = 1e-10 * np.abs(wanted).max()
    np.testing.assert_allclose(inverse, wanted, rtol=0, atol=atol)
    np.testing.assert_allclose(inverse, np.swapaxes(inverse, -1, -2), rtol=0, atol=atol)


@pytest.mark.parametrize("d", [130, 300])
def test_the_leaf_that_is_chosen(d):
    """Sizes that are halved by default, in float32 too."""
    matrix = positive_definite(0, (), d)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-3)):
        inverse = linalg.spd_inverse(jnp.asarray(matrix, dtype))
        error = np.asarray(inverse, np.float64) @ matrix - np.eye(d)
        assert np.abs(error).max() < tolerance


@pytest.mark.parametrize(
    "size, padded", [(1, 16), (17, 32), (65, 128), (128, 128), (129, 256), (785, 896)]
)
def test_sizes_that_occur(size, padded):
    assert linalg.padded_size(size) == padded


@pytest.mark.parametrize("size, leaf", [(5, 128), (2048, 256), (8192, 1024)])
def test_blocks_that_are_factorised_at_once(size, leaf):
    assert linalg.leaf_size(size) == leaf


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_indefinite_matrix_has_no_inverse(place):
    matrix = np.eye(7)
    matrix[place, place] = -1.0
    assert np.isnan(np.asarray(linalg.spd_inverse(jnp.asarray(matrix), 2))).any()


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
