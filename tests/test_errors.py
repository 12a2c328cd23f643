"""What is refused, and in which words: one case for every reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import first_pass
from tests.models import BY_NAME
from tests.networks import weight


def mlp():
    """A tagged loss, its parameters and an optimiser."""
    tagged = first_pass("mlp")[0]
    return tagged, BY_NAME["mlp"].params(), kfac.kfac(tagged.layers, 0.1)


# ---------------------------------------------------------------- options


def rename(layers):
    return [dataclasses.replace(layer, name="same") for layer in layers]


OPTIONS = [
    (lambda t: {"layers": ()}, ValueError, "there are no layers"),
    (lambda t: {"layers": rename(t)}, ValueError, "two layers share a name"),
    (
        lambda t: {"reduction": kfac.Reduction("owner", devices=2)},
        ValueError,
        "wants axis_name",
    ),
    (
        lambda t: {
            "reduction": kfac.Reduction("owner", devices=2, share="gradients"),
            "inverse": "eigh",
            "axis_name": "devices",
        },
        ValueError,
        "divides explicit inverses",
    ),
    (
        lambda t: {
            "reduction": kfac.Reduction(
                "owner", mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
            ),
            "axis_name": "model",
        },
        ValueError,
        "must name axes of Reduction.mesh",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "said"), OPTIONS, ids=[case[2] for case in OPTIONS]
)
def test_options(given, error, said):
    tagged = mlp()[0]
    options = {"layers": tagged.layers} | given(tagged.layers)
    with pytest.raises(error, match=said):
        kfac.scale_by_kfac(**options)


REDUCTIONS = [
    ({"mode": "some"}, "mode must be one of"),
    ({"share": "half"}, "share must be one of"),
    ({"dtype": jnp.int8}, "must be floating"),
    ({"bucket": -1}, "must not be negative"),
    ({"mode": "owner"}, "wants devices="),
]


@pytest.mark.parametrize(("given", "said"), REDUCTIONS, ids=str)
def test_reductions(given, said):
    with pytest.raises(ValueError, match=said):
        kfac.Reduction(**given)


ALIAS = [
    ({"learning_rate": "fast"}, 'a schedule or "auto"'),
    ({"learning_rate": -0.1}, "learning_rate must not be negative"),
    ({"learning_rate": 0.1, "kl_clip": 0.0}, "kl_clip must be positive"),
    ({"learning_rate": 0.1, "momentum": 1.0}, "momentum must be in"),
    ({"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay must not be"),
]


@pytest.mark.parametrize(("given", "said"), ALIAS, ids=str)
def test_alias(given, said):
    with pytest.raises(ValueError, match=said):
        kfac.kfac(mlp()[0].layers, **given)


# ---------------------------------------------------------------- the loss


def plain(p, x, y):
    return jnp.mean((x @ p["w"] - y) ** 2)


def marked_once(p, x, y):
    return jnp.mean((kfac.normal(x @ p["w"]) - y) ** 2)


def masked_in_a_scan(p, x, y):
    def turn(total, row):
        z = kfac.normal(row[None] @ p["w"], mask=jnp.ones(1, bool))
        return total + jnp.sum(z**2), None

    return jax.lax.scan(turn, 0.0, x)[0] / len(x) + 0 * jnp.sum(y)


def marked_in_a_scan(p, x, y):
    def turn(total, row):
        return total + jnp.sum(kfac.normal(row @ p["w"]) ** 2), None

    return jax.lax.scan(turn, 0.0, x)[0] / len(x) + 0 * jnp.sum(y)


LOSSES = [
    (marked_once, {"num_examples": 3}, ValueError, "which is the number of terms"),
    (masked_in_a_scan, {}, ValueError, "outside scan and cond"),
    (plain, {"num_examples": 0}, ValueError, "whole number >= 1"),
    (plain, {"fisher": "mc"}, ValueError, "need the network's output marked"),
    (
        marked_in_a_scan,
        {"fisher": "mc"},
        ValueError,
        "marked inside scan, cond or shard_map",
    ),
    (plain, {"has_aux": True}, TypeError, "wants loss_fn to return"),
    (lambda p, x, y: (plain(p, x, y), 1), {}, TypeError, "pass has_aux=True"),
    (lambda p, x, y: x @ p["w"], {}, TypeError, "scalar"),
    (
        lambda p, x, y: jax.lax.pmean(plain(p, x, y), "devices"),
        {},
        NameError,
        "call kfac.tag where that axis is",
    ),
    (
        lambda p, x, y: kfac.categorical(jnp.sum(x @ p["w"])),
        {},
        ValueError,
        "wants logits",
    ),
    (
        lambda p, x, y: jnp.mean(kfac.normal(x @ p["w"], variance=-1.0)),
        {},
        ValueError,
        "variance > 0",
    ),
    (
        lambda p, x, y: jnp.mean(kfac.normal(x @ p["w"], mask=jnp.ones(3))),
        {},
        ValueError,
        "one entry for every row",
    ),
]


@pytest.mark.parametrize(
    ("loss", "options", "error", "said"), LOSSES, ids=[case[3] for case in LOSSES]
)
def test_losses(rng, loss, options, error, said):
    params = {"w": weight(rng, 4, 3)}
    with pytest.raises(error, match=said):
        kfac.tag(loss, params, np.ones((5, 4)), np.ones((5, 3)), **options)


PARAMS = [
    ({}, ValueError, "no leaves"),
    ({"w": "kernel"}, TypeError, "is a str, not an array"),
    ({"w": np.ones((4, 3), int)}, TypeError, "has dtype int64"),
]


@pytest.mark.parametrize(("params", "error", "said"), PARAMS, ids=str)
def test_params(params, error, said):
    with pytest.raises(error, match=said):
        kfac.tag(plain, params, np.ones((5, 4)), np.ones((5, 3)))


def switched(p, x, y, train):
    return plain(p, x, y) if train else 0 * plain(p, x, y)


ARGUMENTS = [
    ((True,), {}, r"args\[2\] is a Python number, and the loss must know it"),
    (("train",), {}, r"args\[2\] is a str, not an array"),
    ((len,), {}, r"args\[2\] is a builtin_function_or_method, not an array"),
    ((), {"train": True}, "has no argument named train. The arguments of the loss"),
]


@pytest.mark.parametrize(("more", "named", "said"), ARGUMENTS, ids=str)
def test_arguments_that_are_no_arrays(more, named, said):
    params, x, y = {"w": jnp.ones((4, 3))}, np.ones((5, 4)), np.ones((5, 3))
    with pytest.raises(TypeError, match=said):
        kfac.tag(switched, params, x, y, *more, **named)
    tagged = kfac.tag(lambda p, x, y: switched(p, x, y, True), params, x, y)
    other = dataclasses.replace(tagged, loss_fn=switched)
    with pytest.raises(TypeError, match=said):
        other.value_and_grad(params, x, y, *more, **named)


def test_arguments_that_stand_for_nothing_or_are_numbers():
    """``None`` is an empty tree; a number that the loss only computes with is data."""
    params, x, y = {"w": jnp.ones((4, 3))}, np.ones((5, 4)), np.ones((5, 3))
    loss = lambda p, x, y, scale, more: scale * plain(p, x, y)  # noqa: E731
    tagged = kfac.tag(loss, params, x, y, 2.0, None)
    value, _, _ = tagged.value_and_grad(params, x, y, 2.0, None)
    np.testing.assert_allclose(value, 2 * plain(params, x, y))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        kfac.tag(switched, params, x, y, jnp.asarray(True))


# ---------------------------------------------------------------- trees and states


def test_trees_of_another_model():
    tagged, params, tx = mlp()
    smaller = jax.tree.map(lambda x: x[..., :1], params)
    with pytest.raises(ValueError, match="tagged as"):
        tx.init(smaller)
    with pytest.raises(ValueError, match="no layer given owns the parameter"):
        tx.init(params | {"new": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"nor 1 others"):
        tx.init(params | {"new": jnp.ones(3), "newer": jnp.ones(3)})
    del params["layer0"]
    with pytest.raises(ValueError, match="tagged on another model"):
        tx.init(params)


def test_states_of_another_model():
    tagged, params, tx = mlp()
    other = kfac.kfac(first_pass("conv2d")[0].layers, 0.1)
    foreign = other.init(BY_NAME["conv2d"].params())
    batch = np.ones((4, 4)), np.zeros(4, int)
    with pytest.raises(ValueError, match="holds a layer"):
        tagged.value_and_grad(params, *batch, opt_state=foreign)
    with pytest.raises(ValueError, match="contains no KFACState"):
        tagged.value_and_grad(params, *batch, opt_state=optax.sgd(0.1).init(params))


def test_a_factor_of_another_shape():
    tagged, params, _ = mlp()
    tx = kfac.scale_by_kfac(tagged.layers)
    state = tx.init(params)
    first = state.factors["layer0"]
    wrong = first._replace(a=jnp.zeros((2, 2)))
    state = state._replace(factors=state.factors | {"layer0": wrong})
    grads = jax.tree.map(jnp.ones_like, params)
    with pytest.raises(ValueError, match="has a factor of shape"):
        tx.update(grads, state, params, statistics={})


def test_two_states_with_moments():
    tagged, params, _ = mlp()
    tx = optax.chain(*[kfac.scale_by_kfac(tagged.layers, inverse="ekfac")] * 2)
    batch = np.ones((4, 4)), np.zeros(4, int)
    with pytest.raises(ValueError, match="two EKFAC states share the layer"):
        tagged.value_and_grad(params, *batch, opt_state=tx.init(params))


def test_moments_of_a_part_of_a_layer():
    tagged, params, _ = mlp()
    mask = jax.tree.map(lambda x: x.ndim == 2, params)
    tx = optax.masked(kfac.scale_by_kfac(tagged.layers, inverse="ekfac"), mask)
    with pytest.raises(ValueError, match="needs whole layers"):
        tx.init(params)


# ---------------------------------------------------------------- rules by hand


def test_rules():
    with pytest.raises(ValueError, match="has a rule in the library already"):
        kfac.register_rule("dot_general", lambda x, w, **_: x @ w)
    with pytest.raises(ValueError, match="shape"):
        kfac.tag_dense(jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.ones((3, 5)))


def by_rows(p, x):
    return jnp.mean((x @ p["w"]) ** 2)


def mixed(p, x):
    return jnp.mean((jnp.swapaxes(x.reshape(4, 5, 4), 0, 1) @ p["w"]) ** 2)


SUBSAMPLES = [
    (by_rows, {"num_examples": 20}, "must divide"),
    (mixed, {"num_examples": 7}, "needs rows in the order"),
]


@pytest.mark.parametrize(
    ("loss", "options", "said"), SUBSAMPLES, ids=[case[2] for case in SUBSAMPLES]
)
def test_subsamples(rng, loss, options, said):
    params, taken = {"w": weight(rng, 4, 3)}, kfac.Subsample(examples=3)
    with pytest.raises(ValueError, match=said):
        kfac.tag(loss, params, np.ones((20, 4)), subsample=taken, **options)
