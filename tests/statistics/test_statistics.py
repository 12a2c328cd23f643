"""Factors against explicit per-example Jacobians, in float64."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.statistics import conv
from tests import models, oracles
from tests.helpers import cases, close, first_pass, homogeneous

BY_NAME = models.BY_NAME


def check(model, statistics, params, x, y=None, **options):
    """Statistics of every layer equal the oracle's."""
    run = oracles.Pass(model, params, x)
    for name, spec in model.layers.items():
        seen = statistics[name]
        if spec.kind == "scale_shift":
            fisher = options.get("fisher", "empirical")
            close(seen.blocks, run.blocks(name, y, fisher), 1e-9)
        else:
            close((seen.a, seen.g), run.factors(name, y, **options), 1e-9)


def statistics_of(model, x, y, key=None, **options):
    """Tag for this batch, run once, return the statistics."""
    tagged = model.tag(len(x), **options)
    return jax.jit(tagged.value_and_grad)(model.params(), x, y, key=key)[-1]


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_empirical_factors(model):
    x, y = model.batch(4)
    check(model, first_pass(model.name)[-1], model.params(), x, y)


REDUCED = ["mlp", "heads_out", "heads_in", "linen_dense_general", "twice", "recurrent"]
REDUCED += ["conv1d", "conv2d", "all_dilations", "groups", "depthwise", "chwn"]


FAST_REDUCED = ["heads_in", "recurrent", "all_dilations", "groups"]


@pytest.mark.parametrize("name", cases(REDUCED, FAST_REDUCED))
def test_reduced_factors(name):
    model = BY_NAME[name]
    x, y = model.batch(4)
    statistics = first_pass(name, weight_sharing="reduce")[-1]
    check(model, statistics, model.params(), x, y, sharing="reduce")


EXACT = ["mlp", "bernoulli", "normal", "heads_out", "recurrent", "conv1d", "groups"]
EXACT += ["layer_norm", "rms_norm", "twice"]


FAST_EXACT = [(name, "expand") for name in EXACT[:3]]
FAST_EXACT += [("conv1d", "expand"), ("layer_norm", "expand"), ("heads_out", "reduce")]


@pytest.mark.parametrize(
    ("name", "sharing"),
    cases(itertools.product(EXACT, ["expand", "reduce"]), FAST_EXACT),
)
def test_exact_factors(name, sharing):
    model = BY_NAME[name]
    x, _ = model.batch(4)
    statistics = first_pass(name, fisher="exact", weight_sharing=sharing)[-1]
    check(model, statistics, model.params(), x, fisher="exact", sharing=sharing)


# ---------------------------------------------------------------- random shapes


@st.composite
def dense_models(draw):
    """A dense network of random sizes, sharing, bias and likelihood."""
    size = st.integers(1, 5)
    likelihood = draw(st.sampled_from(["categorical", "bernoulli", "normal"]))
    hidden = draw(st.lists(size, max_size=2))
    return models.mlp(
        "random", (draw(size), *hidden, draw(size)), bias=draw(st.booleans()),
        positions=draw(st.sampled_from([(), (1,), (2,), (2, 2)])),
        likelihood=likelihood,
        variance=draw(st.sampled_from([1.0, 0.3])) if likelihood == "normal" else 1.0,
    )  # fmt: skip


@st.composite
def conv_models(draw):
    """A convolution of random rank, kernel, stride, padding, dilation and groups."""
    rank = draw(st.integers(1, 2))
    many = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * rank))  # noqa: E731
    kernel, groups = many(1, 3), draw(st.sampled_from([1, 1, 2]))
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    channels, features = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return models.convolution(
        "random", kernel, size=5, strides=many(1, 2),
        padding=draw(st.tuples(*[pair] * rank)),
        channels=groups * channels, features=groups * features, groups=groups,
        lhs=many(1, 2), rhs=many(1, 2), bias=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def norm_models(draw):
    """A norm of random width, axes and parameters, written by hand."""
    scale = draw(st.booleans())
    axes = draw(st.sampled_from([(-1,), (0,), (0, 1)]))
    return models.norm(
        "random", lambda x: (x, axes), None, scale=scale,
        shift=draw(st.booleans()) or not scale, mean=draw(st.booleans()),
        x_shape=(draw(st.integers(1, 2)), draw(st.integers(2, 4))),
    )  # fmt: skip


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    dense_models(), st.integers(1, 4), st.sampled_from(["empirical", "exact"])
)
def test_random_dense(model, examples, fisher):
    x, y = model.batch(examples)
    statistics = statistics_of(model, x, y, fisher=fisher)
    check(model, statistics, model.params(), x, y, fisher=fisher)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    conv_models(), st.integers(1, 3), st.sampled_from(["expand", "reduce"])
)
def test_random_convolution(model, examples, sharing):
    x, y = model.batch(examples)
    statistics = statistics_of(model, x, y, weight_sharing=sharing)
    check(model, statistics, model.params(), x, y, sharing=sharing)


