"""Squares of single examples' gradients against explicit Jacobians, in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models, oracles
from tests.helpers import cases, close
from tests.statistics.test_statistics import conv_models, dense_models

# Their examples meet in a norm over the batch, or a row is several examples'.
NAMES = [m.name for m in models.MODELS]
FAST = ["twice", "conv2d", "layer_norm"]


def expected(model, params, x, y):
    """``(1/N) Σ_n g_n²`` by one explicit gradient after the other."""

    def loss(params, n, t):
        # The term alone: what the whole batch gives, picked.
        run = model.traced or (lambda p, v: model.forward(p, v, oracles.no_hook))
        output = run(params, x)
        flat = output.reshape(-1, output.shape[-1])
        target = y.reshape(-1, *y.shape[1 + len(model.terms) :])
        at = n * flat.shape[0] // len(x) + t
        return oracles.mean_loss(
            model.likelihood, flat[at][None], target[at][None], model.variance
        )

    per = int(np.prod(model.terms))
    rows = [(n, t) for n in range(len(x)) for t in range(per)]
    grads = [jax.grad(loss)(params, n, t) for n, t in rows]
    return jax.tree.map(lambda *g: sum(np.square(v) for v in g) / len(rows), *grads)


def fisher_diagonal(model, params, x, y, fisher):
    """The diagonal of the dense Fisher matrix, as a tree."""
    dense = oracles.dense_fisher(model, params, x, y, fisher)
    return jax.flatten_util.ravel_pytree(params)[1](jnp.asarray(np.diag(dense)))


def seen(model, params, x, y, **options):
    """The same by the library."""
    tagged = model.tag(len(x), statistics="squares", **options)
    return compare(tagged, model.plain_loss, params, x, y)


def compare(tagged, loss, params, *batch):
    """The library's squares; its gradient must be the plain one."""

    @jax.jit
    def run(params, *batch):
        _, grads, statistics = tagged.value_and_grad(params, *batch)
        found = kfac.bayes.squares(tagged.layers, statistics, params)
        return found, grads, jax.grad(loss)(params, *batch)

    found, grads, plain = run(params, *batch)
    close(grads, plain)
    return found


@pytest.mark.parametrize("name", cases(NAMES, FAST))
def test_table_of_models(name):
    model = models.BY_NAME[name]
    if model.diagonal:
        pytest.skip("a parameter without a rule has no squares")
    params, (x, y) = model.params(), model.batch(3)
    close(seen(model, params, x, y), expected(model, params, x, y), 1e-9)


EXACT = ["mlp", "bernoulli", "normal", "language", "heads_out", "recurrent", "twice"]
EXACT += ["conv2d", "groups", "all_dilations", "layer_norm", "einsum_oi", "chwn"]


@pytest.mark.parametrize("name", cases(EXACT, ["normal", "groups"]))
def test_exact_fisher_is_the_diagonal_of_the_gauss_newton_matrix(name):
    """Several columns of the output's root: their squares add up."""
    model = models.BY_NAME[name]
    params, (x, y) = model.params(), model.batch(3)
    found = seen(model, params, x, y, fisher="exact")
    close(found, fisher_diagonal(model, params, x, y, "exact"), 1e-9)


@pytest.mark.slow
def test_sampled_labels_estimate_that_diagonal():
    """Mean of 4000 keys, within five standard errors of every entry."""
    model = models.BY_NAME["mlp"]
    params, (x, y) = model.params(), model.batch(3)
    tagged = model.tag(3, statistics="squares", fisher="mc")

    @jax.jit
    @jax.vmap
    def draw(key):
        statistics = tagged.value_and_grad(params, x, y, key=key)[-1]
        return kfac.bayes.squares(tagged.layers, statistics, params)

    draws = draw(jax.random.split(jax.random.key(0), 4000))
    wanted = fisher_diagonal(model, params, x, y, "exact")
    for found, exact in zip(*map(jax.tree.leaves, (draws, wanted)), strict=True):
        error = found.std(0) / np.sqrt(len(found))
        assert (np.abs(found.mean(0) - exact) < 5 * error + 1e-12).all()


# ---------------------------------------------------------------- random shapes


def check_random(model, examples, fisher, sharing="expand"):
    """The library's squares are the diagonal of the dense Fisher matrix."""
    params, (x, y) = model.params(), model.batch(examples)
    found = seen(model, params, x, y, fisher=fisher, weight_sharing=sharing)
    close(found, fisher_diagonal(model, params, x, y, fisher), 1e-9)


FISHERS = st.sampled_from(["empirical", "exact"])
SHARING = st.sampled_from(["expand", "reduce"])


