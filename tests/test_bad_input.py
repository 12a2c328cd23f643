"""Bad input is a clear error or a defined result, and nothing is lost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import helpers, oracles
from tests.helpers import batches_of, close, first_pass, kfac_state, train, train_step
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]


def squares(p, x):
    """A loss with one dense layer."""
    return jnp.square(x @ p["w"]).sum(-1).mean()


def arguments(dtype=np.float64):
    """Parameters and inputs for ``squares``."""
    return {"w": jnp.ones((4, 3), dtype)}, jnp.ones((5, 4), dtype)


# ---------------------------------------------------------------- tag


def test_loss_that_is_not_scalar():
    with pytest.raises((ValueError, TypeError), match="scalar") as error:
        kfac.tag(lambda p, x: jnp.square(x @ p["w"]).sum(-1), *arguments())
    assert "(5,)" in str(error.value)


def test_aux_without_has_aux():
    with pytest.raises((ValueError, TypeError), match="has_aux"):
        kfac.tag(lambda p, x: (squares(p, x), x), *arguments())


def test_integer_loss():
    with pytest.raises((ValueError, TypeError), match="int"):
        kfac.tag(lambda p, x: (x @ p["w"]).astype(int).sum(), *arguments())


@pytest.mark.parametrize("params", [{}, {"a": None}, (), []], ids=repr)
def test_parameters_without_leaves(params):
    with pytest.raises(ValueError, match="param"):
        kfac.tag(lambda p, x: x.mean(), params, jnp.ones((5, 4)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_parameters_that_are_not_real(dtype):
    params, x = arguments()
    params["steps"] = jnp.zeros((2,), dtype)
    with pytest.raises((ValueError, TypeError), match="steps") as error:
        kfac.tag(squares, params, x)
    assert jnp.dtype(dtype).name in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "true"},
        {"fisher": None},
        {"weight_sharing": "sum"},
        {"num_examples": 0},
        {"num_examples": -3},
        {"num_examples": 2.5},
    ],
    ids=repr,
)
def test_wrong_options_of_tag(options):
    (name,) = options
    with pytest.raises((ValueError, TypeError), match=name):
        kfac.tag(squares, *arguments(), **options)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_sampled_fisher_needs_a_marked_output(fisher):
    with pytest.raises(ValueError, match="categorical"):
        kfac.tag(squares, *arguments(), fisher=fisher)


def test_monte_carlo_needs_a_key():
    args = (MODEL.params(), *MODEL.batch(4))
    with pytest.raises(ValueError, match="key"):
        MODEL.tag(4, fisher="mc").value_and_grad(*args)


def test_arguments_that_disagree_on_the_number_of_examples():
    params, x = arguments()
    loss = lambda p, x, t: squares(p, x) * t.mean()  # noqa: E731
    with pytest.raises(ValueError, match="num_examples"):
        kfac.tag(loss, params, x, jnp.ones(7))
    assert kfac.tag(loss, params, x, jnp.ones(7), num_examples=5).layers


def test_other_parameters_than_tagged():
    tagged = kfac.tag(squares, *arguments())
    with pytest.raises((ValueError, KeyError), match="w"):
        tagged.value_and_grad({"v": jnp.ones((4, 3))}, jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="layers w differ"):
        tagged.value_and_grad({"w": jnp.ones((4, 2))}, jnp.ones((5, 4)))


# ---------------------------------------------------------------- batches


def test_a_batch_of_one_trains():
    tagged, params = MODEL.tag(1), MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05)
    batches = batches_of(MODEL, 3, examples=1)
    new, state, losses = train(tagged, tx, params, batches)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(new))
    assert kfac_state(state).clock.failures.tolist() == [0, 0]


def test_empty_batch():
    """Refused when tagged; at run time its NaN mean is skipped like any bad batch."""
    with pytest.raises(ValueError, match="empty|no examples|0 examples|zero"):
        MODEL.tag(0)
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05)
    before = tx.init(params)
    x, y = MODEL.batch(4)
    try:
        new, state, _ = train_step(tagged, tx)(params, before, x[:0], y[:0])
    except ValueError:
        return
    close(new, params, 0.0)
    assert int(kfac_state(state).count) == 0


SIZES = itertools.product(["mlp", "conv2d", "layer_norm"], ["empirical", "exact"])
FAST = [("mlp", "exact"), ("conv2d", "empirical")]


@pytest.mark.parametrize(("name", "fisher"), helpers.cases(SIZES, FAST))
def test_another_batch_size_is_traced_again(name, fisher):
    """With its own number of examples: the numbers are right, not only the shapes."""
    model = BY_NAME[name]
    tagged, params = first_pass(name, fisher=fisher)[0], model.params()
    run = jax.jit(tagged.value_and_grad)
    for examples in (4, 7, 1):
        x, y = model.batch(examples)
        value, grads, statistics = run(params, x, y)
        close((value, grads), jax.value_and_grad(model.plain_loss)(params, x, y), 1e-12)
        reference = oracles.Pass(model, params, x)
        wanted = reference.factors("head" if name != "mlp" else "layer1", y, fisher)
        seen = statistics["head" if name != "mlp" else "layer1"]
        close((seen.a, seen.g), wanted, 1e-9)


def test_last_small_batch_of_an_epoch():
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05)
    batches = [MODEL.batch(4), MODEL.batch(4), MODEL.batch(3), MODEL.batch(4)]
    _, state, losses = train(tagged, tx, params, batches)
    assert np.isfinite(losses).all()
    assert int(kfac_state(state).count) == 4


# ---------------------------------------------------------------- configuration

WRONG = {
    "damping": [-1e-3, float("nan"), "small", None],
    "factor_decay": [-0.1, 1.0, 1.5],
    "interval": [3, "every"],
    "inverse": ["qr", None],
    "inverse_interval": [0, -1, 1.5],
}
WRONG_ALIAS = {
    "momentum": [-0.1, 1.0],
    "weight_decay": [-0.1],
    "kl_clip": [0.0, -1.0],
}


def cases(table):
    """Flat list of names and values."""
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_wrong_options_of_scale_by_kfac(name, value):
    layers = first_pass("mlp")[0].layers
    with pytest.raises((ValueError, TypeError), match=name):
        kfac.scale_by_kfac(layers, **{name: value})
    with pytest.raises((ValueError, TypeError), match=name):
        kfac.kfac(layers, 0.1, **{name: value})


@pytest.mark.parametrize(("name", "value"), cases(WRONG_ALIAS))
def test_wrong_options_of_kfac(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        kfac.kfac(first_pass("mlp")[0].layers, 0.1, **{name: value})


@pytest.mark.parametrize("layers", [["layer0"], None, "layers"], ids=repr)
def test_wrong_layers(layers):
    with pytest.raises((ValueError, TypeError), match="layers"):
        kfac.scale_by_kfac(layers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: kfac.intervals.every(0),
        lambda: kfac.intervals.every(1.5),
        lambda: kfac.intervals.adaptive(-0.1),
        lambda: kfac.intervals.adaptive(0.1, rule="sometimes"),
        lambda: kfac.intervals.adaptive(0.1, max_interval=0),
        lambda: kfac.intervals.staleness(-1.0),
        lambda: kfac.intervals.staleness(0.1, max_interval=0),
        lambda: kfac.intervals.adaptive(float("nan")),
        lambda: kfac.intervals.adaptive(0.1, together=0.5),
        lambda: kfac.intervals.adaptive(0.1, rule="elapsed", together=0.0),
        lambda: kfac.intervals.staleness(0.1, together=1.5),
    ],
)
def test_wrong_intervals(make):
    with pytest.raises((ValueError, TypeError)):
        make()


@pytest.mark.parametrize("mark", [kfac.categorical, kfac.bernoulli, kfac.normal])
def test_marks_are_the_identity(mark):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    np.testing.assert_array_equal(mark(x), x)
    np.testing.assert_array_equal(jax.jit(mark)(x), x)
    np.testing.assert_array_equal(jax.grad(lambda v: (mark(v) * v).sum())(x), 2 * x)


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_wrong_variance(variance):
    with pytest.raises(ValueError, match="variance"):
        kfac.normal(jnp.ones((4, 3)), variance)
