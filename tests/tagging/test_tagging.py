"""``tag`` finds every layer, and the tagged loss computes what the loss computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import cases, close, first_pass, leaves

BY_NAME = models.BY_NAME
FLOAT32 = ["mlp", "language", "heads_out", "recurrent", "conv2d", "grouped_nchw"]
FLOAT32 += ["batch_norm", "layer_norm", "remat_in_jit", "reshaped", "bernoulli"]


def check_gradients(loss, tagged, args, tolerance=1e-12):
    """Value and gradients of the tagged loss are those of the loss."""
    value, grads, statistics = jax.jit(tagged.value_and_grad)(*args)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(loss))(*args)
    close(value, wanted, tolerance)
    close(grads, wanted_grads, tolerance)
    return statistics


def check_partition(tagged, params):
    """Every parameter is in exactly one layer."""
    owned = [path for layer in tagged.layers for path in layer.params]
    assert sorted(owned) == sorted(leaves(params))
    assert len({layer.name for layer in tagged.layers}) == len(tagged.layers)


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_value_and_gradients(model):
    _, value, grads, _ = first_pass(model.name)
    args = (model.params(), *model.batch(4))
    wanted = jax.jit(jax.value_and_grad(model.plain_loss))(*args)
    close((value, grads), wanted, 1e-12)


@pytest.mark.parametrize("name", cases(FLOAT32, ["mlp", "recurrent", "layer_norm"]))
def test_value_and_gradients_float32(name):
    model = BY_NAME[name]
    args = (model.params(jnp.float32), *model.batch(4, jnp.float32))
    tagged = model.tag(dtype=jnp.float32)
    statistics = check_gradients(model.plain_loss, tagged, args, 2e-6)
    assert {v.dtype for v in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_layers_found(model):
    tagged, *_, statistics = first_pass(model.name)
    check_partition(tagged, model.params())
    kinds = {name: spec.kind for name, spec in model.layers.items()}
    assert {layer.name: layer.kind for layer in tagged.layers} == kinds
    assert set(statistics) == set(kinds)
    for layer in tagged.layers:
        if layer.kind in ("dense", "conv"):
            assert statistics[layer.name].a.shape == tuple(layer.a_shape)
            assert statistics[layer.name].g.shape == tuple(layer.g_shape)


@pytest.mark.parametrize("name", ["mlp", "tuples", "flat", "transposed", "nchw"])
def test_weight_first_then_bias(name):
    model = BY_NAME[name]
    shapes = {path: leaf.ndim for path, leaf in leaves(model.params()).items()}
    for layer in first_pass(name)[0].layers:
        ranks = [shapes[path] for path in layer.params]
        assert ranks == sorted(ranks, reverse=True)


def test_abstract_arguments_give_the_same_layers():
    model = BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    assert kfac.tag(model.loss, *args).layers == model.tag(4).layers


def test_layers_are_static_and_hashable():
    layers = first_pass("groups")[0].layers
    assert isinstance(layers, tuple)
    assert hash(layers) == hash(BY_NAME["groups"].tag(4).layers)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm"])
def test_table(name):
    tagged = first_pass(name)[0]
    text = str(tagged)
    for layer in tagged.layers:
        assert layer.name in text
        assert layer.kind in text
    assert "100" in text  # per cent of the parameters covered


def test_has_aux():
    model = BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))

    def loss(params, x, y):
        return model.loss(params, x, y), {"size": x.shape[0], "mean": x.mean()}

    tagged = kfac.tag(loss, *args, has_aux=True)
    (value, aux), grads, _ = tagged.value_and_grad(*args)
    close((value, grads), jax.value_and_grad(model.plain_loss)(*args), 1e-12)
    assert aux["size"] == 4
    close(aux["mean"], args[1].mean())


# ---------------------------------------------------------------- special forms


def special(loss, params, x, examples=None, **options):
    """Tag and check a loss of ``(params, x)``; returns the layers by name."""
    params = jax.tree.map(jnp.asarray, params)
    options.setdefault("num_examples", examples or x.shape[0])
    tagged = kfac.tag(loss, params, x, **options)
    statistics = check_gradients(loss, tagged, (params, x))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(statistics))
    return tagged, {layer.name: layer for layer in tagged.layers}


def covered(tagged, params):
    """All parameters appear, possibly several times (slices of one parameter)."""
    owned = {path for layer in tagged.layers for path in layer.params}
    assert owned == set(leaves(params))


def test_cast_to_bfloat16(rng):
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32)}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def loss(p, x):
        z = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return jnp.square(z.astype(jnp.float32)).sum(-1).mean()

    _, layers = special(loss, params, x)
    assert layers["w"].kind == "dense"


def attend(q, k, v):
    """Plain attention."""
    scores = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2))
    return jnp.square(scores @ v).sum((-1, -2)).mean()


def test_fused_matrix_of_which_slices_are_used(rng):
    params = {"qkv": rng.normal(size=(4, 9))}
    x = jnp.asarray(rng.normal(size=(5, 2, 4)))

    def loss(p, x):
        return attend(*[x @ w for w in jnp.split(p["qkv"], 3, axis=1)])

    tagged, layers = special(loss, params, x)
    covered(tagged, params)
    assert {layer.kind for layer in layers.values()} == {"dense"}


def test_fused_product_then_slices(rng):
    params = {"qkv": {"kernel": rng.normal(size=(4, 9)), "bias": rng.normal(size=9)}}
    x = jnp.asarray(rng.normal(size=(5, 2, 4)))

    def loss(p, x):
        z = x @ p["qkv"]["kernel"] + p["qkv"]["bias"]
        return attend(*jnp.split(z, 3, axis=-1))

    tagged, layers = special(loss, params, x)
    check_partition(tagged, params)
    assert layers["qkv"].kind == "dense"
    assert tuple(layers["qkv"].g_shape) == (9, 9)


def test_scan_over_stacked_layers(rng):
    params = {"w": rng.normal(size=(3, 4, 4)), "b": rng.normal(size=(3, 4))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        step = lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None)  # noqa: E731
        out, _ = jax.lax.scan(step, x, (p["w"], p["b"]))
        return jnp.square(out).sum(-1).mean()

    tagged, _ = special(loss, params, x)
    covered(tagged, params)


def test_indexed_stacked_layers(rng):
    params = {"w": rng.normal(size=(2, 4, 4))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        for i in range(2):
            x = jnp.tanh(x @ p["w"][i])
        return jnp.square(x).sum(-1).mean()

    tagged, _ = special(loss, params, x)
    covered(tagged, params)


def test_activations_with_rules_of_their_own(rng):
    """custom_jvp and custom_vjp between layers hide nothing."""

    @jax.custom_vjp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defvjp(lambda x: (clipped(x), None), lambda _, c: (c,))
    params = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(3, 2))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        x = jax.nn.relu(clipped(jax.nn.silu(x @ p["a"]))) @ p["b"]
        return jax.nn.logsumexp(x, -1).mean()

    _, layers = special(loss, params, x)
    assert {layer.kind for layer in layers.values()} == {"dense"}


def test_straight_through_rule_is_kept(rng):
    """A custom_vjp with a gradient of its own keeps it."""

    @jax.custom_vjp
    def quantised(w, x):
        return x @ jnp.round(w)

    quantised.defvjp(
        lambda w, x: (quantised(w, x), (w, x)),
        lambda res, c: (7 * res[1].T @ c, c @ res[0].T),
    )
    params = {"first": rng.normal(size=(4, 3)), "second": rng.normal(size=(3, 2))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        return jnp.square(quantised(p["first"], x) @ p["second"]).sum(-1).mean()

    tagged, _ = special(loss, params, x)
    check_partition(tagged, params)


def test_stopped_gradient(rng):
    params = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(3, 2))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        return jnp.square(jax.lax.stop_gradient(x @ p["a"]) @ p["b"]).sum(-1).mean()

    tagged, _ = special(loss, params, x)
    check_partition(tagged, params)


def test_tied_weights(rng):
    """An encoder and its transpose as the decoder: gradients add up."""
    params = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        return jnp.square(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T).sum(-1).mean()

    tagged, _ = special(loss, params, x)
    check_partition(tagged, params)


def test_unused_parameter(rng):
    params = {"w": rng.normal(size=(4, 3)), "unused": rng.normal(size=2)}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    loss = lambda p, x: jnp.square(x @ p["w"]).sum(-1).mean()  # noqa: E731
    tagged, _ = special(loss, params, x)
    check_partition(tagged, params)


# ---------------------------------------------------------------- fallbacks

FALLBACKS = {
    "cumulated": lambda p, x: jnp.square(x @ jnp.cumsum(p["odd"], 0)).sum(-1).mean(),
    "power": lambda p, x: (jnp.abs(x[:, :, None]) ** p["odd"]).sum((1, 2)).mean(),
    "both_sides": lambda p, x: jnp.square(x @ (p["odd"] @ p["odd"].T)).sum(-1).mean(),
    "embedding": lambda p, x: jnp.square(
        p["odd"][jnp.argmax(x, axis=-1)] - x[:, :3]
    ).sum(-1).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallback_is_diagonal_and_said(rng, name):
    params = {"odd": rng.normal(size=(4, 3))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    tagged, layers = special(FALLBACKS[name], params, x)
    check_partition(tagged, params)
    if name == "embedding" and layers["odd"].kind == "embedding":
        return
    assert layers["odd"].kind == "diagonal"
    assert "diagonal" in str(tagged)


@pytest.mark.parametrize("name", ["cumulated", "power", "both_sides"])
def test_strict_raises_and_names_the_parameter(rng, name):
    params = {"odd": jnp.asarray(rng.normal(size=(4, 3)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    with pytest.raises(ValueError, match="odd"):
        kfac.tag(FALLBACKS[name], params, x, strict=True, num_examples=5)


def test_strict_accepts_known_layers():
    BY_NAME["conv2d"].tag(4, strict=True)


def test_parameter_in_while_is_a_clear_error(rng):
    params = {"w": jnp.asarray(rng.normal(size=(4, 4)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        out = jax.lax.while_loop(
            lambda v: jnp.square(v).sum() > 1.0, lambda v: 0.1 * v @ p["w"], x
        )
        return jnp.square(out).sum(-1).mean()

    with pytest.raises(ValueError, match="while") as error:
        kfac.tag(loss, params, x, num_examples=5)
    assert "w" in str(error.value)


def test_while_without_parameters_is_fine(rng):
    params = {"w": rng.normal(size=(4, 3))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        x = jax.lax.while_loop(lambda v: jnp.square(v).sum() > 1, lambda v: v / 2, x)
        return jnp.square(x @ p["w"]).sum(-1).mean()

    _, layers = special(loss, params, x)
    assert layers["w"].kind == "dense"