def random_dense(model, examples, fisher, sharing):
    """Any dense network: a term of the loss sees its own row of every layer."""
    check_random(model, examples, fisher, sharing)


def random_convolution(model, examples, fisher, sharing):
    """Any convolution: an example has many rows, or one, or none."""
    check_random(model, examples, fisher, sharing)


def given(strategy, count):
    """A test of random models of a kind."""
    every = (strategy, st.integers(1, 4), FISHERS, SHARING)

    def decorate(function):
        return hypothesis.settings(max_examples=count)(
            hypothesis.given(*every)(function)
        )

    return decorate


test_random_dense = given(dense_models(), 3)(random_dense)
test_random_convolution = given(conv_models(), 2)(random_convolution)
test_many_dense = pytest.mark.slow(given(dense_models(), 40)(random_dense))
test_many_convolutions = pytest.mark.slow(given(conv_models(), 40)(random_convolution))


# ---------------------------------------------------------------- odd uses


def by_examples(loss, params, *batch):
    """``(1/N) Σ_n g_n²``: every example is a batch of its own."""

    def alone(*example):
        return jax.grad(loss)(params, *(v[None] for v in example))

    grads = jax.device_get(jax.jit(jax.vmap(alone))(*batch))
    return jax.tree.map(lambda g: np.square(g).mean(0), grads)


def check_loss(loss, params, *batch, oracle=None, **options):
    """The library's squares of a loss are those of its examples' gradients."""
    tagged = kfac.tag(loss, params, *batch, statistics="squares", **options)
    assert all(layer.kind != "diagonal" for layer in tagged.layers), str(tagged)
    found = compare(tagged, loss, params, *batch)
    close(found, by_examples(loss, params, *batch) if oracle is None else oracle, 1e-9)
    return tagged


def cross_entropy(logits, y, mask=None):
    """Mean over the rows that count."""
    logits = kfac.categorical(logits, mask=mask)
    terms = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)[..., 0]
    return (
        terms.mean() if mask is None else jnp.where(mask, terms, 0).sum() / mask.sum()
    )


def draws(rng, **shapes):
    """Normal parameters by name."""
    return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}


MASK = jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)


@pytest.mark.parametrize("fisher", cases(["empirical", "exact"], ["exact"]))
def test_masked_terms_do_not_count(rng, fisher):
    """Padded tokens: the same as the batch of tokens that are left."""
    params = draws(rng, w=(3, 4), b=(4,), v=(4, 5))
    x, y = (
        jnp.asarray(rng.normal(size=(4, 3, 3))),
        jnp.asarray(rng.integers(0, 5, (4, 3))),
    )

    def loss(p, x, y, mask):
        return cross_entropy(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], y, mask)

    def unmasked(p, x, y):
        return loss(p, x, y, jnp.ones(y.shape, bool))

    if fisher == "empirical":
        oracle = by_examples(unmasked, params, x[MASK], y[MASK])
    else:

        def term(flat, x):
            p = unravel(flat)
            return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]

        flat, unravel = jax.flatten_util.ravel_pytree(params)
        run = jax.jit(jax.vmap(lambda x: (term(flat, x), jax.jacrev(term)(flat, x))))
        output, jacobian = map(np.asarray, run(x[MASK]))
        root = oracles.output_root("categorical", output)
        columns = np.einsum("ncp,nck->nkp", jacobian, root)
        oracle = unravel(jnp.asarray(np.square(columns).sum(1).mean(0)))
    check_loss(loss, params, x, y, MASK, oracle=oracle, fisher=fisher)


@pytest.mark.parametrize("used", cases(["summed", "twice", "flat"], ["summed"]))
def test_embedding_with_repeated_tokens(rng, used):
    """A token that occurs again in an example adds to the same gradient."""
    params = draws(rng, table=(5, 3), v=(3, 4))
    tokens = jnp.asarray([[0, 0, 0, 1], [2, 1, 2, 1], [4, 4, 3, 0]])
    y = jnp.asarray([1, 3, 0])

    def loss(p, tokens, y):
        if used == "flat":  # rows of examples and positions in one axis
            rows = jnp.tanh(p["table"][tokens.reshape(-1)]).reshape(*tokens.shape, -1)
        else:
            rows = jnp.tanh(p["table"][tokens])
        if used == "twice":
            rows = rows * p["table"][tokens[:, ::-1]]
        return cross_entropy((rows * jnp.arange(1.0, 5)[:, None]).mean(1) @ p["v"], y)

    tagged = check_loss(loss, params, tokens, y)
    assert any(layer.kind == "embedding" for layer in tagged.layers)


