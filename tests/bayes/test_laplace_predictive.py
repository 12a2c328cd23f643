"""Laplace posteriors and predictions against exact ones, quadrature and dense S."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

import kfac_jax_lite as kfac
from kfac_jax_lite.bayes import predictive
from kfac_jax_lite.bayes.laplace import laplace
from kfac_jax_lite.bayes.predictive import (
    laplace_bridge,
    linearised_outputs,
    predict_glm,
)
from tests import oracles
from tests.helpers import cases, close
from tests.laplace import (
    QUICK,
    covariance,
    posterior,
    problem,
    root,
    run_mlp,
)
from tests.oracles import no_hook


@functools.cache
def regression(prior=0.3, variance=0.25):
    """A linear model at its maximum a posteriori, and its exact posterior."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 3))
    design = np.concatenate([x, np.ones((12, 1))], 1)
    y = design @ rng.normal(size=(4, 2)) + variance**0.5 * rng.normal(size=(12, 2))
    exact = np.linalg.inv(design.T @ design / variance + prior * np.eye(4))
    mean = exact @ design.T @ y / variance

    def loss(params, x, y):
        z = kfac.normal(apply(params, x), variance)
        return (jnp.square(y - z) / (2 * variance)).sum(1).mean()

    params = {"kernel": jnp.asarray(mean[:3]), "bias": jnp.asarray(mean[3])}
    batches = [(jnp.asarray(a), jnp.asarray(b)) for a, b in
               [(x[:5], y[:5]), (x[5:], y[5:])]]  # fmt: skip
    tagged = kfac.tag(loss, params, *batches[0])
    return tagged, params, batches, design, y, exact


def apply(params, x):
    """The linear model."""
    return x @ params["kernel"] + params["bias"]


@pytest.mark.parametrize(
    "structure", cases(["kronecker", "ekfac", "full", "last_layer"], QUICK[1:])
)
def test_linear_regression_is_exact(structure):
    prior, variance = 0.3, 0.25
    tagged, params, batches, design, y, exact = regression(prior, variance)
    options = {"prior_precision": prior, "variance": variance}
    found = laplace(tagged, params, batches, structure, **options)
    r = root(found, params)
    wanted = np.zeros((8, 8))  # bias [2] before kernel [3, 2]
    for o in range(2):
        place = np.array([2 + o, 4 + o, 6 + o, o])
        wanted[np.ix_(place, place)] = exact
    close(r @ r.T, wanted, 1e-10)
    marginal = variance * np.eye(12) + design @ design.T / prior
    log_density = scipy.stats.multivariate_normal(np.zeros(12), marginal).logpdf
    evidence = log_density(y.T).sum()
    np.testing.assert_allclose(found.log_marginal_likelihood(), evidence, rtol=1e-10)
    x = np.array([[0.5, -1.0, 2.0], [3.0, 0.0, 1.0]])
    at = np.concatenate([x, np.ones((2, 1))], 1)
    mean, spread = predict_glm(
        apply, found, params, jnp.asarray(x), likelihood="normal", variance=variance
    )
    close(mean, apply(params, x), 1e-12)
    one = np.einsum("ni,ij,nj->n", at, exact, at)[:, None] + variance
    close(spread, np.broadcast_to(one, (2, 2)), 1e-10)


# ------------------------------------------------- logistic regression, quadrature