@hypothesis.settings(max_examples=5)
@hypothesis.given(norm_models(), st.integers(2, 4))
def test_random_norm(model, examples):
    x, y = model.batch(examples)
    check(model, statistics_of(model, x, y), model.params(), x, y)


# ---------------------------------------------------------------- exact cases


@hypothesis.settings(max_examples=5)
@hypothesis.given(dense_models())
def test_one_example_gives_the_exact_empirical_block(model):
    hypothesis.assume(not model.terms)
    x, y = model.batch(1)
    statistics = statistics_of(model, x, y)
    grads = jax.jit(jax.grad(model.plain_loss))(model.params(), x, y)
    for name in model.layers:
        v = homogeneous(model, name, grads)[0].ravel()
        close(np.kron(statistics[name].a, statistics[name].g), np.outer(v, v), 1e-10)


@pytest.mark.parametrize("name", cases(["heads_out", "conv2d", "twice"], ["twice"]))
def test_one_example_reduced_differs_only_by_sharing(name):
    """A layer with one position is exact in both settings; the head is one."""
    model = BY_NAME[name]
    x, y = model.batch(1)
    grads = jax.jit(jax.grad(model.plain_loss))(model.params(), x, y)
    v = homogeneous(model, "head", grads)[0].ravel()
    for sharing in ("expand", "reduce"):
        seen = statistics_of(model, x, y, weight_sharing=sharing)["head"]
        close(np.kron(seen.a, seen.g), np.outer(v, v), 1e-10)


@pytest.mark.parametrize("sizes", cases([((4, 3),), ((4, 3, 2),)], [((4, 3, 2),)]))
def test_exact_fisher_of_a_linear_network_with_normal_noise(sizes):
    """There G does not depend on the example, so every block of K-FAC is exact."""
    model = models.mlp(
        "linear", sizes, bias=False, likelihood="normal", act=lambda x: x
    )
    x, y = model.batch(4)
    statistics = statistics_of(model, x, y, fisher="exact")
    fisher = oracles.dense_fisher(model, model.params(), x, fisher="exact")
    start = 0
    for name, kernel in ((n, p["kernel"]) for n, p in model.params().items()):
        block = fisher[start : start + kernel.size, start : start + kernel.size]
        close(np.kron(statistics[name].a, statistics[name].g), block, 1e-10)
        start += kernel.size


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_scale_shift_blocks_are_exact(fisher):
    """The unit-wise blocks are the diagonal blocks of the dense Fisher itself."""
    model = BY_NAME["layer_norm"]
    x, y = model.batch(3)
    dense = oracles.dense_fisher(model, model.params(), x, y, fisher)
    order = {"head": 3 * 4 * 3 + 3, "bias": 4, "scale": 4}  # ravelled: sorted keys
    shift, scale = order["head"] + np.arange(4), order["head"] + 4 + np.arange(4)
    blocks = first_pass("layer_norm", 3, fisher=fisher)[-1]["layer"].blocks
    for u, block in enumerate(np.asarray(blocks)):
        at = [scale[u], shift[u]]
        close(block, dense[np.ix_(at, at)], 1e-10)


# ---------------------------------------------------------------- Monte Carlo


