"""``inverse="low_rank"``: its solve against dense ones, and how its basis converges."""

import functools

import chex
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.core.parameter_views import View
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.assignment import grouped
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker import low_rank as eigenpairs
from kfac_jax_lite.kronecker.low_rank import LowRankInverses
from kfac_jax_lite.kronecker.precondition import gather
from tests import models, parallel, zoo
from tests.helpers import (
    batches_of,
    cases,
    close,
    identical,
    kfac_state,
    leaves,
    train,
    train_step,
)

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


@functools.partial(jax.jit, static_argnums=0)
def solve(layer, v, inverse, damping):
    return inverse.solve(layer, v, None, damping)


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
    layer = LayerTag("", "dense", (), *shapes, (), (), 0, "", *(k.name for k in kinds))
    v = rng.normal(size=(*blocks, dense[0].shape[-1], dense[1].shape[-1]))
    inverse = LowRankInverses(*jax.tree.map(jnp.asarray, parts[0] + parts[1]))
    u = np.asarray(solve(layer, jnp.asarray(v), inverse, jnp.array(damping)))
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
    values = np.linalg.svd(u, compute_uv=False)
    assert 0.4 < values.min() <= values.max() < 1.6
    assert 1e-3 < abs(u.sum(0)).min()  # none is orthogonal to the ones


# ---------------------------------------------------------------- in the optimiser


def dense(u, e, tau):
    """A factor written out, ``[.., d, d]``; a diagonal one too."""
    u, e = np.asarray(u), np.asarray(e)
    if not u.size:
        return e[..., None] * np.eye(e.shape[-1])
    kept = (u * e[..., None, :]) @ u.mT
    tail = np.zeros(e.shape[:-1]) if isinstance(tau, tuple) else np.asarray(tau)
    return kept + tail[..., None, None] * (np.eye(u.shape[-2]) - u @ u.mT)


def options(rank=2, **more):
    """What the tests below have in common."""
    return {"inverse": kfac.low_rank(rank), "damping": DAMPING, "momentum": None} | more


def net(name):
    """A network of either table, and its tagged loss."""
    model = zoo.BY_NAME[name] if name in zoo.BY_NAME else models.BY_NAME[name]
    return model, model.tag(4)


NETS = ["mlp", "twice", "conv2d", "groups", "heads_out", "layers_scan_norm-jax"]
NETS += ["experts-jax", "tied-jax"]


@pytest.mark.parametrize(
    "name", cases(NETS, ["mlp", "groups", "layers_scan_norm-jax", "tied-jax"])
)
def test_updates_are_those_of_the_factors_kept(name):
    """After three refreshes, layer by layer, stacked or in groups."""
    model, tagged = net(name)
    params = model.params()
    tx = kfac.kfac(tagged.layers, 1.0, kl_clip=None, **options())
    state = tx.init(params)
    step = jax.jit(tagged.value_and_grad)
    update = jax.jit(lambda g, s, f: tx.update(g, s, params, statistics=f))
    for seed in range(3):
        _, grads, statistics = step(params, *model.batch(4, seed=seed))
        updates, state = update(grads, state, statistics)
    seen, given = leaves(updates), leaves(grads)
    low = 0
    for layer in tagged.layers:
        if not layer.kronecker:
            continue
        u_a, e_a, tau_a, u_g, e_g, tau_g = kfac_state(state).inverses[layer.name]
        low += not isinstance(tau_a, tuple)
        a, g = dense(u_a, e_a, tau_a), dense(u_g, e_g, tau_g)
        v = np.asarray(gather(layer, given))
        u = -np.asarray(gather(layer, seen))
        for i in np.ndindex(*v.shape[:-2]):
            matrix = np.kron(a[i], g[i]) + DAMPING * np.eye(v[i].size)
            wanted = np.linalg.solve(matrix, v[i].ravel()).reshape(v[i].shape)
            close(u[i], wanted, 1e-8)
    assert low
    assert not kfac_state(state).clock.failures.any()


@pytest.mark.parametrize("name", ["mlp"])
def test_all_eigenpairs_are_eigh(name):
    model, tagged = net(name)
    found = []
    for inverse in ("eigh", kfac.low_rank(100), "low_rank"):
        tx = kfac.kfac(tagged.layers, 0.05, **options(inverse=inverse))
        found.append(train(tagged, tx, model.params(), batches_of(model, 3))[0])
    close(found[1], found[0], 1e-8)
    close(found[2], found[0], 1e-8)  # all factors are small


def run(tx, wrap=jax.jit, steps=4, dtype=np.float64):
    model, tagged = net("mlp")
    batches = batches_of(model, steps, dtype=dtype)
    return train(tagged, tx, model.params(dtype), batches, wrap=wrap)


@pytest.fixture
def tx():
    more = {"interval": kfac.intervals.staleness(0.3), "inverse_interval": 2}
    return kfac.kfac(net("mlp")[1].layers, 0.05, **options(**more))


