"""Small tools that several test files share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests import models


def cases(values, fast):
    """Parameters of a test: those of ``fast`` in the fast suite, the rest in the slow.

    A tuple is one value for each argument of the test.
    """
    values, fast = list(values), list(fast)
    assert fast and all(value in values for value in fast)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in fast else pytest.mark.slow,
        )
        for value in values
    ]


def close(actual, expected, tolerance=1e-10):
    """Assert equal trees, relative to the largest entry of each leaf."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"shape {a.shape}, wanted {b.shape}"
        scale = np.abs(b).max() if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-30))

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(check, actual, expected)


def identical(actual, expected):
    """Assert the same structure, dtypes and bits."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_dtypes(actual, expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@functools.cache
def first_pass(name, examples=4, inverse=None, **options):
    """Tagged loss of a model of the table, and value, gradient and statistics.

    With ``inverse``, the statistics are those for a fresh state of that inverse.
    """
    model = models.BY_NAME[name]
    tagged = model.tag(examples, **options)
    args = (model.params(), *model.batch(examples))
    state = None
    if inverse is not None:
        tx = kfac.scale_by_kfac(tagged.layers, inverse=inverse)
        state = tx.init(model.params())
    return tagged, *jax.jit(tagged.value_and_grad)(*args, opt_state=state)


def leaves(tree):
    """Leaves by ``keystr`` path."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def kfac_state(opt_state):
    """The ``KFACState`` inside an optax state."""
    found = [
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=_is_kfac_state)
        if _is_kfac_state(leaf)
    ]
    assert len(found) == 1
    return found[0]


def _is_kfac_state(node):
    return type(node).__name__ == "KFACState"


_TO_IO = {
    "transposed": (1, 0),
    "einsum_oi": (1, 0),
    "nchw": (2, 3, 1, 0),
    "grouped_nchw": (2, 3, 1, 0),
    "chwn": (0, 3, 1, 2),
}


def homogeneous(model, name, tree):
    """A layer's parameters (or their gradients) as ``[groups, in (+1), out]``."""
    spec, leaf = model.layers[name], tree[name]
    kernel = np.asarray(leaf["kernel"] if "kernel" in leaf else leaf["w"])
    if name == "layer" and model.name in _TO_IO:
        kernel = kernel.transpose(_TO_IO[model.name])
    bias = leaf.get("bias", leaf.get("b"))
    out = kernel.shape[-1] if bias is None else bias.size
    matrix = kernel.reshape(-1, out)
    if spec.bias:
        matrix = np.concatenate([matrix, np.asarray(bias).reshape(1, out)])
    return np.stack(np.split(matrix, getattr(spec, "groups", 1), axis=-1))


def stacked(matrix):
    """A factor or a batch of factors, always as a batch."""
    matrix = np.asarray(matrix, np.float64)
    return matrix[None] if matrix.ndim == 2 else matrix


def spd(rng, size, floor=0.1):
    """A random symmetric positive definite matrix."""
    root = rng.normal(size=(size, size + 2))
    return root @ root.T / (size + 2) + floor * np.eye(size)


def random_statistics(rng, statistics):
    """Positive definite statistics of the same structure, shapes and dtypes."""

    def like(matrix):
        if matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]:
            batch = int(np.prod(matrix.shape[:-2]))
            values = np.stack([spd(rng, matrix.shape[-1]) for _ in range(batch)])
        else:
            values = rng.uniform(0.5, 1.5, matrix.shape)
        return jnp.asarray(values.reshape(matrix.shape), matrix.dtype)

    return jax.tree.map(like, statistics)


def random_like(rng, tree):
    """Normal numbers in the shape and dtype of a tree."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree
    )


def train_step(tagged, tx, deferred=False):
    """The step users write: value, gradient, statistics, update."""

    def step(params, opt_state, *batch, key=None):
        value, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=opt_state, key=key, deferred=deferred
        )
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def train(tagged, tx, params, batches, wrap=jax.jit):
    """Run one step per batch; returns parameters, state and losses."""
    step, opt_state, losses = wrap(train_step(tagged, tx)), tx.init(params), []
    for batch in batches:
        params, opt_state, loss = step(params, opt_state, *batch)
        losses.append(loss)
    return params, opt_state, losses


def batches_of(model, steps=4, examples=4, dtype=np.float64):
    """Some batches of a model's data."""
    return [model.batch(examples, dtype, seed=10 + i) for i in range(steps)]


INVERSES = ["cholesky", "eigh", "ekfac", "newton_schulz", "low_rank"]

TRANSFORMS = {
    "scale_by_kfac": lambda layers, **kw: kfac.scale_by_kfac(layers, **kw),
    "kfac": lambda layers, **kw: kfac.kfac(layers, 0.05, **kw),
}
