"""The survey's matrices and figures against matrices made another way, in numpy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

import kfac_jax_lite as kfac
from experiments.survey import config as configs
from experiments.survey import measure, problem

CLASSES, DAMPING = 3, 0.1


@pytest.fixture(scope="module", autouse=True)
def single():
    """The precision of the tests, for what they share."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def cell(single):
    """A small network with layer norms, its point, and the key of its labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((14, 1, 3, 1), np.float32)
    y = rng.integers(0, CLASSES, 14).astype(np.int32)
    given = problem.Data("random", "numpy", CLASSES, x, y, x[:5], y[:5])
    config = dataclasses.replace(configs.TINY, rows=8, width=2)
    found = problem.make_problem(config, "norm_mlp", given)
    assert [len(labels) for _, labels in found.batches] == [7, 7]
    params = found.init(jax.random.key(1))
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
    )
    return found, params, jax.random.key(5)


@pytest.fixture(scope="module")
def full(cell):
    return measure.full_matrices(*cell)


@pytest.fixture(scope="module")
def spectra(cell):
    return measure.dense_spectra(*cell)


def close(found, wanted, tol=2e-5):
    np.testing.assert_allclose(found, wanted, atol=tol * np.abs(wanted).max())


def test_matrices_are_those_of_single_examples(cell, full):
    """Hessian, gradients and expectations over labels, example by example."""
    found, params, _ = cell
    flat, unravel = ravel_pytree(params)
    x, y = found.data.x_train, found.data.y_train

    def loss(flat, one, label):
        return found.loss(unravel(flat), one[None], label[None])

    def log_probabilities(flat, one):
        return jnp.stack([-loss(flat, one, jnp.int32(c)) for c in range(CLASSES)])

    def whole(flat):
        return jnp.mean(jax.vmap(lambda a, b: loss(flat, a, b))(x, y))

    close(full["hessian"], jax.jit(jax.hessian(whole))(flat))
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(flat, x, y)
    gradients = np.asarray(gradients, np.float64)
    close(full["gradient_covariance"], np.cov(gradients.T, bias=True))
    scores = jax.jit(jax.vmap(jax.jacrev(log_probabilities), (None, 0)))(flat, x)
    p = jnp.exp(jax.jit(jax.vmap(log_probabilities, (None, 0)))(flat, x))
    close(full["fisher"], np.einsum("nc,ncp,ncq->pq", p, scores, scores) / len(y))
    # A sampled label is one of the classes: rank at most one for every example.
    sampled = full["mc_fisher"]
    assert np.linalg.matrix_rank(sampled, tol=1e-6) <= len(y)
    assert np.linalg.eigvalsh(sampled)[0] > -1e-7


FEW = [
    ("mc_fisher", "full"),
    ("fisher", "block_diagonal"),
    ("hessian", "kronecker"),
]
OTHERS = [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(configs.MATRICES, configs.APPROXIMATIONS)
    if pair not in FEW
]


@pytest.mark.parametrize(("name", "approximation"), [*FEW, *OTHERS])
def test_matrices_and_their_parts_are_the_operators(cell, spectra, name, approximation):
    found, params, key = cell
    options = {"key": key} if name == "mc_fisher" else {}
    make = getattr(kfac.curvature, name)
    operator = make(found.tagged, params, found.batches, approximation, **options)
    close(spectra[approximation][name].matrix, operator.to_dense(), 2e-4)


def hand_made():
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((k, k)) for k in (3, 1, 11)]
    blocks = [part + part.T for part in parts]
    order = rng.permutation(15)
    places = np.split(order, [3, 4])
    matrix = np.zeros((15, 15))
    for place, block in zip(places, blocks, strict=True):
        matrix[np.ix_(place, place)] = block
    noise = rng.standard_normal((15, 15))
    return matrix, places, matrix + 0.1 * (noise + noise.T)


def test_blocks_are_cut_out_and_decomposed():
    wanted, places, around = hand_made()
    found = measure.decompose(around, places)
    mask = np.zeros((15, 15), bool)
    for place in places:
        mask[np.ix_(place, place)] = True
    kept = np.where(mask, around, 0)
    np.testing.assert_allclose(found.matrix, kept)
    values, vectors = np.linalg.eigh(kept)
    np.testing.assert_allclose(found.all_values, values[::-1])
    np.testing.assert_allclose(
        found.top @ found.top.T, vectors[:, -10:] @ vectors[:, -10:].T, atol=1e-8
    )
    diagonal = measure.decompose(around, None)
    np.testing.assert_allclose(diagonal.matrix, np.diag(np.diag(around)))
    best = np.argsort(-np.diag(around))[:10]
    np.testing.assert_allclose(diagonal.top, np.eye(15)[:, best])


@pytest.mark.parametrize("which", ["blocks", "diagonal"])
def test_measures_by_their_definitions(which):
    """With a matrix whose negative eigenvalues are taken as zero."""
    _, places, around = hand_made()
    one = measure.decompose(around, places if which == "blocks" else None)
    values, vectors = np.linalg.eigh(one.matrix)
    positive = vectors @ np.diag(np.maximum(values, 0)) @ vectors.T
    shifted = positive + DAMPING * np.eye(15)
    found = measure.figures(one.all_values, DAMPING)
    sign, log_det = np.linalg.slogdet(shifted)
    assert sign == 1
    wanted = {
        "trace": np.trace(one.matrix),
        "frobenius": np.linalg.norm(one.matrix),
        "stable_rank": (np.linalg.norm(one.matrix) / np.linalg.norm(one.matrix, 2))
        ** 2,
        "effective_dimension": np.trace(np.linalg.solve(shifted, positive)),
        "condition_number": np.linalg.cond(shifted),
        "log_det": log_det,
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    np.testing.assert_allclose(found["eigenvalues"], values[::-1][:10])
    covariance = np.cov(np.random.default_rng(0).standard_normal((15, 40)))
    assert one.quotient(covariance, DAMPING) == pytest.approx(
        np.trace(np.linalg.solve(shifted, covariance))
    )


def test_differences_by_their_definitions():
    _, places, around = hand_made()
    full = measure.decompose(around, [np.arange(15)])
    one = measure.decompose(around, places)
    found = measure.differences(one, full)
    apart = one.matrix - around
    norm = np.linalg.norm
    assert found["error"] == pytest.approx(norm(apart) / norm(around))
    assert found["spectral_error"] == pytest.approx(
        norm(apart, 2) / norm(around, 2), rel=1e-4
    )
    inner = np.trace(one.matrix @ around)
    assert found["cosine"] == pytest.approx(inner / norm(one.matrix) / norm(around))
    angles = scipy.linalg.subspace_angles(one.top, full.top)
    assert found["overlap"] == pytest.approx(np.mean(np.cos(angles) ** 2))
    assert measure.differences(full, full) == {
        "error": 0.0, "spectral_error": 0.0, "cosine": 1.0, "overlap": 1.0,
    }  # fmt: skip


def test_rows_compare_the_matrices_in_their_order(cell, full, spectra):
    rows = measure.rows_of(spectra, 14, DAMPING)
    (row,) = [
        r for r in rows if (r["matrix"], r["approximation"]) == ("fisher", "full")
    ]
    wanted = [
        np.vdot(full["fisher"], full[name])
        / np.linalg.norm(full["fisher"])
        / np.linalg.norm(full[name])
        for name in ("hessian", "fisher", "mc_fisher", "gradient_covariance")
    ]
    np.testing.assert_allclose(row["cosines"], wanted, rtol=1e-6)
    assert row["overlaps"][1] == pytest.approx(1)
    shifted = full["fisher"] + DAMPING * np.eye(len(full["fisher"]))
    penalty = np.trace(np.linalg.solve(shifted, full["gradient_covariance"])) / 14
    assert row["tic"] == pytest.approx(penalty, rel=1e-4)


def test_zero_matrix_has_no_cosine():
    zero = measure.decompose(np.zeros((12, 12)), [np.arange(12)])
    assert np.isnan(measure.figures(zero.all_values, DAMPING)["stable_rank"])
    assert np.isnan(measure.differences(zero, zero)["cosine"])


def test_numbers_are_rounded():
    assert measure.rounded({"a": [np.float64(1.23456), 7], "b": None, "c": "x"}) == {
        "a": [1.235, 7],
        "b": None,
        "c": "x",
    }


def test_state_of_a_network(cell):
    found, params, _ = cell
    config = dataclasses.replace(configs.TINY, sharpness_radius=0.1)
    state = measure.state_of(config, found, params)
    given = found.data
    loss = float(found.loss(params, given.x_train, given.y_train))
    assert state["train_loss"] == pytest.approx(loss, rel=1e-5)
    grads = jax.grad(found.loss)(params, given.x_train, given.y_train)
    flat = np.asarray(ravel_pytree(grads)[0])
    assert state["gradient_norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-4)
    # To first order the loss rises by the radius times the gradient's length.
    assert state["sharpness"] >= 0.8 * 0.1 * np.linalg.norm(flat)
    assert 0 <= state["test_accuracy"] <= 1


def spread(matrix, count):
    """Standard error of Hutchinson's mean over so many vectors of signs."""
    square = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    return np.sqrt(square / count)


