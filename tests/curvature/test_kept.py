"""Products with kept blocks are compiled once, and keys of batches made once."""

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.curvature import operator
from kfac_jax_lite.curvature.blocks import DensePart, KroneckerPart
from kfac_jax_lite.curvature.operator import Kept
from tests.helpers import random_like
from tests.information import MODELS, Problem


def make_kept(rng):
    """A Kronecker block on ``w [3, 4]``, a dense one on ``b [2]``; and the matrix."""
    a, g, m = (rng.normal(size=(1, n, n)) for n in (3, 4, 2))
    places = np.arange(2, 14).reshape(1, 3, 4), np.arange(2)[None]
    parts = [
        KroneckerPart(jnp.asarray(places[0]), jnp.asarray(a), jnp.asarray(g)),
        DensePart(jnp.asarray(places[1]), jnp.asarray(m)),
    ]
    dense = np.zeros((14, 14))
    dense[:2, :2], dense[2:, 2:] = m[0], np.kron(a[0], g[0].T)
    return Kept(parts, 14), dense


def test_operators_with_equal_shapes_share_programs(rng):
    v = random_like(rng, {"b": np.zeros(2), "w": np.zeros((3, 4))})
    flat = np.r_[v["b"], np.ravel(v["w"])]
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), v)
    programs = operator.kept_product, operator.kept_products
    sizes = []
    for _ in range(3):
        kept, dense = make_kept(rng)
        image = kept.mv(v)
        wanted = dense @ flat
        np.testing.assert_allclose(image["b"], wanted[:2], rtol=1e-10)
        np.testing.assert_allclose(np.ravel(image["w"]), wanted[2:], rtol=1e-10)
        for chunk in (None, 2):
            images = kept.mm(many, chunk)
            for i, factor in enumerate((1, 2, -1)):
                row = np.r_[images["b"][i], np.ravel(images["w"][i])]
                np.testing.assert_allclose(row, factor * wanted, rtol=1e-10)
        sizes.append([program._cache_size() for program in programs])
    assert sizes[0] == sizes[1] == sizes[2]


def test_keys_of_batches_are_made_once(rng, monkeypatch):
    """They are those of ``fold_in``, and products make no others."""
    problem = Problem(MODELS["mlp"], (2, 3))
    op = problem.operator("mc_fisher", "full")
    for number in range(2):
        wanted = jax.random.fold_in(op.stream.key, number)
        assert (op.stream.batch_key(number) == wanted).all()
    v = random_like(rng, problem.params)
    first = op.mv(v)

    def refuse(*_):
        raise AssertionError("a key was made")

    monkeypatch.setattr(jax.random, "fold_in", refuse)
    jax.tree.map(np.testing.assert_array_equal, op.mv(v), first)
