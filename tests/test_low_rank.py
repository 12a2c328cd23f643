"""``inverse="low_rank"``: its solve against dense ones, and how its basis converges."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite import forms, low_rank
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


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    kinds=st.tuples(*[st.sampled_from([forms.FULL, forms.BLOCKS, forms.DIAGONAL])] * 2),
    blocks=st.sampled_from([(), (2,)]),
    sizes=st.sampled_from([(5, 3), (3, 4), (1, 5)]),
    ranks=st.tuples(*[st.sampled_from([1, 2, 5])] * 2),
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
