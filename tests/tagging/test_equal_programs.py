"""One network written in two ways: the plain one is the oracle of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close

B, T, IN, OUT = 5, 3, 4, 2


def statistics(forward, params, *inputs, **options):
    """A layer's statistics under a squared loss."""

    def loss(p, *x):
        return jnp.mean(jnp.sum(kfac.normal(jnp.tanh(forward(p, *x))) ** 2, -1))

    tagged = kfac.tag(loss, params, *inputs, **options)
    return jax.jit(tagged.value_and_grad)(params, *inputs)[-1]["w"]


# ---------------------------------------------------------------- dense layers

DENSE = {
    "rows_last": lambda w, x: jnp.einsum("ib,io->bo", x.T, w),
    "outputs_first": lambda w, x: jnp.einsum("bi,io->ob", x, w).T,
    "both": lambda w, x: jnp.einsum("io,ib->ob", w, x.T).T,
    "dot_general": lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))).T,
    "weight_first": lambda w, x: (w.T @ x.T).T,
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "matrix_rows": lambda w, x: jnp.moveaxis(
        jnp.einsum("pbi,io->bpo", x[None], w), 1, 0
    )[0],
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name, rng):
    params, x = {"w": jnp.asarray(rng.normal(size=(IN, OUT)))}, rng.normal(size=(B, IN))
    wanted = statistics(lambda p, x: x @ p["w"], params, x)
    found = statistics(lambda p, x: DENSE[name](p["w"], x), params, x)
    close((found.a, found.g), (wanted.a, wanted.g))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_contraction_of_two_axes(sharing, rng):
    """Axes of the input in another order than the weight's."""
    params = {"w": jnp.asarray(rng.normal(size=(T, IN, OUT)))}
    x = rng.normal(size=(B, IN, T))

    def other(p, x):
        return jnp.einsum("bit,tio->bo", x, p["w"])

    def plain(p, x):
        rows = jnp.swapaxes(x, 1, 2).reshape(B, T * IN)
        return rows @ p["w"].reshape(T * IN, OUT)

    options = {"weight_sharing": sharing}
    seen, wanted = (statistics(f, params, x, **options) for f in (other, plain))
    close(seen.g, wanted.g)
    # The entries of A are in the order of the contraction.
    order = np.arange(T * IN).reshape(T, IN).T.ravel()
    same = np.allclose(seen.a, wanted.a) or np.allclose(
        seen.a, wanted.a[order][:, order]
    )
    assert same


# ---------------------------------------------------------------- loops and branches


def turned(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, T)[0]


def unrolled(p, x):
    for _ in range(T):
        x = jnp.tanh(x @ p["w"])
    return x


def test_a_loop_is_its_turns(rng):
    params, x = {"w": jnp.asarray(rng.normal(size=(IN, IN)))}, rng.normal(size=(B, IN))
    found, wanted = statistics(turned, params, x), statistics(unrolled, params, x)
    close((found.a, found.g), (wanted.a, wanted.g))


def test_one_branch_counts(rng):
    """Both branches use the weight, one of them runs."""
    params, x = {"w": jnp.asarray(rng.normal(size=(IN, OUT)))}, rng.normal(size=(B, IN))

    def branched(p, x):
        return lax.cond(
            x.sum() > -1e9, lambda h: h @ p["w"], lambda h: 2 * h @ p["w"], x
        )

    wanted = statistics(lambda p, x: x @ p["w"], params, x)
    found = statistics(branched, params, x)
    close((found.a, found.g), (wanted.a, wanted.g))


# ---------------------------------------------------------------- lookups

ROWS, COLUMNS = 3, 2
TOKENS = np.array([0, 4, 1, 4, 2])
SCALE = np.array(1.7)
# The shape of the table, the lookup, and the rows that would be its input.
LOOKUPS = {
    "plain": ((ROWS,), lambda w: w[TOKENS % ROWS], np.eye(ROWS)[TOKENS % ROWS]),
    "scaled": (
        (ROWS,),
        lambda w: (w * SCALE)[TOKENS % ROWS],
        np.eye(ROWS)[TOKENS % ROWS] * SCALE,
    ),
    "out_of_range": (
        (ROWS,),
        lambda w: jnp.take(w, TOKENS, axis=0, mode="fill", fill_value=0),
        np.eye(TOKENS.max() + 1)[TOKENS][:, :ROWS],
    ),
    "two_coordinates": (
        (ROWS, COLUMNS),
        lambda w: w[TOKENS % ROWS, TOKENS % COLUMNS],
        np.eye(ROWS * COLUMNS)[TOKENS % ROWS * COLUMNS + TOKENS % COLUMNS],
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_products_with_one_hot_rows(name, rng):
    shape, lookup, rows = LOOKUPS[name]
    params = {"w": jnp.asarray(rng.normal(size=(*shape, OUT)))}
    flat = {"w": params["w"].reshape(-1, OUT)}
    found = statistics(lambda p, x: lookup(p["w"]) + 0 * x[:, :1], params, rows)
    wanted = statistics(lambda p, x: x @ p["w"], flat, rows)
    assert found.a.ndim == 1
    close((found.a, found.g), (np.diag(wanted.a), wanted.g))


# ---------------------------------------------------------------- convolutions


@pytest.mark.parametrize(
    ("stride", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (1, 2, 2), (2, 2, 0)]
)
def test_convolutions_are_products_with_patches(stride, dilation, padding, rng):
    size, kernel = 7, 3
    params = {"w": jnp.asarray(rng.normal(size=(kernel, IN, OUT)))}
    x = rng.normal(size=(B, size, IN))

    def convolved(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (stride,), [(padding, padding)], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    def by_patches(p, x):
        wide = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
        last = wide.shape[1] - dilation * (kernel - 1)
        starts = np.arange(0, last, stride)[:, None] + dilation * np.arange(kernel)
        rows = wide[:, starts].reshape(B, len(starts), kernel * IN)
        return rows @ p["w"].reshape(kernel * IN, OUT)

    found, wanted = (statistics(f, params, x) for f in (convolved, by_patches))
    close((found.a, found.g), (wanted.a, wanted.g), 1e-9)
