"""Cached inverses: when they are refreshed, and what happens when they fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.core.types import KroneckerStatistics
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import METHODS
from tests import oracles
from tests.helpers import (
    INVERSES,
    cases,
    close,
    first_pass,
    homogeneous,
    identical,
    kfac_state,
    random_like,
    random_statistics,
    spd,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]
DAMPING = 1e-2


def setup(rng, **options):
    """Layers' transformation, its state, gradients, and several statistics."""
    tagged, *_, template = first_pass("mlp", inverse=options.get("inverse"))
    params = MODEL.params()
    tx = kfac.scale_by_kfac(tagged.layers, damping=DAMPING, **options)
    grads = random_like(rng, params)
    statistics = [random_statistics(rng, template) for _ in range(8)]

    @jax.jit
    def step(state, statistics):
        return tx.update(grads, state, params, statistics=statistics)

    return step, tx.init(params), grads, statistics


def wanted(factors, grads, name, solve=oracles.solve_split):
    """The dense solution for a layer."""
    return solve(*factors[name], homogeneous(MODEL, name, grads)[0], DAMPING)


def averaged(statistics, decay):
    """Bias-corrected averages of the factors, per layer."""
    return {
        name: tuple(
            oracles.average([getattr(s[name], f) for s in statistics], decay)
            for f in ("a", "g")
        )
        for name in statistics[0]
    }


EVERY = [(n, name) for n in (1, 3) for name in ("cholesky", "newton_schulz", "auto")]


