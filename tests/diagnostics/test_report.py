"""``kfac.report`` and what it reads off the factors, against dense float64 numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.diagnostics.accuracy import eigenvalues
from kfac_jax_lite.diagnostics.report import effective_rank, report
from kfac_jax_lite.distributed.layout import relayout
from kfac_jax_lite.kronecker import factors as forms
from tests import models
from tests.helpers import batches_of, kfac_state, train

MLP = models.mlp("telemetry", (6, 5, 4))
DAMPING = 0.03


@functools.cache
def trained(inverse="cholesky", steps=5, limit=8192, **options):
    """Layers and state after some steps."""
    tagged = MLP.tag(4, max_factor_dim=limit)
    tx = kfac.kfac(tagged.layers, 0.05, damping=DAMPING, inverse=inverse, **options)
    state = train(tagged, tx, MLP.params(), batches_of(MLP, steps))[1]
    return tagged.layers, state


def test_the_clock_in_words():
    """Refreshed at steps 1, 4; inverted at 1, and again once 3 steps have passed."""
    interval = kfac.intervals.every(3)
    _, state = trained(steps=6, interval=interval, inverse_interval=3)
    for record in report(state):
        assert record["since_refresh"] == record["since_inversion"] == 2
        assert record["inverse_damping"] == pytest.approx(DAMPING)
        assert record["trust"] == pytest.approx(float(state.trust))
        assert record["retreats"] is record["agreement"] is None
        # Weights 0.05 · (0.95, 1) of two refreshes.
        assert record["memory"] == pytest.approx(1.95**2 / (1 + 0.95**2), rel=1e-6)


def test_before_the_first_step():
    layers, _ = trained()
    state = kfac.kfac(layers, 0.1).init(MLP.params())
    for record in report(state, layers, spectra=True):
        assert record["since_refresh"] is record["since_inversion"] is None
        assert record["memory"] is record["condition"] is None
        assert record["effective_rank_a"] == 0


def test_the_memory_of_a_long_run():
    """``(1 + d) / (1 − d)`` is the limit; a bound once the weight has rounded to 1."""
    layers, state = trained()
    for refreshes, slack in ((150, 1e-2), (100_000, None)):
        weight = jnp.full(2, 1 - 0.95**refreshes, jnp.float32)
        inner = state.kfac
        clock = inner.clock._replace(
            refreshes=jnp.full(2, refreshes, jnp.int32), weight=weight
        )
        (record, _) = report(inner._replace(clock=clock))
        if slack:
            assert record["memory"] == pytest.approx(39, rel=slack)
        else:
            assert 39 <= record["memory"] <= refreshes
    assert report(state)[0]["memory"] < 5


def test_an_adaptive_damping_is_reported():
    tagged = MLP.tag(4)
    tx = kfac.kfac(tagged.layers, 0.05, damping=kfac.damping.adaptive(0.1))
    _, state, _ = train(tagged, tx, MLP.params(), batches_of(MLP, 3))
    for record in report(optax.MultiSteps(tx, 2).init(MLP.params())):
        assert record["retreats"] == 0
        assert record["agreement"] is None
    for record in report(state):
        assert record["agreement"] == pytest.approx(float(state.agreement))
        assert record["damping"] == pytest.approx(float(state.damping))
        assert record["trust"] == pytest.approx(float(state.inner.trust))


def dense_block(state, name, split):
    """The damped block of a layer, as a dense matrix."""
    a, g = (np.asarray(x, np.float64) for x in kfac_state(state).factors[name][:2])
    if not split:
        return a, g, np.kron(a, g) + DAMPING * np.eye(len(a) * len(g))
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    of_a = a + pi * np.sqrt(DAMPING) * np.eye(len(a))
    of_g = g + np.sqrt(DAMPING) / pi * np.eye(len(g))
    return a, g, np.kron(of_a, of_g)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_spectra_are_those_of_dense_matrices(inverse):
    layers, state = trained(inverse)
    for record in report(state, layers, spectra=True):
        a, g, block = dense_block(state, record["name"], inverse == "cholesky")
        for side, matrix in (("a", a), ("g", g)):
            values = np.linalg.eigvalsh(matrix)
            assert record[f"largest_{side}"] == pytest.approx(values[-1])
            assert record[f"smallest_{side}"] == pytest.approx(values[0], abs=1e-12)
            rank = values.sum() ** 2 / np.square(values).sum()
            assert record[f"effective_rank_{side}"] == pytest.approx(rank)
        assert record["condition"] == pytest.approx(np.linalg.cond(block), rel=1e-6)
        assert (record["inverse_damping"] is None) == (inverse == "eigh")


def test_other_layouts_give_the_same_records():
    """Triangles, and slices of eight devices, are unpacked first."""
    layers, state = trained()
    wanted = report(state, layers, spectra=True)
    owner = kfac.Reduction("owner", devices=8, bucket=0)
    for options in ({"packed": True}, {"reduction": owner, "axis_name": "batch"}):
        like = kfac.kfac(layers, 0.05, **options).init(MLP.params())
        for old, new in zip(
            wanted,
            report(relayout(state, like, layers), layers, spectra=True),
            strict=True,
        ):
            for key in ("effective_rank_a", "largest_g", "smallest_a", "condition"):
                assert new[key] == pytest.approx(old[key], rel=1e-9), key


def test_effective_rank_of_every_form():
    assert effective_rank(np.eye(5), forms.FULL) == pytest.approx(5)
    assert effective_rank(np.ones((4, 4)), forms.FULL) == pytest.approx(1)
    assert effective_rank(np.array([3.0, 1.0]), forms.DIAGONAL) == pytest.approx(1.6)
    blocks = np.stack([np.eye(2), np.zeros((2, 2))])
    assert effective_rank(blocks, forms.BLOCKS) == pytest.approx(2)
    assert effective_rank(blocks, forms.FULL) == 0  # the smallest of a stack


def test_what_fills_up_blocks_is_no_eigenvalue():
    blocks = np.stack([2 * np.eye(2), np.diag([3.0, 0.0])])
    np.testing.assert_array_equal(eigenvalues(blocks, forms.BLOCKS, 3), [2, 2, 3])
    layers, state = trained(limit=4)
    assert "block_diagonal" in {layer.a_form for layer in layers}
    for record in report(state, layers, spectra=True):
        assert record["smallest_a"] > 0


def test_other_kinds_of_layer_have_no_ranks():
    params = {"scale": jnp.ones(3)}
    loss = lambda p, x: jnp.mean(kfac.normal(x * jnp.sin(p["scale"])))  # noqa: E731
    tagged = kfac.tag(loss, params, jnp.ones((4, 3)))
    state = kfac.kfac(tagged.layers, 0.1).init(params)
    (record,) = report(state, tagged.layers, spectra=True)
    assert record["effective_rank_a"] is record["condition"] is None
    with pytest.raises(ValueError, match="tagged.layers"):
        report(state, spectra=True)
    assert jax.tree.leaves(report(state))
