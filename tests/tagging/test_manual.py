"""Layers named by hand, rules for foreign primitives, fingerprints and warnings."""

import functools
import warnings

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.tagging.analysis import RULES
from tests.helpers import close


@jax.custom_vjp
def kernel(x, w, b):
    """Stands for a Pallas kernel: a dense layer whose product nobody can see."""
    return jnp.sum(x[:, :, None] * w, 1) + b


def _forward(x, w, b):
    return kernel(x, w, b), (x, w)


def _backward(residuals, c):
    x, w = residuals
    return c @ w.T, x.T @ c, c.sum(0)


kernel.defvjp(_forward, _backward)


def problem(rng):
    params = {
        "w": rng.normal(size=(3, 4)), "b": rng.normal(size=4),
        "v": rng.normal(size=(4, 2)),
    }  # fmt: skip
    params = jax.tree.map(jnp.asarray, params)
    return params, jnp.asarray(rng.normal(size=(5, 3)))


def loss(layer, p, x):
    z = jnp.tanh(layer(x, p["w"], p["b"])) @ p["v"]
    return 0.5 * (kfac.normal(z) ** 2).sum(-1).mean()


def dense(x, w, b):
    return x @ w + b


def by_hand(x, w, b):
    return kfac.tag_dense(kernel(x, w, b), x, w, b)


def results(layer, params, x):
    tagged = kfac.tag(functools.partial(loss, layer), params, x, fisher="exact")
    return tagged, jax.jit(tagged.value_and_grad)(params, x)


def test_a_kernel_falls_back_unless_it_is_named(rng):
    params, x = problem(rng)
    fallen, _ = results(kernel, params, x)
    assert {t.kind for t in fallen.layers if "['v']" not in t.params} == {"diagonal"}
    assert "custom_vjp" in str(fallen)
    wanted, seen = results(dense, params, x), results(by_hand, params, x)
    assert seen[0].layers == wanted[0].layers
    close(seen[1], wanted[1])


def test_named_layers_survive_vmap_and_jit(rng):
    params, x = problem(rng)

    def each(x, w, b):
        one = lambda row: by_hand(row[None], w, b)[0]  # noqa: E731
        return jax.jit(jax.vmap(one))(x)

    wanted, seen = results(dense, params, x)[1], results(each, params, x)[1]
    close(seen, wanted)


def test_named_layer_without_bias_and_any_reference(rng):
    params, x = problem(rng)
    without = lambda x, w, b: kfac.tag_dense(kernel(x, w, 0 * b), x, w) + b  # noqa: E731
    einsum = lambda x, w, b: kfac.tag_as(kernel(x, w, b), dense, x, w, b)  # noqa: E731
    wanted = results(dense, params, x)[1]
    close(results(without, params, x)[1], wanted)
    close(results(einsum, params, x)[1], wanted)


def test_named_convolution(rng):
    params = {"w": rng.normal(size=(3, 3, 2, 4)), "b": rng.normal(size=4)}
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 2)))
    how = {"window_strides": (2, 1), "padding": "SAME"}

    def plain(x, w, b):
        order = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=order, **how) + b

    hidden = jax.custom_vjp(plain)
    hidden.defvjp(
        lambda *args: jax.vjp(plain, *args), lambda pull, c: pull(c)
    )  # fmt: skip

    def named(x, w, b):
        return kfac.tag_conv(hidden(x, w, b), x, w, b, **how)

    found = []
    for layer in (plain, named):

        def loss(p, x, layer=layer):
            z = layer(x, p["w"], p["b"])
            return 0.5 * (kfac.normal(z.reshape(2, -1)) ** 2).sum(-1).mean()

        tagged = kfac.tag(loss, params, x)
        found.append((tagged.layers, jax.jit(tagged.value_and_grad)(params, x)))
    assert found[0][0][0].kind == "conv"
    assert found[0][0] == found[1][0]
    close(found[1][1], found[0][1])


def test_wrong_references_are_refused(rng):
    params, x = problem(rng)
    with pytest.raises(ValueError, match=r"\(5, 4\) and the reference gives \(5, 3\)"):
        kfac.tag_as(kernel(x, params["w"], params["b"]), lambda x: x, x)
    two = lambda x, w, b: x @ w @ w.T @ w + b  # noqa: E731
    layer = lambda x, w, b: kfac.tag_as(kernel(x, w, b), two, x, w, b)  # noqa: E731
    tagged, _ = results(layer, params, x)
    assert "tagged by hand that is not one layer" in str(tagged)


@pytest.fixture
def product():
    """A primitive that the library does not know: a matrix product."""
    primitive = jax.extend.core.Primitive("foreign_product")
    primitive.def_impl(lambda x, w, *, scale: scale * (x @ w))
    primitive.def_abstract_eval(
        lambda x, w, *, scale: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype)
    )
    yield primitive
    RULES.pop("foreign_product", None)


def test_a_registered_primitive_is_a_layer(product, rng):
    params, x = problem(rng)

    def layer(x, w, b):
        return product.bind(x, w, scale=2.0) + b

    def layers():
        return kfac.tag(functools.partial(loss, layer), params, x).layers

    assert {t.name: t.kind for t in layers()}["w"] == "diagonal"

    @functools.partial(kfac.register_rule, product)
    def reference(x, w, *, scale):
        return x @ (w * scale)

    wanted = kfac.tag(functools.partial(loss, dense), params, x).layers
    assert layers() == wanted
    kfac.register_rule("foreign_product", lambda x, w, scale: x)
    with pytest.raises(ValueError, match=r"gives the shape \(5, 3\)"):
        layers()


def test_built_in_rules_stay():
    with pytest.raises(ValueError, match="dot_general has a rule"):
        kfac.register_rule("dot_general", lambda x, w: x @ w)


def test_fingerprint_does_not_depend_on_the_batch(rng):
    params, x = problem(rng)
    text = kfac.tag(functools.partial(loss, dense), params, x).fingerprint()
    lines = ["dense: w 4×4 4×4 ['w'], ['b']", "dense: v 4×4 2×2 ['v']"]
    assert sorted(text.splitlines()) == sorted(lines)
    other = kfac.tag(functools.partial(loss, dense), params, x[:2])
    assert other.fingerprint() == text


def test_a_trace_that_uses_a_layer_differently_warns(rng):
    params, x = problem(rng)

    def sometimes(p, x):
        penalty = jnp.abs(p["v"]).sum() if len(x) > 3 else 0.0
        return loss(dense, p, x) + penalty

    tagged = kfac.tag(sometimes, params, x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tagged.value_and_grad(params, x[:3])
    with pytest.warns(UserWarning, match="layer v is used differently"):
        tagged.value_and_grad(params, x)


def test_a_trace_that_finds_other_layers_is_an_error(rng):
    params, x = problem(rng)

    def sometimes(p, x):
        return loss(kernel if len(x) > 3 else dense, p, x)

    tagged = kfac.tag(sometimes, params, x[:2])
    with pytest.raises(ValueError, match="layers b, w differ"):
        tagged.value_and_grad(params, x)


def test_gradients_pass_a_named_layer_once(rng):
    params, x = problem(rng)
    plain = jax.grad(functools.partial(loss, dense))(params, x)
    named = jax.grad(functools.partial(loss, by_hand))(params, x)
    close(named, plain)
    assert np.isfinite(jax.tree.leaves(named)[0]).all()
