"""Stochastic estimates: without bias, with errors as large as they say, in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kfac_jax_lite.curvature import spectra
from kfac_jax_lite.curvature.flat import flatten
from tests.helpers import cases
from tests.spectra import matrix_of, spectra_lists

KEY = jax.random.key(1)
METHODS = ["hutchinson", "hutch++", "xtrace"]
# A third of the eigenvalues negative; they decay, but slowly.
DECAYING = np.arange(1.0, 41) ** -0.7 * np.where(np.arange(40) % 3, 1, -1)
REPETITIONS = 300


def keys(count, seed=7):
    return jax.random.split(jax.random.key(seed), count)


def check_coverage(estimates, truth, freedom):
    """Means, spread of z-scores and 95 % intervals over independent repetitions.

    Bounds lie four to five standard deviations of these figures away from what exact
    normal errors would give; a shift by half an error, and errors half or twice as
    large, lie outside.
    """
    values = np.array([estimate.value for estimate in estimates])
    errors = np.array([estimate.error for estimate in estimates])
    count = len(values)
    spread = values.std(0, ddof=1)
    assert (np.abs(values.mean(0) - truth) < 4.5 * spread / count**0.5).all()
    z = (values - truth) / errors
    widening = (freedom / (freedom - 2)) ** 0.5  # of Student's t
    assert 0.82 < z.std(0).mean() / widening < 1.18
    inside = np.abs(z) < scipy.stats.t.ppf(0.975, freedom)
    assert 0.90 <= inside.mean() <= 0.99


@pytest.mark.parametrize("method, samples", [("hutchinson", 24), ("hutch++", 36)])
def test_errors_of_traces_cover(method, samples):
    matrix = matrix_of(DECAYING)
    estimates = [
        spectra.trace(matrix.mv, matrix.like, key, samples, method, mm=matrix.mm)
        for key in keys(REPETITIONS)
    ]
    freedom = {"hutchinson": samples, "hutch++": samples // 3}[method] - 1
    check_coverage(estimates, DECAYING.sum(), freedom)


SPECTRA = {
    "decaying": (DECAYING, 32),
    "flat": (np.linspace(1, 3, 60), 16),
    "positive": (np.abs(DECAYING), 12),
}


@pytest.mark.parametrize("name", cases(SPECTRA, ["decaying"]))
def test_errors_of_xtrace_cover(name):
    values, samples = SPECTRA[name]
    matrix = matrix_of(values)
    estimates = [
        spectra.trace(matrix.mv, matrix.like, key, samples, "xtrace", mm=matrix.mm)
        for key in keys(REPETITIONS)
    ]
    check_coverage(estimates, values.sum(), samples // 2 - 1)


def slow_and_fast(size):
    """Spectra by how fast XTrace's error falls with the number of vectors."""
    i = np.arange(1.0, size + 1)
    signed = np.where(np.arange(size) % 3, 1, -1)
    slow = [np.linspace(1, 3, size), i**-0.7, i**-0.7 * signed, 1 / i, 0.95**i]
    fast = [i**-2, i**-2 * signed, 0.8**i, 0.7**i, 0.5**i]
    fast += [np.where(i <= n, 1, x) for n, x in ((5, 0.01), (size // 10, 1e-3))]
    fast += [np.where(i <= size // 8, 1, -0.05)]
    return [(values, True) for values in slow] + [(values, False) for values in fast]


def xtraces(values, k, repetitions, rng):
    """Estimates and errors, in numpy; vectors are turned: a diagonal matrix is any."""
    matrix = flatten(lambda v: values * v, values)
    found = []
    for _ in range(repetitions):
        vectors = rng.normal(size=(len(values), k))
        vectors *= len(values) ** 0.5 / np.linalg.norm(vectors, axis=0)
        q, r = np.linalg.qr(values[:, None] * vectors)
        inner, inside = (q.T * values) @ q, q.T @ vectors
        found.append(spectra.leave_one_out(inner, r, inside, matrix))
    return np.array(found).T


@pytest.mark.slow
@pytest.mark.parametrize("size, k", [(40, 6), (40, 16), (200, 10), (300, 30)])
def test_errors_of_xtrace_over_many_spectra(size, k, rng):
    """What ``spectra.trace`` says: right where errors fall slowly, else no less."""
    figures = []
    for number, (values, slow) in enumerate(slow_and_fast(size)):
        found, errors = xtraces(values, k, 1000, rng)
        gaps = found - values.sum()
        ratio = np.sqrt((errors**2).mean()) / gaps.std()
        covered = [
            np.mean(np.abs(gaps) <= scipy.stats.t.ppf((1 + p) / 2, k - 1) * errors)
            for p in (0.68, 0.95)
        ]
        figures.append((number, ratio, *covered))
        assert abs(gaps.mean()) < 4.5 * gaps.std() / 1000**0.5
        assert covered[0] > 0.62 and covered[1] > 0.925, figures
        if slow:
            assert 0.93 < ratio < 1.2, figures
            assert covered[0] < 0.79 and covered[1] < 0.992, figures
    print(f"P = {size}, k = {k}: spectrum, error / truth, shares in 68 % and 95 %")
    print("\n".join("{:2} {:6.2f} {:.3f} {:.3f}".format(*row) for row in figures))


def test_errors_of_the_squared_norm_cover():
    matrix = matrix_of(DECAYING)
    estimates = [
        spectra.frobenius(matrix.mv, matrix.like, key, 40, mm=matrix.mm)
        for key in keys(REPETITIONS)
    ]
    check_coverage(estimates, (DECAYING**2).sum(), 39)


def test_errors_of_the_diagonal_cover():
    """All entries together: the errors of each are Student's."""
    matrix = matrix_of(DECAYING)

    def flat(estimate):
        return spectra.Estimate(*map(matrix.flat, estimate))

    estimates = [
        flat(spectra.diagonal(matrix.mv, matrix.like, key, 24, mm=matrix.mm))
        for key in keys(REPETITIONS)
    ]
    check_coverage(estimates, np.diag(matrix.dense), 23)


@functools.cache
def many_quadratures(size=150, samples=10):
    """Independent quadratures of a matrix with three different eigenvalues.

    Three steps exhaust every Krylov space: only the samples are left to chance.
    """
    values = np.repeat([-1.0, 0.5, 2.0], 8)
    matrix = matrix_of(values)
    found = spectra.quadrature(matrix.mv, matrix.like, KEY, size * samples, 6)

    def part(i):
        rows = slice(i * samples, (i + 1) * samples)
        fewer = tuple(x[rows] for x in found.fewer)
        return spectra.Quadrature(24, found.nodes[rows], found.weights[rows], fewer)

    return values, [part(i) for i in range(size)]


def test_errors_of_functions_cover():
    """Log determinant, a power and an indicator."""
    values, found = many_quadratures()
    samples = len(found[0].nodes)
    functions = [lambda x: np.log(x + 2), lambda x: x**3, lambda x: x > 0.75]
    for function in functions:
        estimates = [one.integrate(function) for one in found]
        check_coverage(estimates, function(values).sum(), samples - 1)


def test_errors_of_the_density_cover():
    values, found = many_quadratures()
    grid = np.array([-1.0, 0.2, 0.9, 2.1])
    estimates = [spectra.density_of(one, grid, 0.3) for one in found]
    kernel = np.exp(-((grid[:, None] - values) ** 2) / 0.18) / 0.3 / np.sqrt(2 * np.pi)
    check_coverage(
        [spectra.Estimate(e.density, e.error) for e in estimates],
        kernel.mean(1), len(found[0].nodes) - 1,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_xtrace_leave_vectors_out(seed):
    """Every term anew, from its definition, and the sums written out."""
    matrix, k = matrix_of(DECAYING), 7
    vectors = np.random.default_rng(seed).normal(size=(40, k))
    vectors *= 40**0.5 / np.linalg.norm(vectors, axis=0)

    def term(i, *others):
        left = np.delete(vectors, (i, *others), 1)
        q = np.linalg.qr(matrix.dense @ left)[0]
        v = vectors[:, i] - q @ (q.T @ vectors[:, i])
        rest = v @ matrix.dense @ v * (40 - q.shape[1]) / (v @ v)
        return np.trace(q.T @ matrix.dense @ q) + rest

    terms = np.array([term(i) for i in range(k)])
    products = np.array([
        [(term(i) - term(i, j)) * (term(j) - term(j, i)) for j in range(k) if j != i]
        for i in range(k)
    ])  # fmt: skip
    noise = np.std(2 * products.mean(1), ddof=1) / k**0.5
    q, r = np.linalg.qr(matrix.dense @ vectors)
    found = spectra.leave_one_out(
        q.T @ matrix.dense @ q, r, q.T @ vectors, flatten(matrix.mv, matrix.like)
    )
    np.testing.assert_allclose(found.value, terms.mean(), rtol=1e-10)
    wanted = (terms.var(ddof=1) / k + max(products.mean(), noise)) ** 0.5
    np.testing.assert_allclose(found.error, wanted, rtol=1e-8)


# --------------------------------------------------------- exact cases


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_traces_of_low_rank_are_exact(method, rank, rng):
    values = np.r_[rng.normal(size=rank), np.zeros(60 - rank)]
    matrix = matrix_of(values)
    found = spectra.trace(matrix.mv, matrix.like, KEY, 18, method)
    np.testing.assert_allclose(found.value, values.sum(), atol=1e-10)
    assert found.error < 1e-10


@hypothesis.given(spectra_lists(), st.sampled_from([6, 30]))
def test_traces_of_any_spectrum(values, samples):
    """Within six errors, and exact where the products span everything."""
    matrix = matrix_of(values)
    for method in METHODS:
        found = spectra.trace(matrix.mv, matrix.like, KEY, samples, method)
        assert np.isfinite(found).all() and found.error >= 0
        gap = abs(found.value - values.sum())
        if method != "hutchinson" and samples // 3 >= matrix.size:
            assert gap < 1e-9
        elif samples == 30:
            assert gap < 6 * found.error + 1e-9


def test_better_methods_have_smaller_errors():
    """On a spectrum that decays fast: the reason why they exist."""
    matrix = matrix_of(0.7 ** np.arange(60.0))
    errors = [
        spectra.trace(matrix.mv, matrix.like, KEY, 36, method).error
        for method in METHODS
    ]
    assert errors[0] > 10 * errors[1] > 10 * errors[2]


def test_diagonal_matrices_are_exact(rng):
    entries = rng.normal(size=30)
    found = spectra.diagonal(lambda v: entries * v, np.zeros(30), KEY, 11)
    np.testing.assert_allclose(found.value, entries, atol=1e-12)
    np.testing.assert_allclose(found.error, 0, atol=1e-12)


def test_diagonal_and_error_are_those_of_all_samples(rng):
    """Sums that run over blocks equal a mean and a deviation over all at once."""
    matrix = matrix_of(rng.normal(size=15))
    seen = []

    def mm(tree):
        seen.append(matrix.flat(tree, 1))
        return matrix.mm(tree)

    found = spectra.diagonal(matrix.mv, matrix.like, KEY, 21, mm=mm)
    vectors = np.concatenate(seen)
    samples = vectors * (vectors @ matrix.dense)
    assert len(samples) == 21
    np.testing.assert_allclose(matrix.flat(found.value), samples.mean(0), atol=1e-12)
    error = samples.std(0, ddof=1) / 21**0.5
    np.testing.assert_allclose(matrix.flat(found.error), error, atol=1e-12)


# --------------------------------------------------------- quadrature


@pytest.mark.parametrize("value", [3.0, 0.0])
def test_multiples_of_the_identity(value):
    matrix = matrix_of(np.full(20, value))
    found = spectra.logdet(matrix.mv, matrix.like, KEY, 0.5, 3, 10)
    np.testing.assert_allclose(found.value, 20 * np.log(value + 0.5), rtol=1e-12)
    assert found.error < 1e-10
    density = spectra.spectral_density(matrix.mv, matrix.like, KEY, 3, 10)
    np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1, 1e-8)
    peak = density.grid[density.density.argmax()]
    assert abs(peak - value) <= density.width


def test_the_density_integrates_to_one_and_has_the_matrix_moments():
    matrix = matrix_of(DECAYING)
    found = spectra.quadrature(matrix.mv, matrix.like, KEY, 60, 12)
    density = spectra.density_of(found)
    mass = np.trapezoid(density.density, density.grid)
    np.testing.assert_allclose(mass, 1, atol=1e-8)
    assert (density.density >= 0).all()
    for power in range(1, 6):
        exact = (DECAYING**power).sum()
        trace = found.integrate(lambda x, power=power: x**power)
        assert abs(trace.value - exact) < 4 * trace.error
        assert trace.error < 0.2 * (np.abs(DECAYING) ** power).sum()
    for power, widening in ((1, 0.0), (2, density.width**2)):
        moment = np.trapezoid(density.grid**power * density.density, density.grid)
        trace = found.integrate(lambda x, power=power: x**power)
        np.testing.assert_allclose(moment, trace.value / 40 + widening, rtol=1e-5)


def test_gauss_quadrature_has_its_degree():
    """The moments ``vᵀ M^k v`` of each sample are exact up to ``2 m − 1`` only."""
    matrix = matrix_of(DECAYING)
    found = spectra.quadrature(matrix.mv, matrix.like, KEY, 2, 4)
    for row, key in enumerate(jax.random.split(KEY, 2)):
        v = np.asarray(jax.random.rademacher(key, (1, 40), np.float64))[0]
        for power in range(9):
            form = v @ np.linalg.matrix_power(matrix.dense, power) @ v
            seen = 40 * (found.weights[row] * found.nodes[row] ** power).sum()
            assert (abs(seen - form) < 1e-9) == (power < 8), power


def test_too_few_steps_show_in_the_error():
    """The samples agree with each other, but not with the truth."""
    values = np.geomspace(0.01, 1, 80)
    matrix = matrix_of(values)
    truth = np.log(values + 0.01).sum()
    found = spectra.logdet(matrix.mv, matrix.like, KEY, 0.01, 100, 4)
    assert found.value > truth + 1  # too few steps err upwards
    assert abs(found.value - truth) < 3 * found.error
    better = spectra.logdet(matrix.mv, matrix.like, KEY, 0.01, 100, 30)
    assert abs(better.value - truth) < 4 * better.error
    assert better.error < found.error / 2


def test_log_determinants_want_positive_matrices():
    matrix = matrix_of(DECAYING)
    with pytest.raises(ValueError, match=r"Ritz value -1.*damping is 0.5; wanted"):
        spectra.logdet(matrix.mv, matrix.like, KEY, 0.5, 4, 20)


# ------------------------------------------------------------ products


@pytest.mark.parametrize("method", METHODS)
def test_blocks_give_the_same(method):
    """One product at a time or several, on the host or traced."""
    matrix = matrix_of(DECAYING)
    one = spectra.trace(matrix.mv, matrix.like, KEY, 22, method)
    several = spectra.trace(matrix.mv, matrix.like, KEY, 22, method, mm=matrix.mm)
    vmapped = jax.jit(jax.vmap(matrix.traced))
    jitted = spectra.trace(matrix.traced, matrix.like, KEY, 22, method, mm=vmapped)
    np.testing.assert_allclose(one, several, rtol=1e-9)
    np.testing.assert_allclose(one, jitted, rtol=1e-9)


def test_products_are_counted():
    """``num_samples`` is what is paid, and progress ends at its total."""
    matrix = matrix_of(DECAYING)
    for run in (
        *[functools.partial(spectra.trace, method=method) for method in METHODS],
        spectra.diagonal,
        spectra.frobenius,
    ):
        calls, seen = [], []

        def mv(tree, calls=calls):
            calls.append(1)
            return matrix.mv(tree)

        def progress(done, total, seen=seen):
            seen.append((done, total))

        run(mv, matrix.like, KEY, num_samples=12, progress=progress)
        assert len(calls) == 12 and seen == [(i, 12) for i in range(1, 13)]


def test_float32():
    matrix = matrix_of(DECAYING, dtype=np.float32)
    for method in METHODS:
        found = spectra.trace(matrix.mv, matrix.like, KEY, 24, method)
        assert abs(found.value - DECAYING.sum()) < 4 * found.error
    found = spectra.diagonal(matrix.mv, matrix.like, KEY, 24)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    low = matrix_of(np.r_[3.0, -1, np.zeros(58)], dtype=np.float32)
    for method in METHODS[1:]:
        found = spectra.trace(low.mv, low.like, KEY, 18, method)
        np.testing.assert_allclose(found.value, 2, atol=1e-4)


def test_errors_say_what_was_seen():
    matrix = matrix_of(DECAYING)
    mv, like = matrix.mv, matrix.like
    with pytest.raises(ValueError, match="method is 'exact', wanted"):
        spectra.trace(mv, like, KEY, 10, "exact")
    for method, least in zip(METHODS, [2, 4, 6], strict=True):
        wanted = f"num_samples is {least - 1}, wanted an integer of at least {least}"
        with pytest.raises(ValueError, match=wanted):
            spectra.trace(mv, like, KEY, least - 1, method)
    for run in (spectra.diagonal, spectra.frobenius):
        with pytest.raises(ValueError, match="num_samples is 1"):
            run(mv, like, KEY, 1)
    with pytest.raises(ValueError, match="num_steps is 0"):
        spectra.quadrature(mv, like, KEY, 2, 0)
    found = spectra.quadrature(mv, like, KEY, 2, 3)
    with pytest.raises(ValueError, match="width is 0.0, wanted"):
        spectra.density_of(found, width=0.0)
    with pytest.raises(ValueError, match=r"grid has shape \(2, 3\), wanted"):
        spectra.density_of(found, np.zeros((2, 3)))
    bad = lambda v: jax.tree.map(lambda x: x * np.inf, v)  # noqa: E731
    for run in (spectra.trace, spectra.diagonal, spectra.frobenius):
        with pytest.raises(FloatingPointError, match="not finite"):
            run(bad, like, KEY, 4)


# ----------------------------------------------------------- a peer


def test_xtrace_is_that_of_matfree():
    """The same vectors, the same estimate."""
    stochtrace = pytest.importorskip("matfree.stochtrace")
    matrix = matrix_of(DECAYING)
    dense = jnp.asarray(matrix.dense)
    theirs = stochtrace.estimator_leave_one_out(
        stochtrace.leave_one_out_xtrace(),
        stochtrace.sampler_sphere(jnp.zeros(40), num=11),
    )
    run = jax.jit(lambda key: theirs(lambda v: dense @ v, key))
    for key in keys(5):
        found = spectra.trace(matrix.mv, matrix.like, key, 22, "xtrace")
        np.testing.assert_allclose(found.value, run(key), rtol=1e-10)


def test_quadrature_is_that_of_matfree():
    decomp = pytest.importorskip("matfree.decomp")
    funm = pytest.importorskip("matfree.funm")
    matrix = matrix_of(DECAYING)
    dense = jnp.asarray(matrix.dense)
    form = funm.monte_carlo_funm_sym(
        funm.dense_funm_sym_eigh(jnp.exp), decomp.tridiag_sym(6, reortho="full")
    )
    run = jax.jit(lambda v: form(lambda x: dense @ x, v))
    found = spectra.quadrature(matrix.mv, matrix.like, KEY, 3, 6)
    samples = 40 * (found.weights * np.exp(found.nodes)).sum(1)
    for key, sample in zip(jax.random.split(KEY, 3), samples, strict=True):
        v = jax.random.rademacher(key, (1, 40), np.float64)[0]
        np.testing.assert_allclose(run(v), sample, rtol=1e-10)


def test_matfree_wants_a_traceable_product():
    """Why its algorithms are not used: products here may run on the host."""
    decomp = pytest.importorskip("matfree.decomp")
    run = decomp.tridiag_sym(3, reortho="full")
    with pytest.raises(jax.errors.TracerArrayConversionError):
        run(lambda v: np.asarray(v) * 2.0, jnp.arange(1.0, 9.0))