@functools.cache
def logistic(prior=1.0):
    """Logistic regression with two weights at its maximum, and its exact posterior."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(80, 2)) @ np.array([[1.0, 0.4], [0.0, 0.8]])
    y = (rng.uniform(size=80) < scipy.special.expit(x @ [1.2, -0.8])).astype(float)

    def energy(w):
        z = np.asarray(w) @ x.T
        terms = np.logaddexp(0, z) - y * z
        return terms.sum(-1) + prior / 2 * np.square(w).sum(-1)

    best = scipy.optimize.minimize(energy, np.zeros(2), tol=1e-12).x
    axes = [np.linspace(b - 3, b + 3, 401) for b in best]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    log_joint = -energy(grid) + np.log(prior / (2 * np.pi))
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    evidence = scipy.special.logsumexp(log_joint) + np.log(cell)
    mass = np.exp(log_joint - evidence) * cell

    def loss(w, x, y):
        z = kfac.bernoulli(x @ w)
        return (jax.nn.softplus(z) - y * z).sum(1).mean()

    params, batch = (
        jnp.asarray(best)[:, None],
        (jnp.asarray(x), jnp.asarray(y)[:, None]),
    )
    tagged = kfac.tag(loss, params, *batch)
    found = laplace(tagged, params, [batch], "full", prior_precision=prior)
    return found, params, grid, mass, evidence


def test_logistic_regression_against_quadrature():
    """Mean within 0.2 deviations, covariance within 15 %, evidence within 0.05 nats."""
    found, params, grid, mass, evidence = logistic()
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-9)
    mean = np.einsum("ij,ijk->k", mass, grid)
    off = grid - mean
    exact = np.einsum("ij,ijk,ijl->kl", mass, off, off)
    r = root(found, params)
    seen = r @ r.T
    shift = np.abs(np.asarray(params)[:, 0] - mean) / np.sqrt(np.diag(exact))
    assert shift.max() < 0.2
    close(seen, exact, 0.15)
    assert abs(found.log_marginal_likelihood() - evidence) < 0.05


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_logistic_predictions_against_quadrature(link):
    """Probabilities within 0.02 of the exact posterior's, where the mean's are not."""
    found, params, grid, mass, _ = logistic()
    x = 4 * np.random.default_rng(1).normal(size=(20, 2))
    z = np.einsum("ijk,nk->nij", grid, x)
    exact = np.einsum("ij,nij->n", mass, scipy.special.expit(z))
    record = run_linear, found, params, jnp.asarray(x), jax.random.key(0)
    options = {"likelihood": "bernoulli", "link": link, "num_samples": 4000}
    seen = np.asarray(predict_glm(*record, **options))[:, 0]
    np.testing.assert_allclose(seen, exact, atol=0.02)
    plain = scipy.special.expit(x @ np.asarray(params))[:, 0]
    assert np.abs(plain - exact).max() > 0.03


def run_linear(w, x):
    """Logits of the logistic regression."""
    return x @ w


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full", "last_layer"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_output_covariance(structure, batch_size):
    case, found = problem("mlp"), posterior("mlp", structure)
    mean, s = linearised_outputs(run_mlp, found, case.params, case.x, batch_size)
    j = oracles.parameter_jacobian(case.model, case.params, case.x)
    close(mean, run_mlp(case.params, case.x), 1e-12)
    close(s, np.einsum("ncp,pq,ndq->ncd", j, covariance("mlp", structure), j), 1e-9)
    seen = predict_glm(run_mlp, found, case.params, case.x, batch_size=batch_size)
    scaled = np.asarray(mean) / np.sqrt(
        1 + np.pi / 8 * np.einsum("ncc->nc", np.asarray(s))
    )
    close(seen, oracles.softmax(scaled), 1e-10)


def test_sampled_link():
    """Draws of the logits against a product Gauss-Hermite rule, in standard errors."""
    rng, count = np.random.default_rng(0), 40_000
    half = rng.normal(size=(2, 3, 2))  # singular: rank two of three
    s, mean = half @ half.transpose(0, 2, 1), rng.normal(size=(2, 3))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1)
    p = oracles.softmax(mean[:, None, None] + np.einsum("nci,abi->nabc", half, noise))
    exact = np.einsum("a,b,nabc->nc", weights, weights, p)
    second = np.einsum("a,b,nabc->nc", weights, weights, p**2)
    key = jax.random.key(8)
    record = jnp.asarray(mean), jnp.asarray(s), key, count
    seen = predictive.sampled_mean(jax.nn.softmax, *record)
    error = np.sqrt((second - exact**2) / count)
    assert np.abs((np.asarray(seen) - exact) / error).max() < 4


def test_bridge_inverts_the_dirichlet():
    alpha = np.array([[0.5, 1.0, 4.0, 2.0], [9.0, 0.3, 0.2, 1.0]])
    k, inverse = alpha.shape[1], 1 / alpha
    mean = np.log(alpha) - np.log(alpha).mean(1, keepdims=True)
    s = inverse[:, :, None] * np.eye(k)
    s = (
        s
        - (inverse[:, :, None] + inverse[:, None] - inverse.mean(1)[:, None, None]) / k
    )
    shifted = (
        jnp.asarray(mean + 3.0),
        jnp.asarray(s + 2.0),
    )  # the softmax is blind to it
    close(laplace_bridge(*shifted), alpha / alpha.sum(1, keepdims=True), 1e-10)


def test_mean_nll():
    mean, variance, y = np.array([[0.0, 1.0]]), np.array([[1.0, 4.0]]), np.ones((1, 2))
    wanted = -scipy.stats.norm(mean, variance**0.5).logpdf(y).sum()
    normal = predictive.Normal(jnp.asarray(mean), jnp.asarray(variance))
    np.testing.assert_allclose(
        predictive.mean_nll("normal", normal, jnp.asarray(y)), wanted
    )
    p, labels = jnp.array([[0.25, 0.5], [0.1, 0.9]]), jnp.array([[1, 0], [0, 0]])
    wanted = -(np.log(0.25 * 0.5) + np.log(0.9 * 0.1)) / 2
    seen = predictive.mean_nll("bernoulli", p, labels)
    np.testing.assert_allclose(seen, wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"link": "logit"}, "link must be one of"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"link": "bridge", "likelihood": "bernoulli"}, "of a categorical"),
        ({"link": "mc"}, "pass key"),
    ],
)
def test_prediction_errors(options, words):
    case, found = problem("mlp"), posterior("mlp", "kronecker")
    with pytest.raises(ValueError, match=words):
        predict_glm(run_mlp, found, case.params, case.x, **options)


def test_bridge_wants_one_row_for_every_input():
    case, found = problem("language"), posterior("language", "last_layer")

    def run(params, x):
        return case.model.forward(params, x, no_hook)

    record = run, found, case.params, case.x
    assert predict_glm(*record).shape == (5, 2, 3)
    with pytest.raises(ValueError, match=r"logits \[n, classes\], got \(5, 2, 3\)"):
        predict_glm(*record, link="bridge")
