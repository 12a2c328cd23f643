"""Lanczos and eigenpairs against dense decompositions, in float64 unless said."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from kfac_jax_lite.curvature import spectra
from tests.spectra import Matrix, matrix_of, spectra_lists

KEY = jax.random.key(0)


def order(values, which):
    """The values in the order of ``eigsh``, those wanted most first."""
    key = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    return values[np.argsort(key)]


# ------------------------------------------------------------- Lanczos


@hypothesis.given(spectra_lists(), st.sampled_from([1, 5, 30]), st.integers(0, 99))
def test_lanczos_tridiagonalises(values, steps, seed):
    matrix = matrix_of(values, seed)
    found = spectra.lanczos(matrix.mv, matrix.like, steps, jax.random.key(seed))
    q = matrix.flat(found.basis, 1)
    m = len(found.alphas)
    assert q.shape == (m, matrix.size) and m <= min(steps, matrix.size)
    np.testing.assert_allclose(q @ q.T, np.eye(m), atol=1e-10)
    t = np.diag(found.alphas) + np.diag(found.betas, 1) + np.diag(found.betas, -1)
    np.testing.assert_allclose(q @ matrix.dense @ q.T, t, atol=1e-10)
    rest = matrix.dense @ q.T - q.T @ t
    np.testing.assert_allclose(rest[:, :-1], 0, atol=1e-10)
    norm = np.linalg.norm(rest[:, -1])
    np.testing.assert_allclose(norm, found.remainder, atol=1e-10)


@pytest.mark.parametrize(
    "values, steps",
    [(np.ones(9), 1), (np.zeros(9), 1), (np.r_[3.0, 2, np.zeros(20)], 3)],
    ids=["identity", "zero", "low rank"],
)
def test_lanczos_stops_where_the_space_is_invariant(values, steps):
    matrix = matrix_of(values)
    found = spectra.lanczos(matrix.mv, matrix.like, 8, KEY)
    assert len(found.alphas) == steps and found.remainder == 0


def test_lanczos_from_a_given_start(rng):
    """The first column is the start, normalised."""
    matrix = matrix_of(rng.normal(size=12))
    start = rng.normal(size=12)
    given = matrix.tree(start)
    found = spectra.lanczos(matrix.mv, matrix.like, 4, KEY, start=given)
    first = matrix.flat(found.basis, 1)[0]
    np.testing.assert_allclose(first, start / np.linalg.norm(start), atol=1e-12)


def test_lanczos_refuses_what_is_not_symmetric(rng):
    matrix = Matrix(rng.normal(size=(20, 20)))
    with pytest.raises(ValueError, match="not symmetric"):
        spectra.lanczos(matrix.mv, matrix.like, 10, KEY)


# ------------------------------------------------------------ eigsh


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.data(), spectra_lists(), st.integers(0, 99))
def test_eigsh_is_eigh(data, values, seed):
    """Any k up to P, any spectrum, any number of vectors, all three ends."""
    size = len(values)
    k = data.draw(st.integers(1, size))
    which = data.draw(st.sampled_from(["largest", "smallest", "magnitude"]))
    room = data.draw(st.sampled_from([min(k + 2, size), min(2 * k + 4, size), size]))
    matrix = matrix_of(values, seed)
    found = spectra.eigsh(
        matrix.mv, matrix.like, k, jax.random.key(seed), which=which, num_vectors=room,
        max_products=4000,
    )  # fmt: skip
    scale = max(np.abs(values).max(), 1e-30)
    wanted = order(np.linalg.eigvalsh(matrix.dense), which)[:k]
    if which == "magnitude":  # ±x may come in either order
        found_, wanted = np.abs(found.values), np.abs(wanted)
    else:
        found_, wanted = found.values, np.sort(wanted)[::-1]
    np.testing.assert_allclose(found_, wanted, atol=1e-6 * scale)
    vectors = matrix.flat(found.vectors, 1)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-10)
    errors = vectors @ matrix.dense - found.values[:, None] * vectors
    np.testing.assert_allclose(
        np.linalg.norm(errors, axis=1), found.residuals, atol=1e-12
    )
    assert (found.residuals <= 1e-6 * scale).all()


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_eigsh_of_a_spectrum_like_a_hessian(method, which, rng):
    """A few large eigenvalues, some negative, a bulk around zero; P = 200."""
    values = np.r_[20.0, 11, 10.9, 6, -8, -3, -2.5, rng.normal(size=193) * 0.3]
    matrix = matrix_of(values)
    found = spectra.eigsh(
        matrix.traced, matrix.like, 3, KEY, method, which=which, tol=1e-9
    )
    wanted = order(values, which)[:3]
    wanted = wanted if which == "magnitude" else np.sort(wanted)[::-1]
    np.testing.assert_allclose(found.values, wanted, rtol=1e-9)
    assert (found.residuals < 1e-7).all()


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_eigsh_finds_repeated_eigenvalues(copies, rng):
    """A Krylov space holds one vector of each; looking again finds the others."""
    values = np.r_[np.full(copies, 5.0), 4.0, 3.0, rng.uniform(0, 1, 150)]
    matrix = matrix_of(values)
    found = spectra.eigsh(matrix.mv, matrix.like, copies + 1, KEY)
    np.testing.assert_allclose(found.values, [5.0] * copies + [4.0], rtol=1e-8)


@pytest.mark.parametrize("which, arpack", [("largest", "LA"), ("smallest", "SA")])
def test_eigsh_is_arpack(which, arpack, rng):
    """No gaps at all: the ends of a random matrix's spectrum, P = 300."""
    values = np.sort(rng.normal(size=300))
    matrix = matrix_of(values)
    found = spectra.eigsh(matrix.mv, matrix.like, 4, KEY, which=which)
    theirs = scipy.sparse.linalg.eigsh(matrix.dense, 4, which=arpack)[0]
    np.testing.assert_allclose(found.values, np.sort(theirs)[::-1], atol=1e-8)