def test_monte_carlo_samples_the_model(rng):
    """Two examples of two classes: G is one of four matrices, as often as it should."""
    del rng
    model = models.mlp("two", (3, 3, 2))
    params, (x, y) = model.params(), model.batch(2)
    tagged = model.tag(2, fisher="mc")
    keys = jax.random.split(jax.random.key(0), 400)
    run = jax.jit(jax.vmap(lambda k: tagged.value_and_grad(params, x, y, key=k)))
    values, grads, statistics = run(keys)
    wanted = jax.value_and_grad(model.plain_loss)(params, x, y)
    close(jax.tree.map(lambda v: v[0], (values, grads)), wanted, 1e-12)
    reference = oracles.Pass(model, params, x)
    labels = [jnp.array(pair) for pair in itertools.product(range(2), repeat=2)]
    p = oracles.softmax(reference.output)
    for name in model.layers:
        cases = [reference.factors(name, label) for label in labels]
        g = np.asarray(statistics[name].g)
        distance = [np.abs(g - case[1]).max((1, 2)) for case in cases]
        assert np.min(distance, 0).max() < 1e-10
        counts = np.bincount(np.argmin(distance, 0), minlength=4) / len(keys)
        chance = [p[0, a] * p[1, b] for a, b in np.asarray(labels)]
        np.testing.assert_allclose(counts, chance, atol=0.1)
        close(statistics[name].a[0], cases[0][0], 1e-10)


@pytest.mark.parametrize(
    "name",
    cases(["bernoulli", "normal", "layer_norm", "conv1d"], ["bernoulli", "normal"]),
)
def test_monte_carlo_mean_is_exact(name):
    model = BY_NAME[name]
    params, (x, y) = model.params(), model.batch(2)
    tagged = model.tag(2, fisher="mc")
    keys = jax.random.split(jax.random.key(1), 4000)
    run = jax.vmap(lambda k: tagged.value_and_grad(params, x, y, key=k)[-1])
    samples = jax.jit(run)(keys)
    reference = oracles.Pass(model, params, x)
    for layer, spec in model.layers.items():
        if spec.kind == "scale_shift":
            g, wanted = samples[layer].blocks, reference.blocks(layer, fisher="exact")
        else:
            g, wanted = samples[layer].g, reference.factors(layer, fisher="exact")[1]
        g = np.asarray(g)
        error = g.std(0) / np.sqrt(len(keys))
        assert (np.abs(g.mean(0) - wanted) <= 5 * error + 1e-12).all()


def test_monte_carlo_is_a_function_of_the_key():
    model = BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    run = jax.jit(model.tag(4, fisher="mc").value_and_grad)
    first, again, other = (
        run(*args, key=jax.random.key(seed))[-1]["layer0"].g for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


def test_two_marked_outputs(rng):
    """Independent outputs add up: two halves marked one by one are the whole."""
    params = {"w": jnp.asarray(rng.normal(size=(4, 5)))}
    x, y = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(3, 5)))

    def whole(p, x, y):
        return 0.5 * jnp.square(kfac.normal(x @ p["w"]) - y).sum(-1).mean()

    def halves(p, x, y):
        z = x @ p["w"]
        z = jnp.concatenate([kfac.normal(z[:, :2]), kfac.normal(z[:, 2:])], -1)
        return 0.5 * jnp.square(z - y).sum(-1).mean()

    args = (params, x, y)
    one, two = (
        kfac.tag(f, *args, fisher="exact").value_and_grad(*args)[-1]
        for f in (whole, halves)
    )
    close(two, one, 1e-10)
    close(one["w"].g, np.eye(5), 1e-10)


def test_language_model_exact():
    """With a term per token and no mixing of tokens, every row is a term."""
    model = BY_NAME["language"]
    x, _ = model.batch(3)
    statistics = first_pass("language", 3, fisher="exact")[-1]
    check(model, statistics, model.params(), x, fisher="exact")


# ---------------------------------------------------------------- scale


def average(trees):
    """Mean over a list of trees."""
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


SCALE = ["mlp", "language", "heads_out", "conv2d", "groups", "layer_norm", "recurrent"]


DUPLICATED = itertools.product(SCALE, ["empirical", "exact"])
FAST_DUPLICATED = [("language", "exact"), ("groups", "empirical")]
FAST_DUPLICATED += [("layer_norm", "empirical")]


@pytest.mark.parametrize(("name", "fisher"), cases(DUPLICATED, FAST_DUPLICATED))
def test_unchanged_by_batch_duplication(name, fisher):
    model = BY_NAME[name]
    x, y = model.batch(2)
    once = statistics_of(model, x, y, fisher=fisher)
    doubled = [jnp.concatenate([v, v, v]) for v in (x, y)]
    close(statistics_of(model, *doubled, fisher=fisher), once, 1e-10)


PARTS = itertools.product(SCALE, ["expand", "reduce"])
FAST_PARTS = [("language", "expand"), ("heads_out", "reduce"), ("conv2d", "expand")]


