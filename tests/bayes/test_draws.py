"""Draws from posteriors have the covariance that the docstrings say, in float64.

A draw is linear in the noise, so that its covariance is ``R Rᵀ`` exactly; and 10⁵ draws
have it up to sampling error. Both against dense matrices in numpy.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import kfac_jax_lite as kfac
from kfac_jax_lite.core.types import KroneckerStatistics, SquareStatistics
from tests import models
from tests.helpers import cases, close, identical, random_statistics
from tests.posteriors import (
    block_covariance,
    exact_covariance,
    homogeneous,
    posterior_covariance,
    root_of_draws,
)

sample = kfac.bayes.sample

# ---------------------------------------------------------------- every kind of layer


def init(rng):
    """A grouped convolution, a norm's scale and shift, an odd one, a dense layer."""
    return {
        "conv": {"kernel": rng.normal(size=(2, 2, 1, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": rng.normal(size=4), "bias": rng.normal(size=4)},
        "odd": rng.normal(size=(2,)),
        "dense": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
    }


def loss(p, x, y):
    """Cross-entropy of a network with every kind of layer."""
    numbers = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(
        x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=numbers,
        feature_group_count=2,
    )  # fmt: skip
    z = jnp.tanh(z + p["conv"]["bias"])
    z = (z - z.mean(-1, keepdims=True)) * p["norm"]["scale"] + p["norm"]["bias"]
    z = jnp.tanh(z).mean((1, 2)) * jnp.exp(jnp.sin(p["odd"]).sum())
    logits = kfac.categorical(z @ p["dense"]["kernel"] + p["dense"]["bias"])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def blocks(p):
    """Entries of every layer; groups and units one by one."""
    kernel = homogeneous(p["conv"])
    return {
        "conv": np.split(kernel, 2, axis=-1),
        "norm": np.stack([p["norm"]["scale"], p["norm"]["bias"]], -1),
        "odd": [p["odd"]],
        "dense": [homogeneous(p["dense"])],
    }


@functools.cache
def trained(method, limit):
    """Tagged loss, state and parameters after three steps."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, init(rng))
    batches = [
        (jnp.asarray(rng.normal(size=(6, 3, 3, 2))), jnp.asarray([0, 1, 2, 0, 1, 2]))
        for _ in range(3)
    ]
    tagged = kfac.tag(loss, params, *batches[0], max_factor_dim=limit)
    kinds = {layer.name: layer.kind for layer in tagged.layers}
    assert set(kinds.values()) == {"conv", "scale_shift", "diagonal", "dense"}
    # Powers of four: roots of variance and damping are exact in float32.
    tx = kfac.bayes.noisy_kfac(
        tagged.layers, 64, 0.05, prior_precision=4.0, temperature=0.25,
        augmentation=4.0, inverse=method, factor_decay=0.7,
    )  # fmt: skip
    state, key = tx.init(params), jax.random.key(0)

    @jax.jit
    def step(params, state, key, *batch):
        _, grads, statistics = kfac.bayes.value_and_grad(
            tagged, params, *batch, opt_state=state, key=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return jax.tree.map(jnp.add, params, updates), state

    for batch in batches:
        key, own = jax.random.split(key)
        params, state = step(params, state, own, *batch)
    return tagged, state, params


FORMS = [
    (method, limit)
    for method in ("cholesky", "eigh", "ekfac")
    for limit in (8192, 3, 1)
]
FORMS += [("newton_schulz", 8192), ("auto", 3)]


@pytest.mark.parametrize(
    ("method", "limit"), cases(FORMS, [("cholesky", 8192), ("ekfac", 3)])
)
def test_covariance_of_every_kind_of_layer(method, limit, monkeypatch):
    """``R Rᵀ = (τ/N) (F + δ I)⁻¹``, ``F`` from the factors; all else is independent."""
    tagged, state, params = trained(method, limit)
    root = root_of_draws(state, params, monkeypatch)
    scale = 0.25 / (4 * 64)
    wanted = posterior_covariance(tagged, state.kfac, params, blocks, method, 4 * scale)
    close(root @ root.T, scale * wanted, 1e-8)


# ---------------------------------------------------------------- any size, any number


def powers(low, high):
    """Powers of four."""
    return st.integers(low, high).map(lambda n: 4.0**n)


def without_padding(layer, statistics):
    """Random factors with zeros where the last block of a factor is filled up."""
    found = {}
    for side, form, size in zip(
        "ag", (layer.a_form, layer.g_form), layer.sizes, strict=True
    ):
        x = getattr(statistics, side)
        if form == "block_diagonal":
            inside = (jnp.arange(x.shape[0] * x.shape[1]) < size).reshape(x.shape[:2])
            x = x * inside[:, :, None] * inside[:, None, :]
        found[side] = x
    return statistics._replace(**found)


def check_random(method, sizes, limit, bias, numbers, patch):
    """The same of a linear layer of any size with any factors."""
    precision, temperature, augmentation = numbers
    model = models.mlp("random", sizes, bias=bias)
    params, tagged = model.params(), model.tag(3, max_factor_dim=limit)
    tx = kfac.bayes.noisy_kfac(
        tagged.layers,
        256,
        0.1,
        prior_precision=precision,
        temperature=temperature,
        augmentation=augmentation,
        inverse=method,
    )
    state = tx.init(params)
    shapes = tagged.value_and_grad, params, *model.batch(3)
    statistics = jax.eval_shape(*shapes, opt_state=state)[-1]
    statistics = random_statistics(np.random.default_rng(0), statistics)
    statistics = {t.name: without_padding(t, statistics[t.name]) for t in tagged.layers}
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda s, f: tx.update(zeros, s, params, statistics=f)[1])
    state = update(state, statistics)
    root = root_of_draws(state, params, patch)
    scale = temperature / (augmentation * 256)
    wanted = posterior_covariance(
        tagged, state.kfac, params, lambda p: {"layer0": [homogeneous(p["layer0"])]},
        method, scale * precision,
    )  # fmt: skip
    close(root @ root.T, scale * wanted, 1e-8)


RANDOM = hypothesis.given(
    st.sampled_from(["cholesky", "eigh", "ekfac"]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([1, 2, 3, 8192]),
    st.booleans(),
    st.tuples(powers(-2, 3), powers(-3, 1), powers(0, 2)),
)


def covariance_of_any_size(method, sizes, limit, bias, numbers):
    """Blocks, diagonals and single numbers, at any prior and temperature."""
    with pytest.MonkeyPatch.context() as patch:
        check_random(method, sizes, limit, bias, numbers, patch)


test_any_size = hypothesis.settings(max_examples=3)(RANDOM(covariance_of_any_size))
test_many_sizes = pytest.mark.slow(
    hypothesis.settings(max_examples=60)(RANDOM(covariance_of_any_size))
)


# ---------------------------------------------------------------- by many draws

DRAWS = 100_000


def p_value(weights, mean, covariance):
    """How likely draws so unlike ``N(mean, covariance)`` are (two-sided).

    With whitened draws ``u`` the entries of ``(1/M) Σ u uᵀ − I`` are independent with
    variance ``1/M``, on the diagonal ``2/M``, and those of the mean with ``1/M``: their
    squares add up to a chi-squared variable.
    """
    chol = np.linalg.cholesky(covariance)
    u = np.linalg.solve(chol, (np.asarray(weights) - mean).T)
    d, count = u.shape
    excess = u @ u.T / count - np.eye(d)
    off = np.square(excess[np.tril_indices(d, -1)]).sum()
    total = count * (off + np.square(np.diag(excess)).sum() / 2)
    total += count * np.square(u.mean(1)).sum()
    chi2 = scipy.stats.chi2(d * (d + 1) // 2 + d)
    return 2 * min(chi2.sf(total), chi2.cdf(total))


def anisotropic(rng, size):
    """A positive definite matrix in no particular basis, eigenvalues 0.05 to 5."""
    q = scipy.stats.ortho_group.rvs(size, random_state=rng)
    return q @ np.diag(np.geomspace(0.05, 5, size)) @ q.T


def flat_draws(state, params, ravel):
    """``DRAWS`` draws, each as a row."""
    run = jax.jit(functools.partial(sample, num_samples=DRAWS))
    weights = jax.device_get(run(state, params, jax.random.key(3)))
    return np.asarray(jax.vmap(lambda w: ravel(w).ravel())(weights))


@functools.cache
def fed(method):
    """A linear layer ``[3 + 1, 3]`` whose factors do not commute."""
    rng = np.random.default_rng(5)
    a, g = anisotropic(rng, 4), anisotropic(rng, 3)
    model = models.mlp("linear", (3, 3))
    params, tagged = model.params(), model.tag(2)
    tx = kfac.bayes.noisy_kfac(
        tagged.layers,
        64,
        0.1,
        prior_precision=16.0,
        temperature=0.25,
        augmentation=4.0,
        inverse=method,
    )
    moments = None
    if method == "ekfac":
        moments = jnp.asarray(rng.uniform(0.05, 5, (4, 3)))
    statistics = {
        "layer0": KroneckerStatistics(jnp.asarray(a), jnp.asarray(g), moments)
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda s: tx.update(zeros, s, params, statistics=statistics)[1])
    return a, g, update(tx.init(params)), params, tagged


def wrong_covariances(a, g, damping):
    """What slips of the pen make: a triangle, a transpose, the factors, the damping."""
    pi, root = np.sqrt(np.trace(a) / 4 / (np.trace(g) / 3)), np.sqrt(damping)
    left, right = a + pi * root * np.eye(4), g + root / pi * np.eye(3)
    k_a, k_g = (np.linalg.inv(np.linalg.cholesky(m)) for m in (left, right))
    good_a, good_g = k_a.T @ k_a, k_g.T @ k_g
    yield "triangle of A", np.kron(k_a @ k_a.T, good_g)
    yield "triangle of G", np.kron(good_a, k_g @ k_g.T)
    mixed = np.kron(good_g, good_a).reshape(12, 12)
    yield "order of the factors", mixed
    swapped = np.linalg.inv(a + root / pi * np.eye(4))
    yield "pi", np.kron(swapped, np.linalg.inv(g + pi * root * np.eye(3)))
    yield "exact damping", exact_covariance(a, g, damping)
    yield "no square root", np.kron(good_a, good_g) @ np.kron(good_a, good_g)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "ekfac"])
def test_many_draws_of_a_matrix_normal(method):
    """Their covariance is right, and not any of those that a slip would give."""
    a, g, state, params, tagged = fed(method)
    scale, damping = 0.25 / 256, 16 * 0.25 / 256
    held = state.kfac.factors["layer0"], state.kfac.inverses["layer0"]
    close(held[0].a, a, 1e-12)
    wanted = scale * block_covariance(tagged.layers[0], *held, method, damping)
    ravel = lambda p: homogeneous(p["layer0"])  # noqa: E731
    weights, mean = flat_draws(state, params, ravel), ravel(params).ravel()
    assert weights.shape == (DRAWS, 12)
    assert p_value(weights, mean, wanted) > 1e-3
    if method == "cholesky":
        for name, wrong in wrong_covariances(a, g, damping):
            assert p_value(weights, mean, scale * wrong) < 1e-9, name
    assert p_value(weights, mean, 1.05 * wanted) < 1e-9
    assert p_value(weights, 0.9 * mean, wanted) < 1e-9


VECTOR = {"w": jnp.asarray([0.5, -1.0, 2.0]), "b": jnp.asarray([0.1])}


def quadratic(p, x):
    """A loss whose layer is dense."""
    return 0.5 * jnp.square(kfac.normal(x @ p["w"][:, None] + p["b"])).sum(-1).mean()


def diagonal_state(method):
    """A state with curvatures ``[0.1, 1, 10]`` and 0.5."""
    curvature = {"w": jnp.asarray([0.1, 1.0, 10.0]), "b": jnp.asarray([0.5])}
    if method == "ivon":
        state = kfac.bayes.ivon(
            64, 0.1, prior_precision=16.0, temperature=0.25, augmentation=4.0
        ).init(VECTOR)
        return state._replace(hessian=curvature)
    x = jnp.ones((2, 3))
    tagged = kfac.tag(quadratic, VECTOR, x, statistics="squares", strict=True)
    tx = kfac.bayes.vogn(
        tagged.layers, 64, 0.1, prior_precision=16.0, temperature=0.25, augmentation=4.0
    )
    block = jnp.concatenate([curvature["w"], curvature["b"]])[:, None]
    fed = {layer.name: SquareStatistics(block) for layer in tagged.layers}
    zeros = jax.tree.map(jnp.zeros_like, VECTOR)
    return tx.update(zeros, tx.init(VECTOR), VECTOR, statistics=fed)[1]


@pytest.mark.parametrize("method", ["vogn", "ivon"])
def test_many_draws_of_a_diagonal(method):
    """``N(μ, (τ/N) / (h + δ))`` entry by entry."""
    weights = flat_draws(
        diagonal_state(method), VECTOR, lambda p: jnp.concatenate([p["w"], p["b"]])
    )
    mean = np.asarray([0.5, -1.0, 2.0, 0.1])
    wanted = 0.25 / 256 / (np.asarray([0.1, 1.0, 10.0, 0.5]) + 16 * 0.25 / 256)
    assert p_value(weights, mean, np.diag(wanted)) > 1e-3
    assert p_value(weights, mean, np.diag(wanted[[1, 0, 2, 3]])) < 1e-9
    assert p_value(weights, mean, np.diag(0.25 / 256 / wanted)) < 1e-9


# ---------------------------------------------------------------- the rest


def optimisers():
    """Optimisers of the small network, by name."""
    model, n = models.BY_NAME["mlp"], 100
    layers, squares = model.tag(4).layers, model.tag(4, statistics="squares").layers
    return {
        "cholesky": kfac.bayes.noisy_kfac(layers, n, 0.1),
        "ekfac": kfac.bayes.noisy_kfac(layers, n, 0.1, inverse="ekfac"),
        "vogn": kfac.bayes.vogn(squares, n, 0.1),
        "ivon": kfac.bayes.ivon(n, 0.1, initial=0.5),
    }


@pytest.mark.parametrize("name", ["cholesky", "ekfac", "vogn"])
def test_without_statistics_the_draw_is_the_mean(name):
    params = models.BY_NAME["mlp"].params()
    state = optimisers()[name].init(params)
    identical(sample(state, params, jax.random.key(0)), params)


def test_ivon_draws_from_its_initial_curvature():
    params = {"w": jnp.zeros(DRAWS)}
    state = kfac.bayes.ivon(100, 0.1, prior_precision=50.0, initial=0.5).init(params)
    drawn = np.asarray(sample(state, params, jax.random.key(0))["w"])
    # (1/100) / (0.5 + 50/100) = 1/100; its estimate has a relative error of √(2/M).
    assert abs(drawn.var() * 100 - 1) < 4 * np.sqrt(2 / DRAWS)


def test_samples_have_a_leading_axis_and_are_independent():
    """Those of one key differ, and do not correlate over 4000 keys."""
    state = diagonal_state("ivon")
    three = sample(state, VECTOR, jax.random.key(0), num_samples=3)
    assert jax.tree.map(jnp.shape, three) == {"w": (3, 3), "b": (3, 1)}
    run = jax.vmap(lambda k: sample(state, VECTOR, k, num_samples=2)["w"])
    drawn = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(1), 4000)))
    every = np.corrcoef(drawn.reshape(4000, -1).T) - np.eye(6)
    assert np.abs(every).max() < 4.5 / np.sqrt(4000)
    one = sample(state, VECTOR, jax.random.key(0))
    again = sample(state, VECTOR, jax.random.key(0))
    identical(one, again)


def test_roots_are_those_of_the_last_inversion(monkeypatch):
    """Between inversions the matrix normal is the one that preconditioning knows."""
    model = models.mlp("linear", (3, 2))
    params, tagged = model.params(), model.tag(2)
    tx = kfac.bayes.noisy_kfac(tagged.layers, 64, 0.1, inverse_interval=2)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda s, f: tx.update(zeros, s, params, statistics=f)[1])
    rng, state, roots = np.random.default_rng(0), tx.init(params), []
    for _ in range(3):
        a, g = (jnp.asarray(anisotropic(rng, n)) for n in (4, 2))
        state = update(state, {"layer0": KroneckerStatistics(a, g)})
        roots.append(jax.device_get(state.roots))
    identical(roots[0], roots[1])
    assert np.abs(roots[2]["layer0"].a - roots[1]["layer0"].a).max() > 0.01
    root = root_of_draws(state, params, monkeypatch)
    of = lambda p: {"layer0": [homogeneous(p["layer0"])]}  # noqa: E731
    held = state.kfac, params, of, "cholesky", 1 / 64
    close(root @ root.T, posterior_covariance(tagged, *held) / 64, 1e-8)