def test_compiled_once(tx):
    calls = []

    def counted(step):
        return jax.jit(lambda *args: calls.append(1) or step(*args))

    run(tx, counted, steps=3)
    assert len(calls) == 1


@pytest.mark.slow
def test_jit_is_eager(tx):
    jitted = run(tx, steps=3)
    with jax.disable_jit():
        close(jitted, run(tx, lambda step: step, steps=3), 1e-8)


def test_the_state_is_fixed_and_resumes(tx):
    """Structure, shapes and dtypes; half a run, stored and restored, goes on alike."""
    model, tagged = net("mlp")
    before = tx.init(model.params())
    params, state, _ = run(tx, steps=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    data = flax.serialization.to_bytes(state)
    state = flax.serialization.from_bytes(before, data)
    state = jax.tree.map(jnp.asarray, state)
    step = jax.jit(train_step(tagged, tx))
    for batch in batches_of(model, 4)[2:]:
        params, state, _ = step(params, state, *batch)
    identical((params, state), run(tx, steps=4)[:2])


def test_float32(tx):
    params, state, _ = run(tx, dtype=np.float32)
    wanted, *_ = run(tx)
    dtypes = {x.dtype for x in jax.tree.leaves(kfac_state(state).inverses)}
    assert dtypes == {jnp.dtype(jnp.float32)}
    close(params, jax.tree.map(lambda x: x.astype(jnp.float32), wanted), 1e-3)


def test_a_failure_keeps_the_last_good_eigenpairs(rng):
    """A factor with an eigenvalue below zero has no square root."""
    model, tagged = net("mlp")
    params = model.params()
    tx = kfac.scale_by_kfac(
        tagged.layers, damping=DAMPING, factor_decay=0.0, inverse=kfac.low_rank(2)
    )
    _, grads, statistics = tagged.value_and_grad(params, *model.batch(4))
    good = tx.update(grads, tx.init(params), params, statistics=statistics)[1]
    name = tagged.layers[0].name
    a = statistics[name].a
    bad = a - 10 * jnp.trace(a) * jnp.eye(len(a), dtype=a.dtype)
    broken = {**statistics, name: statistics[name]._replace(a=bad)}
    updates, state = tx.update(grads, good, params, statistics=broken)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    identical(state.inverses[name], good.inverses[name])
    assert state.clock.failures.tolist() == [1, 0]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("mode", cases(["shard_map", "auto"], ["auto"]))
def test_owners_are_one_device(mode):
    """Factors inverted by their owners, from the last eigenpairs."""
    model = net("mlp")[0]
    method = kfac.low_rank({"layer0": (2, 1), "layer1": (1, 1)})
    result = parallel.run(model, mode, parallel.OWNER(), 4, method)
    parallel.same(model, result, 4, inverse=method)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_owners_take_the_fastest_inverse():
    model = net("mlp")[0]
    result = parallel.run(model, "auto", parallel.OWNER(), 3, "auto")
    parallel.same(model, result, 3, inverse="auto")


def test_equal_shapes_of_different_ranks_are_inverted_apart():
    shape = {"a_shape": (9, 9), "g_shape": (9, 9), "kind": "dense", "params": ()}
    views = (View.of_leaf(0, (9, 9)),)
    layers = [
        LayerTag(name, views=views, roles=("weight",), elements=81, **shape)
        for name in "xyz"
    ]
    method = kfac.low_rank({"x": (2, 2), "y": (3, 2), "z": (2, 2)})
    groups = [[t.name for t in alike] for alike in grouped(layers, method.ranks)]
    assert groups == [["x", "z"], ["y"]]
    assert len(grouped(layers)) == 1


# ------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    "rank, size, kept",
    [
        (5, 100, 5),
        (50, 100, 100),
        (0.125, 1000, 125),
        (0.125, 65, 32),
        (0.125, 64, 64),
        (0.01, 1001, 32),
        (0.6, 1000, 1000),
    ],
)
def test_ranks(rank, size, kept):
    layer = LayerTag("x", "dense", (), (size, size), (3, 3), (), (), 0)
    assert kfac.low_rank(rank).ranks(layer) == (kept, 3)


def test_ranks_by_layer():
    layer = LayerTag("x", "dense", (), (100, 100), (200, 200), (), (), 0)
    assert kfac.low_rank({"x": (7, 150)}).ranks(layer) == (7, 200)
    assert kfac.low_rank({"y": (7, 8)}).ranks(layer) == (32, 32)
    assert hash(kfac.low_rank({"x": (1, 2)})) == hash(kfac.low_rank({"x": (1, 2)}))


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, True, {"x": (0, 2)}])
def test_ranks_that_cannot_be(rank):
    with pytest.raises(ValueError, match="rank|share"):
        kfac.low_rank(rank)
