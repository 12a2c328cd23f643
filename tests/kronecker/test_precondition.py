"""Preconditioned gradients against dense solves, through the public interface."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models, oracles, zoo
from tests.helpers import (
    cases,
    close,
    first_pass,
    homogeneous,
    kfac_state,
    leaves,
    random_like,
    random_statistics,
    stacked,
)

BY_NAME = models.BY_NAME
SOLVES = {
    "cholesky": oracles.solve_split,
    "newton_schulz": oracles.solve_split,
    "eigh": oracles.solve_exact,
    "low_rank": oracles.solve_exact,
}
FORMS = ["mlp", "transposed", "einsum_oi", "heads_out", "heads_in", "reshaped"]
FORMS += ["linen_dense_general", "no_bias_mlp"]
FORMS += ["conv1d", "conv3d", "all_dilations", "groups", "depthwise_multiplier"]
FORMS += ["nchw", "chwn", "grouped_nchw", "no_bias"]


def precondition(tagged, params, grads, statistics, **options):
    """One update from a fresh state."""
    tx = kfac.scale_by_kfac(tagged.layers, **options)
    update = jax.jit(lambda g, s: tx.update(g, tx.init(params), params, statistics=s))
    return update(grads, statistics)[0]


def check(model, updates, grads, statistics, solve, damping, tolerance=1e-8):
    """Every Kronecker layer is the dense solution."""
    for name in model.layers:
        v = homogeneous(model, name, grads)
        u = homogeneous(model, name, updates)
        a, g = stacked(statistics[name].a), stacked(statistics[name].g)
        assert len(v) == len(a) == len(g)
        for block in range(len(v)):
            wanted = solve(a[block], g[block], v[block], damping)
            close(u[block], wanted, tolerance)


# Every form once; all inverses see the same matrices of a layer.
FAST = [(name, ["cholesky", "eigh"][i % 2]) for i, name in enumerate(FORMS)]


@pytest.mark.parametrize(
    ("name", "inverse"), cases(itertools.product(FORMS, ["cholesky", "eigh"]), FAST)
)
def test_every_form_against_a_dense_solve(rng, name, inverse):
    model = BY_NAME[name]
    tagged, _, grads, template = first_pass(name)
    statistics = random_statistics(rng, template)
    updates = precondition(
        tagged, model.params(), grads, statistics, inverse=inverse, damping=0.01
    )
    check(model, updates, grads, statistics, SOLVES[inverse], 0.01)


@pytest.mark.parametrize("inverse", SOLVES)
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.integers(0, 10**6),
    st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    st.sampled_from([1e-3, 1.0, 1e2]),
)
def test_random_factors(inverse, seed, damping, scale):
    """Any damping, and factors of very different scale, so that pi matters."""
    rng = np.random.default_rng(seed)
    model = BY_NAME["mlp"]
    template = first_pass("mlp")[-1]
    statistics = {
        name: s._replace(a=s.a * scale)
        for name, s in random_statistics(rng, template).items()
    }
    grads = random_like(rng, model.params())
    updates = compiled(inverse)(grads, statistics, damping)
    check(model, updates, grads, statistics, SOLVES[inverse], damping)


_COMPILED = {}


def compiled(inverse):
    """One program per inverse, with the damping as an argument."""
    if inverse not in _COMPILED:
        layers, params = first_pass("mlp")[0].layers, BY_NAME["mlp"].params()

        def run(grads, statistics, damping):
            tx = kfac.scale_by_kfac(layers, damping=damping, inverse=inverse)
            return tx.update(grads, tx.init(params), params, statistics=statistics)[0]

        _COMPILED[inverse] = jax.jit(run)
    return _COMPILED[inverse]


@pytest.mark.parametrize("inverse", SOLVES)
def test_ill_conditioned_factors(rng, inverse):
    """Condition numbers of 1e8 with a damping that matters."""
    model = BY_NAME["mlp"]
    _, _, _, template = first_pass("mlp")

    def spread(matrix):
        q, _ = np.linalg.qr(rng.normal(size=matrix.shape))
        values = np.logspace(-6, 2, len(matrix))
        return jnp.asarray(q * values @ q.T)

    statistics = {
        name: s._replace(a=spread(s.a), g=spread(s.g)) for name, s in template.items()
    }
    grads = random_like(rng, model.params())
    updates = compiled(inverse)(grads, statistics, 1e-3)
    check(model, updates, grads, statistics, SOLVES[inverse], 1e-3)


NORMS = itertools.product(
    ["layer_norm", "layer_norm_scale", "layer_norm_shift"],
    ["cholesky", "eigh", "ekfac", "newton_schulz"],
)
FAST_NORMS = [("layer_norm", "cholesky"), ("layer_norm", "ekfac")]
FAST_NORMS += [("layer_norm_scale", "eigh"), ("layer_norm_shift", "newton_schulz")]


@pytest.mark.parametrize(("name", "inverse"), cases(NORMS, FAST_NORMS))
def test_scale_shift(rng, name, inverse):
    model = BY_NAME[name]
    tagged, _, grads, template = first_pass(name, inverse=inverse)
    statistics = random_statistics(rng, template)
    updates = precondition(
        tagged, model.params(), grads, statistics, inverse=inverse, damping=0.01
    )
    keys = [key for key in ("scale", "bias") if key in grads["layer"]]
    v = np.stack([grads["layer"][key] for key in keys], -1)
    blocks = np.asarray(statistics["layer"].blocks) + 0.01 * np.eye(len(keys))
    wanted = np.linalg.solve(blocks, v[..., None])[..., 0]
    u = np.stack([updates["layer"][key] for key in keys], -1)
    close(u, wanted, 1e-8)


@pytest.mark.parametrize("name", ["temperature-jax", "conv_batch_norm-haiku"])
def test_scales_of_any_rank(rng, name):
    """A scalar, and a scale with unit axes that its shift lacks."""
    net = zoo.BY_NAME[name]
    params, batch = net.params(), net.batch(4)
    tagged = net.tag(4)
    template = jax.eval_shape(tagged.value_and_grad, params, *batch)[-1]
    (layer,) = [t for t in tagged.layers if t.kind == "scale_shift"]
    statistics, grads = random_statistics(rng, template), random_like(rng, params)
    updates = precondition(tagged, params, grads, statistics, damping=0.1)
    v, u = (
        np.stack([leaves(tree)[path].ravel() for path in layer.params], -1)
        for tree in (grads, updates)
    )
    assert {k: x.shape for k, x in leaves(updates).items()} == {
        k: x.shape for k, x in leaves(params).items()
    }
    damped = np.asarray(statistics[layer.name].blocks) + 0.1 * np.eye(v.shape[-1])
    close(u, np.linalg.solve(damped, v[..., None])[..., 0])


def test_diagonal(rng):
    params = {"odd": jnp.asarray(rng.normal(size=(4, 3)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    loss = lambda p, x: jnp.square(x @ jnp.cumsum(p["odd"], 0)).sum(-1).mean()  # noqa: E731
    tagged = kfac.tag(loss, params, x, num_examples=5)
    _, grads, statistics = tagged.value_and_grad(params, x)
    updates = precondition(tagged, params, grads, statistics, damping=0.1)
    g = np.asarray(grads["odd"])
    close(updates["odd"], g / (5 * g**2 + 0.1), 1e-8)


# ---------------------------------------------------------------- EKFAC


def ekfac_steps(name, steps):
    """Steps on different batches with full refresh; state before the last one."""
    model = BY_NAME[name]
    tagged, params = first_pass(name)[0], model.params()
    tx = kfac.scale_by_kfac(
        tagged.layers, inverse="ekfac", damping=0.01, factor_decay=0.0
    )
    state, run = tx.init(params), jax.jit(tagged.value_and_grad)
    for seed in range(steps):
        x, y = model.batch(4, seed=seed)
        _, grads, statistics = run(params, x, y, opt_state=state)
        before = state
        updates, state = tx.update(grads, state, params, statistics=statistics)
    return model, params, before, statistics, grads, updates, (x, y)


@pytest.mark.parametrize("name", ["mlp", "no_bias_mlp"])
def test_ekfac_diagonal_is_the_second_moment_in_the_eigenbasis(name):
    """``s_ij = 1/N sum_n (Q_A^T grad_n Q_G)_ij^2`` in the basis held by the state."""
    model, params, before, statistics, _, _, (x, y) = ekfac_steps(name, 3)
    inverses = kfac_state(before).inverses
    per_example = [
        jax.grad(model.plain_loss)(params, x[i : i + 1], y[i : i + 1])
        for i in range(len(x))
    ]
    for layer in model.layers:
        q_a, q_g = bases(inverses[layer])
        moments = [
            (q_a.T @ homogeneous(model, layer, g)[0] @ q_g) ** 2 for g in per_example
        ]
        close(statistics[layer].s, np.mean(moments, 0), 1e-8)


def bases(inverse):
    """The two orthogonal matrices of an EKFAC inverse, whatever they are called."""
    square = [
        np.asarray(m)
        for m in inverse
        if m is not None and m.ndim == 2 and m.shape[0] == m.shape[1]
    ]
    orthogonal = [m for m in square if np.allclose(m.T @ m, np.eye(len(m)))]
    assert len(orthogonal) >= 2
    return orthogonal[:2]


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_ekfac_first_step_is_the_exact_kronecker_solve_or_better(name):
    """Finite, and downhill: the matrix applied is positive definite."""
    _, _, _, _, grads, updates, _ = ekfac_steps(name, 3)
    inner = sum(
        float((g * u).sum())
        for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True)
    )
    assert inner > 0


def test_ekfac_with_one_example_is_the_exact_block():
    """With one example and the basis of that example, F = N g g^T exactly."""
    model = BY_NAME["mlp"]
    x, y = model.batch(1)
    tagged, params = model.tag(1), model.params()
    tx = kfac.scale_by_kfac(
        tagged.layers, inverse="ekfac", damping=0.01, factor_decay=0.0
    )
    state = tx.init(params)
    for _ in range(3):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
    for name in model.layers:
        v = homogeneous(model, name, grads)[0]
        matrix = np.outer(v.ravel(), v.ravel()) + 0.01 * np.eye(v.size)
        wanted = np.linalg.solve(matrix, v.ravel()).reshape(v.shape)
        close(homogeneous(model, name, updates)[0], wanted, 1e-8)