@pytest.mark.parametrize(("name", "sharing"), cases(PARTS, FAST_PARTS))
def test_unchanged_by_micro_batches(name, sharing):
    model = BY_NAME[name]
    x, y = model.batch(4)
    whole = statistics_of(model, x, y, weight_sharing=sharing)
    tagged = model.tag(2, weight_sharing=sharing)
    run = jax.jit(tagged.value_and_grad)
    parts = [run(model.params(), x[i : i + 2], y[i : i + 2])[-1] for i in (0, 2)]
    close(average(parts), whole, 1e-10)


def test_tokens_of_a_sequence_count_like_examples():
    """``[B, T, D]`` with a term per token is ``[B T, D]``: no hidden powers of T."""
    sequence, rows = BY_NAME["language"], BY_NAME["mlp"]
    x, y = sequence.batch(4)
    flat = statistics_of(rows, x.reshape(12, 4), y.reshape(12))
    close(statistics_of(sequence, x, y), flat, 1e-10)


def test_reduced_factors_do_not_grow_with_the_number_of_positions():
    """The same input at every position, then mean-pooled: the same block."""
    short, long = models.heads_out(1), models.heads_out(5)
    x, y = short.batch(3)
    run = functools.partial(statistics_of, y=y, weight_sharing="reduce")
    close(run(long, jnp.repeat(x, 5, axis=1)), run(short, x), 1e-10)


def test_scaling_the_loss_scales_g_by_its_square():
    model = BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    tagged = kfac.tag(lambda *a: 3 * model.loss(*a), *args)
    tripled = jax.jit(tagged.value_and_grad)(*args)[-1]
    for name, once in first_pass("mlp")[-1].items():
        close(tripled[name].a, once.a, 1e-10)
        close(tripled[name].g, 9 * once.g, 1e-10)


# ---------------------------------------------------------------- edges


def test_nan_batch_gives_non_finite_statistics_not_zeros():
    """What arrives broken must be seen to be broken further down."""
    model = BY_NAME["mlp"]
    x, y = model.batch(4)
    _, grads, statistics = jax.jit(model.tag(4).value_and_grad)(
        model.params(), x.at[0, 0].set(jnp.nan), y
    )
    assert not np.isfinite(statistics["layer0"].a).all()
    assert not np.isfinite(grads["layer0"]["kernel"]).all()


def test_num_examples_replaces_the_mark(rng):
    """An unmarked loss with ``num_examples`` has the statistics of the marked one."""
    del rng
    model = BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    tagged = kfac.tag(model.plain_loss, *args, num_examples=4)
    close(tagged.value_and_grad(*args)[-1], first_pass("mlp")[-1], 1e-10)
    shared = kfac.tag(model.plain_loss, *args)  # the leading axis all arguments share
    close(shared.value_and_grad(*args)[-1], first_pass("mlp")[-1], 1e-10)


def test_diagonal_statistics(rng):
    """The fallback keeps the mean gradient and the number of terms."""
    params = {"odd": jnp.asarray(rng.normal(size=(4, 3)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    loss = lambda p, x: jnp.square(x @ jnp.cumsum(p["odd"], 0)).sum(-1).mean()  # noqa: E731
    tagged = kfac.tag(loss, params, x, num_examples=5)
    _, grads, statistics = tagged.value_and_grad(params, x)
    close(statistics["odd"].gradient, grads["odd"], 1e-12)
    assert float(statistics["odd"].num_examples) == 5


CHUNKED = itertools.product(["strides", "groups", "conv1d"], ["expand", "reduce"])


@pytest.mark.parametrize(
    ("name", "sharing"), cases(CHUNKED, [("strides", "reduce"), ("groups", "expand")])
)
def test_large_patches_are_taken_in_chunks(name, sharing, monkeypatch):
    """A bound that two examples of four exceed: the factor is the same."""
    model = models.BY_NAME[name]
    args = (model.params(), *model.batch(4))
    whole = first_pass(name, weight_sharing=sharing)[-1]
    monkeypatch.setattr(conv, "MAX_PATCH_ELEMENTS", 1)
    monkeypatch.setattr(conv, "CACHED_PATCH_ELEMENTS", 1)
    tagged = model.tag(4, weight_sharing=sharing)
    text = jax.jit(tagged.value_and_grad).lower(*args).as_text()
    assert "while" in text
    close(jax.jit(tagged.value_and_grad)(*args)[-1], whole, 1e-10)