@pytest.mark.parametrize(
    ("every", "inverse"),
    cases(EVERY, [(1, "auto"), (3, "cholesky"), (3, "newton_schulz")]),
)
def test_refreshed_every_so_many_steps(rng, inverse, every):
    step, state, grads, statistics = setup(
        rng, inverse=inverse, inverse_interval=every, factor_decay=0.7
    )
    for t, new in enumerate(statistics, start=1):
        updates, state = step(state, new)
        last = t - (t - 1) % every
        factors = averaged(statistics[:last], 0.7)
        for name in MODEL.layers:
            solution = wanted(factors, grads, name)
            close(homogeneous(MODEL, name, updates)[0], solution, 1e-8)
        assert kfac_state(state).clock.inversions.tolist() == [1 + (t - 1) // every] * 2
        assert kfac_state(state).clock.last_inverse.tolist() == [last] * 2


def test_auto_takes_products_where_it_takes_them_to_be_faster():
    """Only large factors on a GPU are factorised, a CPU eliminates by blocks."""

    def program(size, platform):
        x = jax.ShapeDtypeStruct((size, size), jnp.float32)
        invert = lambda m, s: forms.FULL.fastest_inverse(m, s, 1e-5)  # noqa: E731
        traced = jax.jit(invert).trace(x, x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    found = {
        (size, platform): "cholesky" in program(size, platform).lower()
        or "potrf" in program(size, platform)
        for size in (64, 300)
        for platform in ("cpu", "cuda")
    }
    assert [key for key, factorised in found.items() if factorised] == [(300, "cuda")]


@pytest.mark.parametrize("inverse", INVERSES)
def test_not_refreshed_without_new_factors(rng, inverse):
    """Nothing to invert again where the factors are as they were."""
    step, state, _, statistics = setup(
        rng, inverse=inverse, interval=kfac.intervals.every(4), inverse_interval=1
    )
    for t, new in enumerate(statistics, start=1):
        _, state = step(state, new)
        inversions = kfac_state(state).clock.inversions.tolist()
        assert inversions == [1 + (t - 1) // 4] * 2


def test_refreshed_when_the_damping_changes(rng):
    """The split damping is inside the inverse, so a new damping is a new inverse."""
    tagged, *_, template = first_pass("mlp")
    params = MODEL.params()
    grads, statistics = random_like(rng, params), random_statistics(rng, template)
    schedule = lambda count: jnp.where(count < 2, 1e-2, 1e-1)  # noqa: E731
    tx = kfac.scale_by_kfac(
        tagged.layers, damping=schedule, interval=kfac.intervals.every(100)
    )
    state = tx.init(params)
    for t, damping in enumerate([1e-2, 1e-2, 1e-1, 1e-1]):
        updates, state = tx.update(grads, state, params, statistics=statistics)
        assert kfac_state(state).clock.inversions.tolist() == [1 + (t >= 2)] * 2
        for name in MODEL.layers:
            s, v = statistics[name], homogeneous(MODEL, name, grads)[0]
            solution = oracles.solve_split(s.a, s.g, v, damping)
            close(homogeneous(MODEL, name, updates)[0], solution, 1e-8)


def indefinite(statistics, name):
    """Statistics of which one factor cannot be factorised."""
    a = statistics[name].a
    broken = a - 10 * jnp.trace(a) * jnp.eye(len(a), dtype=a.dtype)
    return {**statistics, name: statistics[name]._replace(a=broken)}


def test_failed_factorisation_keeps_the_last_good_inverse(rng):
    step, state, grads, statistics = setup(rng, inverse="cholesky", factor_decay=0.0)
    _, state = step(state, statistics[0])
    updates, state = step(state, indefinite(statistics[1], "layer0"))
    old = averaged(statistics[:1], 0.0)
    new = averaged(statistics[1:2], 0.0)
    close(homogeneous(MODEL, "layer0", updates)[0], wanted(old, grads, "layer0"), 1e-8)
    close(homogeneous(MODEL, "layer1", updates)[0], wanted(new, grads, "layer1"), 1e-8)
    assert kfac_state(state).clock.failures.tolist() == [1, 0]
    updates, state = step(state, statistics[2])
    newest = averaged(statistics[2:3], 0.0)
    close(
        homogeneous(MODEL, "layer0", updates)[0], wanted(newest, grads, "layer0"), 1e-8
    )
    assert kfac_state(state).clock.failures.tolist() == [1, 0]


@pytest.mark.parametrize("inverse", INVERSES)
def test_indefinite_factors_never_give_non_finite_updates(rng, inverse):
    step, state, _, statistics = setup(rng, inverse=inverse, factor_decay=0.0)
    for new in [indefinite(statistics[0], "layer0"), statistics[1]]:
        updates, state = step(state, new)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        leaves = [v for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, float)]
        assert not any(np.isnan(v).any() for v in leaves)


@pytest.mark.parametrize("inverse", INVERSES)
def test_singular_factors_are_damped(rng, inverse):
    """Zero statistics (a dead layer): the damping alone decides."""
    step, state, grads, statistics = setup(rng, inverse=inverse)
    zero = jax.tree.map(jnp.zeros_like, statistics[0])
    updates, state = step(state, zero)
    close(updates, jax.tree.map(lambda g: g / DAMPING, grads), 1e-8)
    assert kfac_state(state).clock.failures.tolist() == [0, 0]


@pytest.mark.parametrize("inverse", INVERSES)
def test_rank_one_factors(rng, inverse):
    """A batch of one: each factor has rank one, the damped solve is still exact."""
    step, state, grads, statistics = setup(rng, inverse=inverse)
    one = jax.tree.map(
        lambda m: jnp.outer(m[0], m[0]) if m.shape[0] == m.shape[-1] else m,
        statistics[0],
    )
    updates, _ = step(state, one)
    if inverse == "ekfac":
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        return
    exact = inverse in ("eigh", "low_rank")
    solve = oracles.solve_exact if exact else oracles.solve_split
    for name in MODEL.layers:
        factors = {n: (s.a, s.g) for n, s in one.items()}
        solution = wanted(factors, grads, name, solve)
        close(homogeneous(MODEL, name, updates)[0], solution, 1e-7)


@pytest.mark.parametrize("inverse", INVERSES)
def test_repeated_update_is_deterministic(rng, inverse):
    step, state, _, statistics = setup(rng, inverse=inverse)
    identical(step(state, statistics[0]), step(state, statistics[0]))


def test_moments_turn_with_the_basis(rng):
    """``diag(Qᵀ (Q_old diag(s) Q_oldᵀ) Q)`` of the whole block, densely."""
    layer = first_pass("mlp")[0].layers[0]
    (n_a, n_g), method = layer.sizes, METHODS["ekfac"]
    damping, statistics = jnp.asarray(0.1), []
    for _ in range(2):
        moments = rng.uniform(0.1, 1, (n_a, n_g))
        arrays = map(jnp.asarray, (spd(rng, n_a), spd(rng, n_g), moments))
        statistics.append(KroneckerStatistics(*arrays))
    start = method.initial(layer, jnp.float64)
    old, first = method.refresh(layer, statistics[0], start, damping, jnp.asarray(True))
    np.testing.assert_allclose(first.s, np.outer(old.d_a, old.d_g))
    new, found = method.refresh(layer, statistics[1], old, damping, jnp.asarray(False))
    before, after = (np.kron(b.q_a, b.q_g) for b in (old, new))
    block = before @ np.diag(statistics[1].s.ravel()) @ before.T
    wanted = np.diag(after.T @ block @ after).reshape(n_a, n_g)
    np.testing.assert_allclose(found.s, wanted, rtol=1e-9)


EMPTY = list(itertools.product([*INVERSES, "auto"], [(0, 3), (3, 0), (0, 0)]))


@pytest.mark.parametrize(
    ("inverse", "shape"),
    cases(EMPTY, [("newton_schulz", (0, 3)), ("ekfac", (3, 0)), ("low_rank", (0, 0))]),
)
def test_a_weight_of_zero_width(inverse, shape):
    """It changes nothing for the other layers, and is in every report."""

    def loss(p, x):
        empty = jnp.tanh(x[:, : shape[0]] @ p["empty"]).sum() if "empty" in p else 0.0
        return 0.5 * jnp.square(kfac.normal(x @ p["w"])).sum(-1).mean() + empty

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    whole = {"empty": jnp.ones(shape), "w": jnp.ones((3, 2))}
    found = []
    for params in (whole, {"w": whole["w"]}):
        tagged = kfac.tag(loss, params, x)
        tx = kfac.scale_by_kfac(tagged.layers, damping=DAMPING, inverse=inverse)
        state = tx.init(params)
        for _ in range(2):
            _, grads, statistics = jax.jit(tagged.value_and_grad)(
                params, x, opt_state=state
            )
            step = jax.jit(tx.update)
            updates, state = step(grads, state, params, statistics=statistics)
        found.append(updates["w"])
        records = kfac.report(state, tagged.layers, spectra=True)
        assert [r["failures"] for r in records] == [0] * len(params)
    np.testing.assert_array_equal(*found)
    assert len(kfac.doctor(tagged, state, (x,), params)) >= 0
