"""Explicit inverses of several sizes in one program, against numpy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from kfac_jax_lite.kronecker.factors import FULL
from kfac_jax_lite.optimizer.inversions import (
    FILLED_UP,
    SMALL,
    Place,
    alike_in_size,
    inverted_together,
)
from tests.helpers import spd


def place(number, matrix, gate=True):
    """One stack of a single layer whose factor is that matrix."""
    return Place(number, 0, FULL, jnp.asarray(matrix)[None], jnp.asarray([gate]))


@hypothesis.given(sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=9))
def test_matrices_are_filled_up_by_little(sizes):
    """Every matrix is in one group; large ones grow by an eighth at most."""
    shapes = [jax.ShapeDtypeStruct((1, d, d), "float32") for d in sizes]
    places = [Place(i, 0, FULL, x, None) for i, x in enumerate(shapes)]
    groups = alike_in_size(places)
    assert sorted(p.stack for group in groups for p in group) == [*range(len(sizes))]
    for group in groups:
        largest = group[0].factor.shape[-1]
        for p in group:
            assert p.factor.shape[-1] <= largest
            assert largest <= max(64, FILLED_UP * p.factor.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def inverses(numbers, factors, gates):
    pairs = zip(numbers, factors, gates, strict=True)
    found = inverted_together([Place(i, 0, FULL, x, g) for i, x, g in pairs])
    return [found[i, 0] for i in numbers]


def test_several_sizes_at_once(rng):
    """Small ones all at once; large ones one by one, where they are wanted."""
    for sizes in ((5, 3, 1), (SMALL + 8, SMALL + 2, SMALL + 8)):
        places = [place(i, spd(rng, d), i != 1) for i, d in enumerate(sizes)]
        found = inverses(
            tuple(range(3)), [p.factor for p in places], [p.gate for p in places]
        )
        for p, x in zip(places, found, strict=True):
            if p.stack != 1:
                np.testing.assert_allclose(x, np.linalg.inv(p.factor), atol=1e-8)


def test_what_is_not_positive_spoils_no_other(rng):
    """A failed inversion in a program of several is that layer's alone."""
    good, bad = spd(rng, 4), -np.eye(3)
    places = [place(0, good), place(1, bad)]
    found = inverses((0, 1), [p.factor for p in places], [p.gate for p in places])
    np.testing.assert_allclose(found[0][0], np.linalg.inv(good), atol=1e-10)
    assert np.isnan(found[1]).any()


def test_a_program_grows_with_sizes_and_not_with_layers():
    """Loops of a step with twelve layers of two widths are those of one with three."""

    def loops(count):
        widths = [70, *[70, 72] * count]
        params = [jnp.ones((a, b)) for a, b in zip(widths, widths[1:], strict=False)]

        def loss(p, x):
            for w in p:
                x = jnp.tanh(x @ w)
            return jnp.mean(jnp.sum(kfac.normal(x) ** 2, -1))

        tagged = kfac.tag(loss, params, jnp.ones((4, 70)))
        tx = kfac.scale_by_kfac(tagged.layers)
        state = jax.eval_shape(tx.init, params)
        statistics = jax.eval_shape(tagged.value_and_grad, params, jnp.ones((4, 70)))[2]
        update = jax.jit(lambda g, s, x: tx.update(g, s, statistics=x))
        lowered = update.trace(params, state, statistics).lower()
        return lowered.as_text().count("stablehlo.dot_general")

    products = [loops(2), loops(4)]
    # Two products of the direction for each of four more layers, and no others.
    assert products[1] - products[0] == 2 * 4