@pytest.mark.slow
def test_estimates_are_near_the_exact_figures(cell, spectra):
    """What is exact is equal; estimates are within four standard errors."""
    exact = measure.rows_of(spectra, 14, DAMPING)
    found = measure.estimated_rows(*cell, DAMPING)
    for row, wanted in zip(found, exact, strict=True):
        name, approximation = row["matrix"], row["approximation"]
        told = str((name, approximation))
        assert (name, approximation) == (wanted["matrix"], wanted["approximation"])
        assert set(row) == set(wanted)
        if approximation == "diagonal":
            continue  # entry by entry an estimate
        scale = max(np.abs(wanted["eigenvalues"]).max(), 1e-3)
        np.testing.assert_allclose(
            row["eigenvalues"], wanted["eigenvalues"], atol=2e-3 * scale, err_msg=told
        )
        condition = pytest.approx(wanted["condition_number"], rel=1e-2)
        assert row["condition_number"] == condition, told
        matrix = spectra[approximation][name].matrix
        values, vectors = np.linalg.eigh(matrix)
        shares = np.maximum(values, 0) / (np.maximum(values, 0) + DAMPING)
        shares = vectors @ np.diag(shares) @ vectors.T
        errors = {
            "trace": spread(matrix, measure.SAMPLES),
            "effective_dimension": spread(shares, measure.VECTORS),
        }
        closed = approximation == "kronecker"
        for column, error in errors.items():
            margin = 1e-3 if closed else 4 * error + 1e-3
            assert abs(row[column] - wanted[column]) < margin, (told, column)
        assert (row["tic"] is None) == (name == "hessian")
        near = pytest.approx(wanted["spectral_error"], abs=0.02)
        assert row["spectral_error"] == near, told
        parted = [
            spectra[form][name].all_values[9] - spectra[form][name].all_values[10]
            for form in (approximation, "full")
        ]
        if min(parted) > 1e-3 * scale:  # else the ten are not determined
            near = pytest.approx(wanted["overlap"], abs=0.02)
            assert row["overlap"] == near, told
