"""Rare input that is refused, each with the words that say what is wanted."""

import inspect
import types

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import kfac_jax_lite as kfac
from kfac_jax_lite.bayes.laplace import last_layer_name
from kfac_jax_lite.curvature import blocks
from kfac_jax_lite.optimizer.options import Options
from tests import laplace
from tests.helpers import first_pass
from tests.models import BY_NAME


def unchecked(function):
    """A function as users have it: tests check the types of all arguments before."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("damping", "words"),
    [
        (kfac.damping.levenberg_marquardt(), "needs kfac.kfac"),
        ("small", "a number or a schedule, got 'small'"),
        (None, "a number or a schedule, got None"),
    ],
)
def test_a_damping_of_another_kind(damping, words):
    with pytest.raises(TypeError, match=words):
        unchecked(kfac.damping.check)(damping)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": ["layer0"]}, "layers must be LayerTags"),
        ({"interval": 3}, "must come from kfac.intervals, got 3"),
    ],
)
def test_options_of_another_kind(change, words):
    good = {
        "layers": first_pass("mlp")[0].layers, "damping": 0.1, "factor_decay": 0.9,
        "inverse_interval": 1, "interval": kfac.intervals.every(1), "plan": len,
    }  # fmt: skip
    check = unchecked(Options.check)
    check(types.SimpleNamespace(**good))
    with pytest.raises(TypeError, match=words):
        check(types.SimpleNamespace(**good | change))


def test_a_leaf_smaller_than_the_block_that_is_cut_out_of_it():
    loss = lambda p, x: jnp.mean((x @ p["w"][:-1]) ** 2)  # noqa: E731
    found = kfac.tag(loss, {"w": np.ones((4, 3))}, np.ones((5, 3))).layers
    with pytest.raises(ValueError, match=r"shape \(2, 3\), too small for its block"):
        kfac.scale_by_kfac(found).init({"w": jnp.ones((2, 3))})


def test_ekfac_without_second_moments():
    tagged, _, grads, statistics = first_pass("mlp")
    tx = kfac.scale_by_kfac(tagged.layers, inverse="ekfac")
    with pytest.raises(ValueError, match="needs second moments"):
        tx.update(grads, tx.init(BY_NAME["mlp"].params()), statistics=statistics)


def test_a_name_that_the_loss_does_not_know():
    """The error is the user's own."""
    loss = lambda p, x: jnp.mean(undefined * p)  # noqa: E731, F821  # pyright: ignore
    with pytest.raises(NameError, match="^name 'undefined' is not defined") as error:
        kfac.tag(loss, jnp.ones(2), jnp.ones(3))
    assert "mapped axis" not in str(error.value)


def test_examples_along_an_axis_in_space():
    """Rows ``[2, 3]`` of a convolution are six examples: which are taken is unclear."""

    def loss(p, x):
        numbers = {"dimension_numbers": ("NHC", "HIO", "NHC")}
        z = lax.conv_general_dilated(x, p["k"], (1,), "SAME", **numbers)
        return jnp.mean(jnp.sum(z**2, -1))

    record = loss, {"k": np.ones((1, 4, 2))}, np.ones((2, 3, 4))
    every = kfac.Subsample(examples=2)
    with pytest.raises(ValueError, match="along the batch axis of a convolution"):
        kfac.tag(*record, num_examples=6, subsample=every)


def test_the_dual_step_takes_no_rule_for_its_damping(monkeypatch):
    monkeypatch.setattr(kfac.damping, "check", unchecked(kfac.damping.check))
    tagged = first_pass("mlp")[0]
    with pytest.raises(TypeError, match="a number or a schedule"):
        unchecked(kfac.ntk.dual_natural_gradient)(tagged, kfac.damping.adaptive())


def test_eigenpairs_from_the_middle():
    with pytest.raises(ValueError, match="which is 'middle', wanted 'largest'"):
        blocks.eigenpairs([], 3, 1, "middle")


def test_a_posterior_without_a_last_layer():
    """The output comes out of a loop: nobody can say which layer is the last."""

    def loss(p, x):
        h = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, 2)[0]
        return jnp.mean(jnp.sum(kfac.normal(h) ** 2, -1))

    args = {"w": jnp.ones((3, 3))}, jnp.ones((4, 3))
    with pytest.raises(ValueError, match="no layer outside loops .* of \\('w',\\)"):
        last_layer_name(kfac.tag(loss, *args), *args[:1], args[1:])


def test_validation_that_has_no_number(rng):
    """A prior cannot be chosen by losses that are all NaN."""
    case, found = laplace.problem("mlp"), laplace.posterior("mlp", "diagonal")
    apply = lambda p, x: jnp.nan * case.model.forward(p, x, lambda n, a, z: z)  # noqa: E731
    data = (apply, case.x, case.y)
    with pytest.raises(ValueError, match="every validation loss is NaN"):
        found.tune_prior("validation", validation=data, num_points=2)


def test_a_rule_whose_reference_is_no_layer():
    """Two products of one weight: the parameter falls back, named by its primitive."""
    twice = Primitive("rare_double_product")
    run = lambda x, w: x @ w @ w  # noqa: E731
    twice.def_impl(run)
    twice.def_abstract_eval(lambda x, w: x)
    mlir.register_lowering(twice, mlir.lower_fun(run, multiple_results=False))
    kfac.register_rule(twice, run)
    loss = lambda w, x: jnp.mean(twice.bind(x, w))  # noqa: E731
    (layer,) = kfac.tag(loss, np.ones((3, 3)), np.ones((4, 3))).layers
    assert layer.kind == "diagonal" and "rare_double_product" in layer.note