@pytest.mark.parametrize("form", cases(["lookup", "autoencoder"], ["lookup"]))
def test_tied_weight(rng, form):
    """Both uses of a weight make one gradient: their products do not vanish."""
    if form == "lookup":
        params = draws(rng, table=(5, 3), bias=(5,))
        x = jnp.asarray([[0, 0, 2], [1, 4, 1], [3, 3, 3]])
        apply = lambda p, x: jnp.tanh(p["table"][x]).sum(1)  # noqa: E731
    else:
        params, x = draws(rng, table=(5, 3), bias=(5,)), rng.normal(size=(3, 5))
        apply = lambda p, x: jnp.tanh(x @ p["table"])  # noqa: E731

    def loss(p, x, y):
        return cross_entropy(apply(p, x) @ p["table"].T + p["bias"], y)

    tagged = check_loss(loss, params, jnp.asarray(x), jnp.asarray([1, 4, 0]))
    assert any(layer.tied for layer in tagged.layers)


def test_stacked_layers(rng):
    """Layers that ``scan`` stacks have squares each."""
    params = draws(rng, w=(3, 4, 4), b=(3, 4), v=(4, 3))

    def loss(p, x, y):
        body = lambda h, t: (jnp.tanh(h @ t[0] + t[1]), None)  # noqa: E731
        hidden = jax.lax.scan(body, x, (p["w"], p["b"]))[0]
        return cross_entropy(hidden.mean(1) @ p["v"], y)

    x = jnp.asarray(rng.normal(size=(5, 2, 4)))
    tagged = check_loss(loss, params, x, jnp.asarray([0, 1, 2, 1, 0]))
    assert {layer.stack for layer in tagged.layers} == {(), (3,)}


def test_large_layers_are_kept_whole(rng):
    """Squares have no factors, so their size does not matter."""
    params = draws(rng, w=(6, 7), v=(7, 3))

    def loss(p, x, y):
        return cross_entropy(jnp.tanh(x @ p["w"]) @ p["v"], y)

    x = jnp.asarray(rng.normal(size=(4, 6)))
    y = jnp.asarray([0, 1, 2, 1])
    check_loss(loss, params, x, y, max_factor_dim=2)


@pytest.mark.parametrize("name", cases(["mlp", "conv2d", "layer_norm"], ["conv2d"]))
def test_low_precision_is_summed_in_float32(name):
    """bfloat16 networks: close to float64, and at least float32 in type."""
    model = models.BY_NAME[name]
    params, (x, y) = model.params(jnp.bfloat16), model.batch(4, jnp.bfloat16)
    tagged = model.tag(4, jnp.bfloat16, statistics="squares")
    statistics = jax.jit(tagged.value_and_grad)(params, x, y)[-1]
    assert {v.dtype for v in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}
    found = jax.jit(lambda s: kfac.bayes.squares(tagged.layers, s, params))(statistics)
    high = jax.tree.map(lambda v: v.astype(jnp.float64), (params, x))
    wanted = fisher_diagonal(model, *high, y, "empirical")
    close(found, wanted, 0.05)


# ---------------------------------------------------------------- refusals

MLP = models.BY_NAME["mlp"]


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="statistics must be one of .*'cubes'"):
        MLP.tag(3, statistics="cubes")


def test_subsampled_squares_are_refused():
    with pytest.raises(ValueError, match="squares.* no subsample"):
        MLP.tag(3, statistics="squares", subsample=kfac.Subsample(2))


def test_rows_that_belong_to_no_example_are_refused(rng):
    """Three memories that all examples share."""
    x, y = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray([0, 1, 1, 0])
    fixed = jnp.asarray(rng.normal(size=(3, 4)))

    def loss(p, x, y):
        rows = jnp.tanh(fixed @ p["w"])
        return cross_entropy(x @ rows @ p["v"], y)

    params = draws(rng, w=(4, 5), v=(5, 2))
    wanted = r"layer w: .* belong to the 4 terms of the loss, got rows \(3,\)"
    tag = functools.partial(kfac.tag, loss, params, x, y)
    with pytest.raises(ValueError, match=wanted):
        tagged = tag(statistics="squares")
        tagged.value_and_grad(params, x, y)
    assert {layer.name for layer in tag().layers} == {"w", "v"}


def test_factors_are_no_squares():
    tagged = MLP.tag(3)
    params, batch = MLP.params(), MLP.batch(3)
    statistics = tagged.value_and_grad(params, *batch)[-1]
    with pytest.raises(ValueError, match="layer0 has KroneckerStatistics.*squares"):
        kfac.bayes.squares(tagged.layers, statistics, params)