def test_eigsh_says_how_far_it_came(rng):
    """Too few products: residuals are large, and are the true ones."""
    matrix = matrix_of(rng.normal(size=100))
    calls = []
    found = spectra.eigsh(
        matrix.mv, matrix.like, 3, KEY, max_products=8,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(i, 11) for i in range(1, 12)]
    assert (found.residuals > 0.01).all()
    for value, residual in zip(found.values, found.residuals, strict=True):
        gap = np.abs(np.linalg.eigvalsh(matrix.dense) - value).min()
        assert gap <= residual


def test_eigsh_in_float32(rng):
    values = np.r_[9.0, -7, 5, rng.normal(size=150) * 0.1]
    matrix = matrix_of(values, dtype=np.float32)
    found = spectra.eigsh(matrix.mv, matrix.like, 3, KEY, which="magnitude", tol=1e-5)
    assert jax.tree.leaves(found.vectors)[0].dtype == np.float32
    np.testing.assert_allclose(found.values, [9, -7, 5], rtol=1e-5)
    vectors = matrix.flat(found.vectors, 1)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-5)


# ------------------------------------------------------------ bad input


def test_errors_say_what_was_seen(rng):
    matrix = matrix_of(rng.normal(size=10))
    mv, like = matrix.mv, matrix.like
    with pytest.raises(ValueError, match="method is 'power', wanted"):
        spectra.eigsh(mv, like, 2, KEY, "power")
    with pytest.raises(ValueError, match="which is 'LA', wanted"):
        spectra.eigsh(mv, like, 2, KEY, which="LA")
    with pytest.raises(ValueError, match="k is 11, wanted at most P = 10"):
        spectra.eigsh(mv, like, 11, KEY)
    with pytest.raises(ValueError, match="k is 0, wanted an integer of at least 1"):
        spectra.eigsh(mv, like, 0, KEY)
    with pytest.raises(ValueError, match="num_vectors is 3, wanted .* at least 5"):
        spectra.eigsh(mv, like, 3, KEY, num_vectors=3)
    with pytest.raises(ValueError, match="max_products is 2, wanted .* at least 3"):
        spectra.eigsh(mv, like, 3, KEY, max_products=2)
    with pytest.raises(ValueError, match="more than 5 k = 10 .* there are 10"):
        spectra.eigsh(mv, like, 2, KEY, "lobpcg")
    with pytest.raises(ValueError, match="cannot be traced"):
        spectra.eigsh(mv, like, 1, KEY, "lobpcg")
    with pytest.raises(ValueError, match="num_steps is 0"):
        spectra.lanczos(mv, like, 0, KEY)
    zero = matrix.tree(np.zeros(10))
    with pytest.raises(ValueError, match="start vector is zero"):
        spectra.lanczos(mv, like, 2, KEY, start=zero)


def test_trees_that_do_not_fit(rng):
    matrix = matrix_of(rng.normal(size=10))
    like = matrix.like
    with pytest.raises(ValueError, match=r"\['w'\] is int32, wanted float32"):
        spectra.lanczos(matrix.mv, {"w": jnp.zeros(3, jnp.int32)}, 2, KEY)
    with pytest.raises(ValueError, match="no parameters"):
        spectra.lanczos(matrix.mv, {"w": jnp.zeros(0)}, 2, KEY)
    with pytest.raises(ValueError, match="returned the structure"):
        spectra.lanczos(lambda v: v["a"], like, 2, KEY)
    with pytest.raises(ValueError, match=r"returned a leaf of shape \(2,\), wanted"):
        spectra.lanczos(lambda v: jax.tree.map(lambda x: v["a"]["x"][:2], v), like, 2, KEY)  # fmt: skip # noqa: E501
    with pytest.raises(FloatingPointError, match="not finite"):
        spectra.eigsh(lambda v: jax.tree.map(lambda x: x * np.nan, v), like, 2, KEY)


def test_bare_arrays_and_mixed_dtypes(rng):
    """A tree may be one array; float32 leaves beside float64 ones stay float32."""
    values = np.r_[5.0, 3, rng.uniform(0, 1, 10)]
    matrix = matrix_of(values)
    found = spectra.eigsh(lambda v: matrix.dense @ v, np.zeros(12), 2, KEY)
    np.testing.assert_allclose(found.values, [5, 3], rtol=1e-8)
    seen = []

    def mv(tree):
        seen.append({leaf.dtype.name for leaf in tree})
        image = matrix.dense @ np.concatenate(tree)
        return image[:4], image[4:]

    like = np.zeros(4, np.float32), np.zeros(8)
    found = spectra.eigsh(mv, like, 2, KEY, tol=1e-4)
    assert seen[0] == {"float32", "float64"}
    np.testing.assert_allclose(found.values, [5, 3], rtol=1e-6)
