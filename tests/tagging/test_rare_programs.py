"""Rare forms of a loss: the layers found in them, and their blocks, against an oracle.

With one example and no weight sharing a layer's block is ``g gᵀ``, exactly, with ``g``
the gradient of the layer's entries, which ``jax.grad`` of the plain loss gives: of a
weight ``A ⊗ G``, of a scale or shift its units' blocks, of what falls back ``g²``.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import kfac_jax_lite as kfac
from kfac_jax_lite.core.pytree import leaves_by_path
from kfac_jax_lite.kronecker.precondition import gather
from tests.helpers import close

B, IN, OUT = 6, 4, 3
IMAGE = ("NHWC", "HWIO", "NHWC")
PROGRAMS = {}


def program(layers, **shapes):
    """Registers a loss with its layers, name to kind, and its parameters' shapes."""

    def register(loss):
        PROGRAMS[loss.__name__] = loss, layers, shapes
        return loss

    return register


def squares(z, y):
    return 0.5 * jnp.sum((z - y) ** 2, -1).mean()


def data(rng, shapes, examples=B):
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = rng.normal(size=(examples, IN)), rng.normal(size=(examples, OUT))
    return params, jnp.asarray(x), jnp.asarray(y)


def blocks(layer, statistics):
    """A layer's curvature as ``[blocks, n, n]``, or as a diagonal ``[n]``."""
    if layer.kind == "diagonal":
        return jnp.square(statistics.gradient).ravel() * statistics.num_examples
    if layer.kind == "scale_shift":
        return statistics.blocks.reshape(-1, *statistics.blocks.shape[-2:])
    pairs = zip(*(x.reshape(-1, *x.shape[-2:]) for x in statistics[:2]), strict=True)
    return jnp.stack([jnp.kron(a, g) for a, g in pairs])


def outer(layer, grads):
    """The same from the gradient of one example."""
    g = gather(layer, leaves_by_path(grads))
    if layer.kind == "diagonal":
        return jnp.square(g).ravel()
    size = layer.a_shape[-1] * (1 if layer.kind == "scale_shift" else g.shape[-1])
    g = g.reshape(-1, size)
    return g[:, :, None] * g[:, None, :]


# ------------------------------------------------ scales and shifts


@program({"g": "scale_shift", "h": "scale_shift"}, g=(OUT,), h=(OUT,))
def two_gains_in_turn(p, x, y):
    return squares(x[:, :OUT] * p["g"] * p["h"], y)


@program({"g": "scale_shift", "b": "scale_shift"}, g=(OUT,), b=(OUT,))
def a_gain_and_a_shift_with_a_constant_between(p, x, y):
    return squares(x[:, :OUT] * p["g"] * 2.0 + p["b"], y)


@program({"g": "scale_shift"}, g=(OUT,))
def divided_by_a_scaled_vector(p, x, y):
    return squares(y / (jnp.exp(x[:, :OUT]) * p["g"]), y)


@program({"g": "scale_shift"}, g=(OUT,))
def a_change_of_precision_between_factors(p, x, y):
    half = (x[:, :OUT] * p["g"]).astype(jnp.float32)
    return squares(half * x[:, 1:].astype(jnp.float32), y.astype(jnp.float32))


@program({"g": "scale_shift"}, g=(OUT,))
def a_gain_with_unit_axes_that_come_and_go(p, x, y):
    g = jnp.broadcast_to(p["g"], (len(x), 1, OUT))
    return squares(lax.squeeze(g, (1,)) * x[:, :OUT], y)


@program({"g": "scale_shift", "h": "diagonal"}, g=(OUT,), h=(OUT,))
def a_computed_gain_that_meets_data_in_a_call(p, x, y):
    gain = jnp.broadcast_to(p["g"], (len(x), OUT)) * jnp.exp(p["h"])
    return squares(jax.jit(lambda gain, x: gain * x)(gain, x[:, 1:]), y)


@program({"none": "diagonal", "w": "dense"}, none=(0,), w=(IN, OUT))
def a_gain_of_nothing(p, x, y):
    return squares(x @ p["w"] + (x[:, :0] * p["none"]).sum(), y)


