"""Laplace posteriors and priors against dense float64 matrices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import kfac_jax_lite as kfac
from kfac_jax_lite.bayes.laplace import laplace
from tests import information, models, oracles
from tests.helpers import cases, close, identical
from tests.laplace import (
    DATA,
    PRIOR,
    QUICK,
    STRUCTURES,
    TEMPERATURE,
    covariance,
    dense_ggn,
    mean_loss,
    posterior,
    precision,
    problem,
    root,
    run_mlp,
    uncertain,
)
from tests.oracles import no_hook

# ---------------------------------------------------------------- the covariance

EVERY = list(itertools.product(information.MODELS, STRUCTURES))
FAST = [("mlp", structure) for structure in QUICK] + [("embedding", "last_layer")]


@pytest.mark.parametrize(("name", "structure"), cases(EVERY, FAST))
def test_covariance_is_the_inverse(name, structure):
    r = root(posterior(name, structure), problem(name).params)
    close(r @ r.T, covariance(name, structure), 1e-9)


def z_scores(found, params, wanted, count):
    """Deviations of an empirical covariance, in standard errors; largest of the mean.

    Var of an entry is ``(Σ_ii Σ_jj + Σ_ij²) / n`` for normal draws.
    """
    keys = jax.random.split(jax.random.key(3), count)
    draw = jax.jit(jax.vmap(lambda key: found.draw(params, key)))(keys)
    flat = jax.vmap(lambda t: jax.flatten_util.ravel_pytree(t)[0])(draw)
    centred = np.asarray(flat - jax.flatten_util.ravel_pytree(params)[0])
    seen, d = centred.T @ centred / count, np.diag(wanted)
    error = np.sqrt((np.outer(d, d) + wanted**2) / count)
    return np.abs((seen - wanted) / error).max(), np.abs(
        centred.mean(0) / np.sqrt(d / count)
    ).max()


@pytest.mark.parametrize("structure", QUICK[:3])
def test_draws_have_the_covariance(structure):
    name, count = "bernoulli", 100_000
    case, found = problem(name), posterior(name, structure)
    wanted = covariance(name, structure)
    second, first = z_scores(found, case.params, wanted, count)
    assert second < 4.5 and first < 4.5
    if structure == "kronecker":
        # The test can tell: with a factor's basis the wrong way round it fails by far.
        swapped = [
            b if b.q_a is None else b._replace(q_a=jnp.swapaxes(b.q_a, 1, 2))
            for b in found.blocks
        ]
        wrong = dataclasses.replace(found, blocks=tuple(swapped))
        assert z_scores(wrong, case.params, wanted, count)[0] > 20


def test_draw_leaves_the_rest_alone():
    case, found = problem("mlp"), posterior("mlp", "last_layer")
    drawn = found.draw(case.params, jax.random.key(0))
    identical(drawn["layer0"], case.params["layer0"])
    assert found.names == ("layer1",) and found.size == 18
    assert np.all(
        np.asarray(drawn["layer1"]["kernel"] != case.params["layer1"]["kernel"])
    )


def test_one_layer_of_another_structure():
    case, keep = problem("mlp"), uncertain("mlp", "last_layer")
    options = {"num_data": DATA, "prior_precision": PRIOR, "temperature": TEMPERATURE}
    record = case.tagged, case.params, case.batches, "kronecker"
    found = laplace(*record, last_layer="layer1", **options)
    r = root(found, case.params)
    wanted = np.where(np.outer(keep, keep), covariance("mlp", "kronecker"), 0)
    close(r @ r.T, wanted, 1e-9)


def test_the_layer_before_last_by_name():
    case = problem("mlp")
    record = case.tagged, case.params, case.batches, "last_layer"
    found = laplace(*record, last_layer="layer0")
    place = ~uncertain("mlp", "last_layer")
    whole = np.zeros((len(place),) * 2)
    block = case.full("ggn")[np.ix_(place, place)]
    whole[np.ix_(place, place)] = np.linalg.inv(5 * block + np.eye(len(block)))
    r = root(found, case.params)
    close(r @ r.T, whole, 1e-9)


@pytest.mark.parametrize("structure", ["kronecker", "full"])
def test_sampled_labels(structure):
    case, key = problem("mlp"), jax.random.key(2)
    found = laplace(case.tagged, case.params, case.batches, structure, key=key)
    op = kfac.curvature.mc_fisher(
        case.tagged, case.params, case.batches, structure, key=key
    )
    wanted = np.linalg.inv(5 * np.asarray(op.to_dense()) + np.eye(case.flat.size))
    r = root(found, case.params)
    close(r @ r.T, wanted, 1e-9)


def test_masked_rows_do_not_count():
    model = models.mlp()
    x, y = model.batch(6)
    mask = jnp.array([True, False, True, True, False, True])

    def loss(params, x, y, mask):
        logits = kfac.categorical(model.forward(params, x, no_hook), mask)
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]
        return -jnp.where(mask, logs, 0).sum() / mask.sum()

    params = model.params()
    tagged = kfac.tag(loss, params, x, y, mask)
    for structure in ("last_layer", "full"):
        found = laplace(tagged, params, [(x, y, mask)], structure)
        rest = [(x[mask], y[mask])]
        plain = laplace(model.tag(4), params, rest, structure)
        assert found.num_data == 4
        close(found.log_likelihood, plain.log_likelihood, 1e-12)
        r, s = root(found, params), root(plain, params)
        close(r @ r.T, s @ s.T, 1e-10)


def test_float32_and_bfloat16_weights_keep_their_dtype():
    model = models.mlp()
    params, batch = model.params(np.float32), model.batch(4, np.float32)
    found = laplace(model.tag(4, np.float32), params, [batch])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for tree in (params, rounded):
        drawn = found.draw(tree, jax.random.key(0))
        jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail(), drawn, tree)
    assert found.blocks[0].values.dtype == jnp.float32


def test_traced_as_an_argument():
    case, found = problem("mlp"), posterior("mlp", "kronecker")
    count = 0

    @jax.jit
    def draw(posterior, params, key):
        nonlocal count
        count += 1
        return posterior.draw(params, key)

    key = jax.random.key(1)
    close(draw(found, case.params, key), found.draw(case.params, key), 1e-12)
    other = found.with_prior(3.0)
    close(draw(other, case.params, key), other.draw(case.params, key), 1e-12)
    assert count == 1


def test_entries_that_no_layer_reads():
    model = models.mlp()
    params, batch = model.params(), model.batch(4)

    def loss(params, x, y):
        return model.loss(params["net"], x, y)

    params = {"net": params, "unused": jnp.ones(2)}
    found = laplace(
        kfac.tag(loss, params, *batch), params, [batch], prior_precision=4.0
    )
    assert found.size == 45
    r = root(found, params)
    close((r @ r.T)[-2:, -2:], np.eye(2) / 4, 1e-12)  # the prior, untouched


# ---------------------------------------------------------------- the evidence


def dense_evidence(name, structure, prior, temperature=1.0):
    """The marginal likelihood from a determinant."""
    mean = np.asarray(problem(name).flat)[uncertain(name, structure)]
    matrix = precision(name, structure, prior, temperature)
    prior_density = scipy.stats.norm(0, prior**-0.5).logpdf(mean).sum()
    return (
        -DATA * mean_loss(name) / temperature
        + prior_density
        + len(mean) / 2 * np.log(2 * np.pi)
        - np.linalg.slogdet(matrix)[1] / 2
    )


@pytest.mark.parametrize("structure", cases(STRUCTURES, QUICK))
def test_evidence_is_the_dense_formula(structure):
    found = posterior("mlp", structure)
    priors = np.array([0.01, 1.0, 30.0])
    wanted = [dense_evidence("mlp", structure, p) for p in priors]
    seen = found.log_marginal_likelihood(priors)
    np.testing.assert_allclose(seen, wanted, rtol=1e-11)
    single = found.log_marginal_likelihood(30.0)
    assert isinstance(single, float) and single == seen[2]
    own = dense_evidence("mlp", structure, PRIOR, 0.5)
    seen = found.log_marginal_likelihood(temperature=0.5)
    np.testing.assert_allclose(seen, own, rtol=1e-11)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_prior_for_every_layer(structure):
    found, case = posterior("mlp", structure), problem("mlp")
    priors = {"layer0": 0.2, "layer1": 5.0}
    head = uncertain("mlp", "last_layer")
    wide = np.where(head, priors["layer1"], priors["layer0"])
    dense, flat = DATA * dense_ggn("mlp", structure), np.asarray(case.flat)
    r = root(found.with_prior(priors), case.params)
    close(r @ r.T, np.linalg.inv(dense / TEMPERATURE + np.diag(wide)), 1e-9)
    matrix = dense + np.diag(wide)
    wanted = (
        -DATA * mean_loss("mlp")
        + scipy.stats.norm(0, wide**-0.5).logpdf(flat).sum()
        + len(flat) / 2 * np.log(2 * np.pi)
        - np.linalg.slogdet(matrix)[1] / 2
    )
    np.testing.assert_allclose(
        found.log_marginal_likelihood(priors), wanted, rtol=1e-11
    )
    tuned = found.with_prior(priors)
    np.testing.assert_allclose(tuned.log_marginal_likelihood(), wanted, rtol=1e-11)


# ---------------------------------------------------------------- the prior


@pytest.mark.parametrize("structure", QUICK[:3])
def test_tuned_prior_is_the_maximum(structure):
    found = posterior("mlp", structure).tune_prior()
    best = float(found.prior_precision[0])
    grid = np.geomspace(1e-2, 1e2, 81)
    values = [dense_evidence("mlp", structure, p) for p in grid]
    top = int(np.argmax(values))
    assert grid[top - 1] < best < grid[top + 1]
    assert found.log_marginal_likelihood() >= values[top]
    near = dense_evidence("mlp", structure, best)
    for factor in (0.999, 1.001):
        assert near > dense_evidence("mlp", structure, best * factor)


def test_layerwise_prior_is_the_maximum():
    found = posterior("mlp", "kronecker")
    tuned = found.tune_prior(layerwise=True)
    best = dict(zip(tuned.names, map(float, tuned.prior_precision), strict=True))
    top = tuned.log_marginal_likelihood()
    assert top > found.tune_prior().log_marginal_likelihood()
    for name, factor in itertools.product(best, (0.99, 1.01)):
        other = {**best, name: factor * best[name]}
        assert top > found.log_marginal_likelihood(other)


def test_prior_at_the_bound():
    tuned = posterior("mlp", "kronecker").tune_prior(bounds=(50.0, 60.0))
    np.testing.assert_allclose(tuned.prior_precision, 50.0, rtol=1e-12)


def test_prior_by_validation():
    case, found = problem("mlp"), posterior("mlp", "kronecker")
    x, y = case.model.batch(30, seed=9)
    tuned = found.tune_prior(
        "validation", validation=(run_mlp, x, y), bounds=(1e-2, 1e2), num_points=9
    )
    j = oracles.parameter_jacobian(case.model, case.params, x)
    losses = []
    for p in (grid := np.geomspace(1e-2, 1e2, 9)):
        matrix = DATA / TEMPERATURE * dense_ggn("mlp", "kronecker")
        sigma = np.linalg.inv(matrix + p * np.eye(len(matrix)))
        s = np.einsum("ncp,pq,ncq->nc", j, sigma, j)
        logits = np.asarray(run_mlp(case.params, x)) / np.sqrt(1 + np.pi / 8 * s)
        losses.append(-np.log(oracles.softmax(logits))[np.arange(30), y].mean())
    np.testing.assert_allclose(
        tuned.prior_precision, grid[np.argmin(losses)], rtol=1e-9
    )
    seen = found.validation_loss(1.0, (run_mlp, x, y), {})
    np.testing.assert_allclose(seen, losses[4], rtol=1e-9)


# ---------------------------------------------------------------- errors


def made(structure="kronecker"):
    """A posterior that is there already."""
    return posterior("mlp", structure)


def make(structure="kronecker", **options):
    """A posterior of the small problem."""
    case = problem("mlp")
    return laplace(case.tagged, case.params, case.batches, structure, **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make("blocks"), "structure must be one of .* got 'blocks'"),
        (lambda: make(last_layer="head"), "'head' is not a layer .*'layer0', 'layer1'"),
        (lambda: make(prior_precision=0.0), "must be positive"),
        (lambda: make(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: make(num_data=-1), "num_data must be positive, got -1"),
        (lambda: make(prior_precision={"layer0": 1.0}), "wanted all of .*layer1"),
        (lambda: made().log_marginal_likelihood(-1.0), "must be positive"),
        (lambda: made().tune_prior("cv"), "method must be one of"),
        (lambda: made().tune_prior("validation"), "belong together"),
        (lambda: made("full").tune_prior(layerwise=True), "layers are independent"),
        (lambda: made().tune_prior(link="mc"), "of method='validation' only"),
        (lambda: made().draw({"a": jnp.ones(2)}, jax.random.key(0)), "4 leaves, got 1"),
    ],
)  # fmt: skip
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_shapes_in_errors():
    params = problem("mlp").params
    other = {**params, "layer1": jax.tree.map(lambda x: x[..., :2], params["layer1"])}
    with pytest.raises(
        ValueError, match=r"\['layer1'\]\['bias'\].* \(2,\), wanted \(3,"
    ):
        posterior("mlp", "kronecker").draw(other, jax.random.key(0))


def test_too_large_for_a_matrix():
    model = models.mlp("large", (90, 100, 3))
    with pytest.raises(ValueError, match="9,403 parameters, more than the 8,192"):
        laplace(model.tag(2), model.params(), [model.batch(2)], "full")


def test_a_curvature_that_is_not_finite():
    case = problem("mlp")
    bad = jax.tree.map(lambda x: x * jnp.nan, case.params)
    with pytest.raises(FloatingPointError, match="layer0, layer1 is not finite"):
        laplace(case.tagged, bad, case.batches, "diagonal")
