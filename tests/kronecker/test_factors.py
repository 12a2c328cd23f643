"""Diagonal and block-diagonal factors act as the dense matrices they stand for."""

import functools
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import kfac_jax_lite as kfac
from kfac_jax_lite.kronecker import factors as forms
from tests import models, oracles, programs
from tests.helpers import INVERSES, cases, close, first_pass, kfac_state, leaves, spd


def restricted(matrix, form, shape):
    """The dense matrix that a factor of that form and shape keeps."""
    size = len(matrix)
    if form.name == "diagonal":
        return np.diag(np.diag(matrix))
    if form.name == "full":
        return matrix
    block = np.arange(size) // shape[-1]
    return np.where(block[:, None] == block, matrix, 0)


def stored(matrix, form, shape):
    """A dense matrix as the library stores it."""
    if form.name == "diagonal":
        return np.diag(matrix)
    if form.name == "full":
        return matrix
    k, s, _ = shape
    wide = np.zeros((k * s, k * s))
    wide[: len(matrix), : len(matrix)] = matrix
    return np.stack([wide[i * s : (i + 1) * s, i * s : (i + 1) * s] for i in range(k)])


CASES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))


@given(CASES)
def test_the_form_fits(case):
    size, limit, _ = case
    form = forms.form_for(size, limit)
    shape = form.shape((2,), size, limit)
    assert (form.name == "full") == (size <= limit)
    assert (form.name == "diagonal") == (size > 4 * limit)
    if form.name == "block_diagonal":
        _, k, s, _ = shape
        assert s <= limit and (k - 1) * s < size <= k * s


@given(CASES)
def test_second_moment(case):
    size, limit, seed = case
    form = forms.form_for(size, limit)
    shape = form.shape((), size, limit)
    x = np.random.default_rng(seed).normal(size=(4, size))
    seen = form.second_moment(jnp.asarray(x), shape)
    close(seen, stored(x.T @ x, form, shape))
    mean = form.mean_diagonal(seen, size)
    close(mean, np.trace(x.T @ x) / size)


@given(CASES)
def test_products_and_inverses(case):
    size, limit, seed = case
    rng = np.random.default_rng(seed)
    form = forms.form_for(size, limit)
    shape = form.shape((), size, limit)
    whole = spd(rng, size)
    factor, dense = stored(whole, form, shape), restricted(whole, form, shape)
    factor, wide = jnp.asarray(factor), form.width(shape)
    x = rng.normal(size=(3, size))
    rows = forms.widened(jnp.asarray(x), wide)
    close(form.times(rows, factor)[:, :size], x @ dense)
    close(form.columns(factor, rows.T)[:size], dense @ x.T)
    damped = form.damped(factor, jnp.asarray(0.3))
    inverse = form.inverse(damped)
    wanted = np.linalg.inv(dense + 0.3 * np.eye(size))
    close(form.times(rows, inverse)[:, :size], x @ wanted)
    q, d = form.eigh(factor)
    back = form.transposed(q)
    again = form.times(form.times(rows, q) * d, back)
    close(again[:, :size], x @ dense)


def dense_factor(matrix, form, shape):
    """A stored factor as one dense matrix."""
    matrix = np.asarray(matrix)
    if form.name == "diagonal":
        return np.diag(matrix)
    if form.name == "full":
        return matrix
    k, s, _ = shape
    wide = np.zeros((k * s, k * s))
    for i in range(k):
        wide[i * s : (i + 1) * s, i * s : (i + 1) * s] = matrix[i]
    return wide


BOUNDED = [(limit, inverse) for limit in (1, 3) for inverse in INVERSES]
FAST = [(3, inverse) for inverse in INVERSES] + [(1, "cholesky")]


@pytest.mark.parametrize(("limit", "inverse"), cases(BOUNDED, FAST))
def test_layers_with_a_bound_on_their_factors(limit, inverse):
    """``[5, 5] ⊗ [5, 5]`` with blocks of 3 (3 + 2), and with diagonals."""
    name, damping = "mlp", 0.05
    model = models.BY_NAME[name]
    args = (model.params(), *model.batch(4))
    tagged = model.tag(4, max_factor_dim=limit)
    tx = kfac.scale_by_kfac(tagged.layers, damping=damping, inverse=inverse)
    state = tx.init(model.params())
    _, grads, statistics = jax.jit(tagged.value_and_grad)(*args, opt_state=state)
    updates, state = tx.update(grads, state, args[0], statistics=statistics)
    whole = first_pass(name)[-1]
    for layer in tagged.layers:
        assert layer.note and layer.a_form != "full"
        shapes = layer.a_shape, layer.g_shape
        kinds = list(zip(forms.forms_of(layer), shapes, strict=True))
        kept = []
        for seen, full, kind in zip(
            statistics[layer.name][:2], whole[layer.name][:2], kinds, strict=True
        ):
            close(seen, stored(np.asarray(full), *kind), 1e-9)
            kept.append(restricted(np.asarray(full), *kind))
        v, u = (block_of(layer, tree) for tree in (grads, updates))
        solve = oracles.solve_exact
        if inverse in ("cholesky", "newton_schulz"):
            solve = oracles.solve_split
        close(u, solve(*kept, v, damping), 1e-6)
    assert kfac_state(state).count == 1


def block_of(layer, tree):
    """A layer's parameters as ``[in + 1, out]``."""
    found = leaves(tree)
    return np.concatenate([np.atleast_2d(found[path]) for path in layer.params])


@pytest.mark.parametrize("size", [0, -3, True])
def test_the_bound_is_checked(size):
    with pytest.raises(ValueError, match="max_factor_dim"):
        models.BY_NAME["mlp"].tag(4, max_factor_dim=size)


def test_a_bound_only_changes_what_is_too_large():
    small = models.BY_NAME["mlp"].tag(4, max_factor_dim=5)
    assert [t.a_form for t in small.layers] == ["full", "block_diagonal"]
    assert "block-diagonal (6 > 5)" in str(small)
    wanted = functools.partial(models.BY_NAME["mlp"].tag, 4)
    assert small.layers[0] == wanted().layers[0]


@given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([(), (2,)]),
    rows=st.integers(1, 5),
    d=st.integers(2, 9),
)
def test_symmetric_product_by_blocks(seed, blocks, rows, d):
    x = np.random.default_rng(seed).normal(size=(*blocks, rows, d))
    with mock.patch.object(forms, "LEAST_SPLIT", 2):
        seen = np.asarray(forms.symmetric_product(jnp.asarray(x), jnp.float64))
    np.testing.assert_allclose(seen, np.swapaxes(x, -1, -2) @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [767, 769, 1000])
def test_operations_of_a_symmetric_product(d):
    x = jax.ShapeDtypeStruct((7, d), jnp.float32)
    program = jax.make_jaxpr(lambda x: forms.symmetric_product(x, jnp.float32))(x)
    wanted = forms.symmetric_product_flops(7, d)
    assert programs.products(program.jaxpr) == wanted
    assert (wanted < 2 * 7 * d**2) == (d > 768)


def test_a_diagonal_that_is_not_positive_has_no_inverse():
    found = forms.DIAGONAL.inverse(jnp.array([2.0, 0.0, -1.0]))
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan])