@program({"g": "scale_shift", "s": "diagonal"}, g=(OUT,), s=(OUT,))
def a_shift_at_one_of_two_uses(p, x, y):
    return squares(jnp.tanh(x[:, :OUT] * p["g"] + p["s"]) * (x[:, 1:] * p["g"]), y)


# ------------------------------------------------ biases


@program({"w": "dense", "b": "scale_shift"}, w=(IN, OUT), b=(OUT,))
def an_output_that_a_call_gives_twice(p, x, y):
    @jax.jit
    def layer(x, w):
        z = x @ w
        return z, jnp.tanh(z)

    z, h = layer(x, p["w"])
    return squares(z + p["b"] + h, y)


@program(
    {"v": "dense", "w": "dense", "a": "diagonal", "b": "diagonal"},
    v=(IN, 1), w=(IN, OUT - 1), a=(1,), b=(OUT - 1,),
)  # fmt: skip
def biases_beside_less_a_layer(p, x, y):
    z = x @ jnp.concatenate([p["v"], p["w"]], 1)
    return squares(jnp.concatenate([p["a"], p["b"]]) - z, y)


@program(
    {"w": "dense", "a": "diagonal", "b": "diagonal"},
    w=(IN, OUT), a=(1,), b=(OUT - 1,),
)  # fmt: skip
def biases_beside_behind_an_activation(p, x, y):
    return squares(jnp.tanh(x @ p["w"]) + jnp.concatenate([p["a"], p["b"]]), y)


@program(
    {"w": "dense", "a": "diagonal", "b": "diagonal"},
    w=(IN, OUT), a=(1,), b=(OUT - 1,),
)  # fmt: skip
def biases_beside_behind_one_layer(p, x, y):
    return squares(x @ p["w"] + jnp.concatenate([p["a"], p["b"]]), y)


@program(
    {"v": "dense", "w": "dense", "a": "diagonal", "b": "diagonal"},
    v=(IN, 1), w=(IN, OUT - 1), a=(OUT - 1,), b=(1,),
)  # fmt: skip
def biases_beside_of_other_widths(p, x, y):
    z = x @ jnp.concatenate([p["v"], p["w"]], 1)
    return squares(z + jnp.concatenate([p["a"], p["b"]]), y)


@program({"w": "dense", "b": "scale_shift"}, w=(IN, OUT), b=(OUT,))
def a_bias_behind_a_reversed_output(p, x, y):
    return squares(jnp.flip(x @ p["w"], 1) + p["b"], y)


@program({"w": "dense", "b": "scale_shift"}, w=(IN, OUT), b=(2 * OUT,))
def a_bias_behind_a_repeated_output(p, x, y):
    return squares((jnp.tile(x @ p["w"], (1, 2)) + p["b"])[:, 1:-2], y)


# ------------------------------------------------ weights


@program({"w": "dense", "w.1": "dense"}, w=(IN, OUT))
def a_slice_whose_start_is_written_down(p, x, y):
    w = lax.dynamic_slice(p["w"], (0, 0), (IN, OUT - 1))
    z = jnp.concatenate([x @ w, x @ lax.dynamic_slice(p["w"], (0, 9), (IN, 1))], 1)
    return squares(z, y)


@program({"w": "diagonal"}, w=(2 * IN, OUT))
def a_slice_whose_start_is_computed(p, x, y):
    at = jnp.argmax(x[0])
    return squares(x @ lax.dynamic_slice(p["w"], (at, 0), (IN, OUT)), y)


@program({"w": "dense"}, w=(IN, OUT))
def a_weight_times_a_full_matrix(p, x, y):
    return squares(x @ (p["w"] * jnp.outer(x[0], y[0])), y)


@program({"w": "dense"}, w=(OUT, IN))
def a_rescaled_weight_transposed(p, x, y):
    return squares(x @ (p["w"] * jnp.exp(x[:1])).T, y)


@program({"w": "diagonal"}, w=(OUT, IN))
def a_rescaled_weight_as_one_row(p, x, y):
    w = (p["w"] * jnp.exp(x[:1])).reshape(1, -1)
    return squares(x @ w.reshape(OUT, IN).T, y)


@program({"w": "dense"}, w=(IN, OUT))
def a_weight_rescaled_outside_a_call_and_in_it(p, x, y):
    scaled = p["w"] * jnp.exp(y[:1])
    return squares(jax.jit(lambda w, x: x @ (w * 2.0))(scaled, x), y)


