"""``inverse="low_rank"``: its solve against dense ones, and how its basis converges."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax_lite import eigenpairs, forms
from kfac_jax_lite.inverse import LowRankInverses
from kfac_jax_lite.precondition import solve_low_rank
from kfac_jax_lite.types import LayerTag
from tests.helpers import close

DAMPING = 1e-2


def factor(rng, form, blocks, size, rank):
    """``(shape, (u, e, tau), dense matrices [blocks, width, width])``."""
    if form == forms.DIAGONAL:
        values = rng.uniform(0, 2, (*blocks, size))
        return (*blocks, size), ((), values, ()), values[..., None] * np.eye(size)
    parts = 2 if form == forms.BLOCKS else 1
    lead = (*blocks, parts) if form == forms.BLOCKS else blocks
    q, _ = np.linalg.qr(rng.normal(size=(*lead, size, size)))
    u, e = q[..., :rank], rng.uniform(0, 2, (*lead, rank))
    tau = rng.uniform(0, 0.5, lead)
    kept = (u * e[..., None, :]) @ np.swapaxes(u, -1, -2)
    rest = np.eye(size) - u @ np.swapaxes(u, -1, -2)
    dense = kept + (tau[..., None, None] * rest if rank < size else 0)
    if form == forms.BLOCKS:
        whole = np.zeros((*blocks, parts * size, parts * size))
        for i in range(parts):
            part = slice(i * size, (i + 1) * size)
            whole[..., part, part] = dense[..., i, :, :]
        dense = whole
    shape = (*lead, size, size)
    return shape, (u, e, tau if rank < size else ()), dense


@hypothesis.settings(max_examples=16, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    kinds=st.tuples(*[st.sampled_from([forms.FULL, forms.BLOCKS, forms.DIAGONAL])] * 2),
    blocks=st.sampled_from([(), (2,)]),
    sizes=st.sampled_from([(5, 3), (3, 4)]),
    ranks=st.tuples(*[st.sampled_from([2, 5])] * 2),
    damping=st.sampled_from([1e-4, 0.1, 10.0]),
)
def test_the_solve_is_the_inverse(seed, kinds, blocks, sizes, ranks, damping):
    """``(Â ⊗ Ĝ + λ I)⁻¹ v`` against the matrix written out, for every form."""
    rng = np.random.default_rng(seed)
    ranks = [min(r, n) for r, n in zip(ranks, sizes, strict=True)]
    shapes, parts, dense = zip(
        *(factor(rng, *x) for x in zip(kinds, [blocks] * 2, sizes, ranks, strict=True)),
        strict=True,
    )
    layer = LayerTag("", "dense", (), *shapes, (), (), 0, "", *kinds)
    v = rng.normal(size=(*blocks, dense[0].shape[-1], dense[1].shape[-1]))
    inverse = LowRankInverses(*jax.tree.map(jnp.asarray, parts[0] + parts[1]))
    u = np.asarray(solve_low_rank(layer, jnp.asarray(v), inverse, jnp.array(damping)))
    wanted = np.empty_like(v)
    for i in np.ndindex(*blocks):
        matrix = np.kron(dense[0][i], dense[1][i]) + damping * np.eye(v[i].size)
        wanted[i] = np.linalg.solve(matrix, v[i].ravel()).reshape(v[i].shape)
    close(u, wanted, 1e-10)


# ------------------------------------------------------------------ the eigenpairs


def spectrum(rng, values):
    """``(M, Q)`` with these eigenvalues, largest first, and their eigenvectors."""
    q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return (q * values) @ q.T, q


def sine(u, v):
    """Sine of the largest angle from the subspace of ``v`` to that of ``u``."""
    return np.linalg.norm(v - u @ (u.T @ v), 2)


refresh = jax.jit(eigenpairs.refreshed)


def test_the_basis_turns_to_the_leading_eigenvectors(rng):
    """By ``e_{r+1} / e_k`` at each refresh, here by at least 0.7 for half of them."""
    size, rank = 60, 20
    values = 0.9 ** np.arange(size)
    matrix, q = spectrum(rng, values)
    u = eigenpairs.sketch(size, rank, jnp.float64)
    angles = []
    for i in range(8):
        u, e, tau = refresh(jnp.asarray(matrix), u, jnp.asarray(i == 0))
        np.testing.assert_allclose(u.T @ u, np.eye(rank), rtol=0, atol=1e-12)
        np.testing.assert_allclose(e.sum() + (size - rank) * tau, values.sum())
        angles.append(sine(np.asarray(u), q[:, : rank // 2]))
    assert angles[0] < 0.3
    assert angles[-1] < 0.7**7 * angles[0]
    np.testing.assert_allclose(e[: rank // 2], values[: rank // 2], rtol=1e-4)


def test_a_matrix_that_moves_is_followed(rng):
    """One step each: the angle stays small while the eigenvectors turn away."""
    size, rank = 40, 8
    values = np.where(np.arange(size) < rank, 1.0, 0.05)
    matrix, q = spectrum(rng, values)
    skew = rng.normal(size=(size, size)) / 200
    skew, eye = skew - skew.T, np.eye(size)
    turn = np.linalg.solve(eye - skew, eye + skew)
    u = eigenpairs.sketch(size, rank, jnp.float64)
    first = True
    for _ in range(12):
        u, _, _ = refresh(jnp.asarray(matrix), u, jnp.asarray(first))
        assert sine(np.asarray(u), q[:, :rank]) < 0.02
        matrix, q, first = turn @ matrix @ turn.T, turn @ q, False
    assert sine(np.asarray(eigenpairs.sketch(size, rank, float)), q[:, :rank]) > 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "name", ["zero", "rank_one", "rank_five", "steep", "dominant", "flat", "tiny"]
)
def test_hard_spectra(rng, name, dtype):
    """Always orthonormal, never below zero, eigenvalues to rounding of the largest."""
    size, rank = 80, 16
    place = np.arange(size)
    values = {
        "zero": 0.0 * place,
        "rank_one": 1e4 * (place < 1),
        "rank_five": 1.0 * (place < 5),
        "steep": 10.0 ** (-2 * np.minimum(place, 18)),
        "dominant": np.where(place < 1, 1e6, 1.0),
        "flat": 1.0 + 0 * place,
        "tiny": 1e-20 * 0.1 ** np.minimum(place, 10),
    }[name]
    matrix = jnp.asarray(spectrum(rng, values)[0], dtype)
    u, first = eigenpairs.sketch(size, rank, dtype), True
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    for _ in range(5):
        u, e, tau = refresh(matrix, u, jnp.asarray(first))
        assert u.dtype == e.dtype == tau.dtype == dtype
        np.testing.assert_allclose(u.T @ u, np.eye(rank), rtol=0, atol=tolerance)
        assert np.all(e >= 0)
        assert tau >= 0
        atol = tolerance * values[0]
        np.testing.assert_allclose(e, values[:rank], rtol=0, atol=atol)
        rest = values[rank:].mean()
        np.testing.assert_allclose(tau, rest, rtol=0, atol=atol)
        first = False


@pytest.mark.parametrize("fault", ["indefinite", "nan"])
def test_what_has_no_square_root_is_seen(fault):
    matrix = np.eye(20)
    matrix[3, 3] = -5.0 if fault == "indefinite" else np.nan
    u = eigenpairs.sketch(20, 4, jnp.float64)
    found = refresh(jnp.asarray(matrix), u, jnp.asarray(True))
    assert not all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("size", [8, 33, 200])
def test_the_first_guess_is_nearly_orthonormal(size):
    u = np.asarray(eigenpairs.sketch(size, max(1, size // 8), jnp.float64))
    np.testing.assert_allclose(np.sum(u * u, 0), 1, rtol=1e-12)
    values = np.linalg.svd(u, compute_uv=False)
    assert values.min() > 0.4
    assert abs(u.sum(0)).max() < 4.5  # no column is near the constant vector's