@program({"v": "dense", "w": "dense"}, v=(1, IN), w=(OUT - 1, IN))
def weights_beside_transposed(p, x, y):
    return squares(x @ jnp.concatenate([p["v"], p["w"]]).T, y)


@program({"v": "diagonal", "w": "diagonal"}, v=(1, IN), w=(OUT - 1, IN))
def weights_beside_as_one_row(p, x, y):
    w = jnp.concatenate([p["v"], p["w"]]).reshape(1, -1)
    return squares(x @ w.reshape(OUT, IN).T, y)


@program({"w": "diagonal"}, w=(IN, OUT - 1))
def a_weight_beside_data(p, x, y):
    return squares(x @ jnp.concatenate([p["w"], x[:1].T], 1), y)


@program({"w": "diagonal", "b": "diagonal"}, w=(IN + 1, OUT), b=(OUT,))
def a_weight_read_in_part_with_a_bias(p, x, y):
    return squares(x @ p["w"][:-1] + p["b"], y) + jnp.sin(p["w"]).sum()


@jax.custom_jvp
def product_and_input(x, w):
    return x @ w, x


@product_and_input.defjvp
def derivative(primals, tangents):
    return jax.jvp(lambda x, w: (x @ w, x), primals, tangents)


@program({"w": "diagonal"}, w=(IN, OUT))
def a_rule_of_its_own_with_two_results(p, x, y):
    z, same = product_and_input(x, p["w"])
    return squares(z * same[:, :1], y)


def convolved(x, kernel, groups=1):
    """One position: a kernel as large as the image, of two channels."""
    image = jnp.concatenate([x, jnp.sin(x)], 1).reshape(-1, 2, 2, 2)
    options = {"dimension_numbers": IMAGE, "feature_group_count": groups}
    z = lax.conv_general_dilated(image, kernel, (1, 1), "VALID", **options)
    return z.reshape(len(x), -1)


@program({"k": "conv"}, k=(2, 2, 2, OUT))
def a_kernel_times_a_full_array(p, x, y):
    mask = jnp.outer(jnp.sin(jnp.arange(8)), jnp.arange(1.0, 1 + OUT))
    mask = mask.reshape(2, 2, 2, OUT)
    return squares(convolved(x, p["k"] * (mask * x[0, 0])), y)


@program({"k": "conv"}, k=(2, 2, 2, OUT))
def a_kernel_whose_outputs_are_rescaled(p, x, y):
    return squares(convolved(x, p["k"] * jnp.exp(y[0])), y)


@program({"k": "conv"}, k=(2, 2, 1, 4))
def a_grouped_kernel_whose_outputs_are_rescaled(p, x, y):
    return squares(convolved(x, p["k"] * jnp.exp(x[0]), groups=2)[:, 1:], y)


@program({"k": "conv"}, k=(2, 2, 1, 4))
def a_grouped_kernel_whose_inputs_are_rescaled(p, x, y):
    scale = jnp.exp(x[0]).reshape(2, 2, 1, 1)
    return squares(convolved(x, p["k"] * scale, groups=2)[:, 1:], y)


@pytest.mark.parametrize("name", PROGRAMS)
def test_layers_and_blocks_of_one_example(name, rng):
    loss, kinds, shapes = PROGRAMS[name]
    params, x, y = data(rng, shapes)
    tagged = kfac.tag(loss, params, x, y, num_examples=B)
    assert {t.name: t.kind for t in tagged.layers} == kinds
    one = kfac.tag(loss, params, x[:1], y[:1], num_examples=1)
    assert one.fingerprint() == tagged.fingerprint()

    @jax.jit
    def run(params):
        _, grads, statistics = one.value_and_grad(params, x[:1], y[:1])
        plain = jax.grad(loss)(params, x[:1], y[:1])
        found = {t.name: blocks(t, statistics[t.name]) for t in one.layers}
        return grads, found, plain, {t.name: outer(t, plain) for t in one.layers}

    grads, found, plain, wanted = run(params)
    tolerance = 1e-5 if "precision" in name else 1e-10
    close(grads, plain, tolerance)
    close(found, wanted, tolerance)
